// test_readme.py appends this to the README's front-end module, and sets KEY and EMAIL.

import assert from "node:assert/strict";
import { createHmac } from "node:crypto";

const { KEY, EMAIL: email } = process.env;
const password = "MyS3cret@1";
const realFetch = globalThis.fetch;
let paths = [];
let intercept = (path, send) => send();

// Records the path of each request; intercept can delay or replace its response.
globalThis.fetch = (url, options) => {
  const path = new URL(url).pathname;
  paths.push(path);
  return intercept(path, () => realFetch(url, options));
};

const count = (path) => paths.filter((each) => each === path).length;
const createGate = () => {
  let open;
  const opened = new Promise((resolve) => (open = resolve));
  return { open, opened };
};

// Replaces the access token with the same one, expired in 1970.
function expire() {
  const [header, payload] = tokens.access_token.split(".");
  const claims = { ...JSON.parse(Buffer.from(payload, "base64url")), exp: 1 };
  const unsigned = `${header}.${Buffer.from(JSON.stringify(claims)).toString("base64url")}`;
  const signature = createHmac("sha256", KEY).update(unsigned).digest("base64url");
  tokens = { ...tokens, access_token: `${unsigned}.${signature}` };
}

const tests = {
  async "five calls with an expired access token share one refresh"() {
    expire();
    const responses = await Promise.all(Array.from({ length: 5 }, () => api("/auth/me")));
    assert.deepEqual(responses.map(({ status }) => status), [200, 200, 200, 200, 200]);
    assert.equal((await responses[4].json()).email, email);
    assert.deepEqual([count("/auth/me"), count("/auth/refresh")], [10, 1]);
    await api("/auth/me");
    assert.deepEqual([count("/auth/me"), count("/auth/refresh")], [11, 1]);
  },

  async "a 401 that arrives after the refresh of another call does not cause a second one"() {
    expire();
    const gate = createGate();
    intercept = async (path, send) => {
      const isFirst = paths.length === 1;
      const response = await send();
      if (isFirst) await gate.opened;
      return response;
    };
    const first = api("/auth/me");
    assert.equal((await api("/auth/me")).status, 200);
    gate.open();
    assert.equal((await first).status, 200);
    assert.equal(count("/auth/refresh"), 1);
  },

  async "an outage during a refresh keeps the tokens"() {
    expire();
    const old = tokens;
    const busy = { status: 503, headers: { "Retry-After": "2" } };
    for (const outage of [
      async () => Response.json({ detail: "Try again" }, busy),
      async () => new Response("<html>", { status: 502 }),
      async () => new Response('{"access_', { status: 200 }),
      async () => Promise.reject(new TypeError("fetch failed")),
    ]) {
      intercept = (path, send) => (path === "/auth/refresh" ? outage() : send());
      const results = await Promise.allSettled([api("/auth/me"), api("/auth/me")]);
      assert.deepEqual(results.map(({ status }) => status), ["rejected", "rejected"]);
      assert.equal(tokens, old);
    }
    intercept = (path, send) => send();
    assert.equal((await api("/auth/me")).status, 200);
  },

  async "a refresh whose response is lost succeeds at the next call"() {
    expire();
    intercept = async (path, send) => {
      const response = await send();
      if (path === "/auth/refresh") throw new TypeError("fetch failed");
      return response;
    };
    await assert.rejects(api("/auth/me"), TypeError);
    intercept = (path, send) => send();
    assert.equal((await api("/auth/me")).status, 200);
  },

  async "the end of the session logs out"() {
    expire();
    await post("/auth/logout", { refresh_token: tokens.refresh_token });
    const responses = await Promise.all([api("/auth/me"), api("/auth/me")]);
    for (const response of responses) {
      assert.equal(response.status, 401);
      assert.match((await response.json()).detail, /^The token is invalid/);
    }
    assert.equal(tokens, undefined);
    assert.equal(count("/auth/refresh"), 1);
  },

  async "a logout during a refresh stays"() {
    expire();
    const refreshed = createGate();
    const loggedOut = createGate();
    let renewed;
    intercept = async (path, send) => {
      const response = await send();
      if (path === "/auth/refresh") {
        renewed = await response.clone().json();
        refreshed.open();
        await loggedOut.opened;
      }
      return response;
    };
    const call = api("/auth/me");
    await refreshed.opened;
    await logout();
    loggedOut.open();
    assert.equal((await call).status, 401);
    assert.equal(tokens, undefined);
    assert.equal(count("/auth/logout"), 1);
    const headers = { Authorization: `Bearer ${renewed.access_token}` };
    assert.equal((await realFetch(`${base}/auth/me`, { headers })).status, 401);
  },

  async "a call of one user is not repeated as another"() {
    expire();
    const other = { email: "bob@example.com", password };
    intercept = async (path, send) => {
      const response = await send();
      if (paths.length === 1) tokens = await post("/auth/register", other);
      return response;
    };
    assert.equal((await api("/auth/me")).status, 401);
    assert.equal(count("/auth/me"), 1);
    assert.equal((await (await api("/auth/me")).json()).email, other.email);
  },

  async "a 401 that a refresh does not cure is returned after one repetition"() {
    intercept = async (path, send) =>
      path === "/mine" ? Response.json({ detail: "No" }, { status: 401 }) : send();
    assert.equal((await api("/mine")).status, 401);
    assert.deepEqual(paths, ["/mine", "/auth/refresh", "/mine"]);
  },

  async "the options of a call are sent, with the access token"() {
    const headers = new Headers({ "Content-Type": "application/json" });
    const body = JSON.stringify({ refresh_token: tokens.refresh_token });
    const response = await api("/auth/refresh", { method: "POST", headers, body });
    assert.equal(response.status, 200);
  },

  async "a failed login throws the reason and keeps the tokens"() {
    const old = tokens;
    await assert.rejects(login(email, "wrong"), {
      message: "Wrong email or password",
      detail: "Wrong email or password",
      status: 401,
    });
    await assert.rejects(login("alice", password), (error) => {
      assert.equal(error.status, 422);
      assert.equal(error.detail[0].loc[1], "email");
      assert.equal(error.message, error.detail[0].msg);
      return true;
    });
    await assert.rejects(login(email, "x".repeat(9000)), { status: 413 });
    assert.equal(tokens, old);
  },

  async "without a login, a call is sent without a token and not repeated"() {
    await logout();
    paths = [];
    const response = await api("/auth/me");
    assert.equal(response.status, 401);
    assert.equal(response.headers.get("WWW-Authenticate"), "Bearer");
    await logout();
    assert.deepEqual(paths, ["/auth/me"]);
  },
};

tokens = await post("/auth/register", { email, password });
for (const [name, test] of Object.entries(tests)) {
  intercept = (path, send) => send();
  await login(email, password);
  paths = [];
  await test();
  console.log(`passed: ${name}`);
}
