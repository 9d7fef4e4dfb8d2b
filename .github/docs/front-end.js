// A browser client of the service. It exports register, login, logout, api and getAccessToken.

const base = "http://localhost:5000"; // the address of the service, without a final slash
const key = "auth-jwt"; // the name of the tokens in localStorage, and of the lock
const timeLimit = 15_000; // milliseconds

export async function register(email, password) {
  await startSession("/auth/register", { email, password });
}

export async function login(email, password) {
  await startSession("/auth/login", { email, password });
}

export async function logout() {
  const tokens = readTokens();
  if (!tokens) return;
  dropTokens();
  await endSession(tokens);
}

// Calls fetch with the access token. After a 401 it refreshes the tokens and repeats the call.
export async function api(path, options = {}) {
  // With an empty base, "//other.example" and "/\other.example" are addresses of another host.
  if (!/^\/(?![/\\\s])/.test(path)) throw new TypeError(`${path} must begin with one slash`);
  const signal = options.signal ?? AbortSignal.timeout(timeLimit);
  const send = (tokens) => {
    const headers = new Headers(options.headers);
    if (tokens) headers.set("Authorization", `Bearer ${tokens.access_token}`);
    return fetch(base + path, { ...options, headers, signal });
  };
  let tokens = readTokens();
  let response = await send(tokens);
  // The first refresh can find tokens of another tab that have expired as well.
  for (let repeats = 0; repeats < 2 && tokens && hasInvalidToken(response); repeats++) {
    const current = await refresh(tokens, signal);
    if (current?.user_id !== tokens.user_id) break;
    tokens = current;
    response = await send(tokens);
  }
  return response;
}

// Returns an access token that was received in the last 30 seconds, or null without a session.
export async function getAccessToken() {
  const signal = AbortSignal.timeout(timeLimit);
  let tokens = readTokens();
  while (tokens && !isFresh(tokens)) tokens = await refresh(tokens, signal);
  return tokens?.access_token ?? null;
}

// Sessions

async function startSession(path, credentials) {
  // If the storage is blocked or full, this throws before the service registers the user.
  localStorage.setItem(`${key}-test`, " ".repeat(1000));
  localStorage.removeItem(`${key}-test`);
  const tokens = await requestTokens(path, credentials);
  const replaced = readTokens();
  storeTokens(tokens);
  if (replaced) await endSession(replaced).catch(() => {}); // it expires in any case
}

async function endSession(tokens) {
  const { response, body } = await post("/auth/logout", { refresh_token: tokens.refresh_token });
  if (response.status !== 204) throw createError(response, body);
}

let refreshing = null; // the promise of a refresh, which all waiting calls of this tab share

// Returns the current tokens after a refresh, or null without a session.
async function refresh(used, signal) {
  refreshing ??= lockAndReplace(used).finally(() => (refreshing = null));
  const aborted = new Promise((_, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
  await Promise.race([refreshing, aborted]);
  return readTokens();
}

// Only one tab at a time refreshes. Pages on http:// have no locks, except on localhost. If several
// tabs refresh the same tokens within a minute, the service sends all of them the same new ones.
function lockAndReplace(used) {
  const replace = () => replaceTokens(used);
  return navigator.locks ? navigator.locks.request(key, replace) : replace();
}

async function replaceTokens(used) {
  const old = readTokens();
  if (old?.access_token !== used.access_token) return; // another tab has replaced them
  const renewed = await requestTokens("/auth/refresh", { refresh_token: old.refresh_token })
    .catch((error) => {
      if (error.status !== 401) throw error; // an outage does not end the session
      return null;
    });
  // A logout or a login during the refresh takes precedence.
  if (readTokens()?.refresh_token !== old.refresh_token) return;
  if (renewed) storeTokens(renewed);
  else dropTokens();
}

// Requests

async function requestTokens(path, data) {
  const { response, body } = await post(path, data);
  if (response.ok && body?.access_token && body.refresh_token) return body;
  throw createError(response, body);
}

async function post(path, data) {
  const response = await fetch(base + path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(data),
    signal: AbortSignal.timeout(timeLimit),
  });
  const body = await response.json().catch((error) => {
    if (error.name !== "SyntaxError") throw error; // the body is incomplete
    return null; // a 204, or a page of a gateway
  });
  return { response, body };
}

function createError(response, body) {
  const details = [body?.detail].flat().map((error) => error?.msg ?? error);
  const texts = details.filter((text) => text && typeof text === "string");
  const message = texts.join("; ") || `Unexpected response with status ${response.status}`;
  const seconds = Number.parseInt(response.headers.get("Retry-After"), 10);
  return Object.assign(new Error(message), {
    status: response.status,
    detail: body?.detail,
    retryAfter: Number.isNaN(seconds) ? undefined : seconds,
  });
}

// "Bearer" alone is the challenge of a wrong password, which must not be sent again.
function hasInvalidToken(response) {
  return response.status === 401 && response.headers.get("WWW-Authenticate") !== "Bearer";
}

// Tokens

function readTokens() {
  try {
    const tokens = JSON.parse(localStorage.getItem(key));
    return tokens?.access_token && tokens.refresh_token ? tokens : null;
  } catch {
    return null; // the storage is blocked, or another program has used the key
  }
}

function storeTokens(tokens) {
  localStorage.setItem(key, JSON.stringify({ ...tokens, received_at: Date.now() }));
}

function dropTokens() {
  localStorage.removeItem(key);
}

// The claim exp is a time of the server's clock, and the clock of a phone can be wrong. The age is
// the difference between two times of the same clock.
function isFresh(tokens) {
  const age = Date.now() - tokens.received_at;
  return age >= 0 && age < 30_000;
}
