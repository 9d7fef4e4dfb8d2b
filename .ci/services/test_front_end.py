"""Tests of .github/docs/front-end.js and front-end.md in Chromium, with several tabs.

The pages have another origin than the service, except where a test says so. The tests set the clock
of the service, and the clock and the time limits of the pages.
"""

import functools
import http.server
import json
import os
import re
import shutil
import threading

import pytest
from helpers import PASSWORD, ROOT, Service, new_email
from playwright.sync_api import sync_playwright

DOCS = ROOT / ".github/docs"
MODULE = (DOCS / "front-end.js").read_text()
DOCUMENT = (DOCS / "front-end.md").read_text()
# A block that is added to the document has to be executed here too.
USE, LONG_CALL, WEB_SOCKET, STORAGE_EVENT = re.findall(
    r"^```javascript\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE
)
BASE = '"http://localhost:5000"'
LAN_BASE = "`http://${location.hostname}:5000`"
HOST = '''
"""The service with routes of a host, cheap hashes, a clock, and the pages at the same origin."""

import asyncio
import os
import sys
import types
from datetime import UTC, datetime, timedelta

import jwt
from fastapi import HTTPException
from fastapi.responses import StreamingResponse
from fastapi.staticfiles import StaticFiles

import auth
from app import app, router
from test_app import CHEAP_HASHER, validate_exp_with_auth_clock

# The recipe expects a copy of the service in the package accounts.
sys.modules |= {"accounts": types.ModuleType("accounts"), "accounts.auth": auth}
import web_socket

auth.hasher = CHEAP_HASHER
jwt.PyJWT._validate_exp = validate_exp_with_auth_clock
app.include_router(router, prefix="/accounts")
app.include_router(web_socket.router)


@app.put("/clock/{minutes}")
def set_clock(minutes: int):
    auth.now = lambda: datetime.now(UTC) + timedelta(minutes=minutes)


@app.post("/password")
def check_password(user: auth.CurrentUser):
    raise HTTPException(401, "Wrong email or password", {"WWW-Authenticate": "Bearer"})


@app.post("/stall")
async def send_half_a_body():
    async def body():
        yield "{"
        await asyncio.sleep(3600)

    return StreamingResponse(body(), media_type="application/json")


app.mount("/", StaticFiles(directory=os.environ["PAGES"], html=True))
'''
# The clock stands still and time limits do not end, until a test moves the clock or ends them.
PAGE = """<script>
function within20s(promise) {
  const late = (_, reject) => setTimeout(reject, 20_000, new Error("no result within 20 s"));
  return Promise.race([promise, new Promise(late)]);
}
const limits = [];
AbortSignal.timeout = (milliseconds) => {
  const controller = new AbortController();
  limits.push([milliseconds, controller]);
  return controller.signal;
};
function endTimeLimits() {
  for (const [milliseconds, controller] of limits) {
    controller.abort(new DOMException(`timed out after ${milliseconds} ms`, "TimeoutError"));
  }
}
let time = Date.now();
Date.now = () => time;
function moveClock(milliseconds) {
  time += milliseconds;
}
</script>
<script type="module">
import * as auth from "./front-end.js";
window.auth = auth;
</script>"""
OPTIONS = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking"]
OPTIONS += ["--disable-component-update", "--disable-sync"]
# On http://, a page at another name than localhost is no secure context.
OPTIONS += ["--host-resolver-rules=MAP lan.example 127.0.0.1"]
MINUTE = 60_000  # milliseconds
EXPIRED = 16  # minutes. An access token expires after 15 minutes.
ME = "auth.api('/auth/me').then((response) => response.status)"
TOKEN = "auth.getAccessToken()"


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The port of a server for pages, and their folder."""
    folder = tmp_path_factory.mktemp("pages")
    handler = functools.partial(QuietHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, folder
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def host(pages, tmp_path_factory):
    """A service in memory. Each of its pages has the module with another base."""
    port, folder = pages
    host_folder = tmp_path_factory.mktemp("host")
    (host_folder / "host.py").write_text(HOST)
    host = Service(
        "",
        app="host:app",
        PYTHONPATH=f"{host_folder}{os.pathsep}{DOCS / 'host'}",
        PAGES=str(folder),
        CORS_ORIGINS=f"http://localhost:{port},http://lan.example:{port}",
    )
    bases = {".": BASE, "lan": LAN_BASE, "same": '""', "prefix": '"/accounts"'}
    for name, base in bases.items():
        page = folder / name
        page.mkdir(exist_ok=True)
        (page / "index.html").write_text(PAGE)
        assert MODULE.count(BASE) == 1
        module = MODULE.replace(BASE, base).replace(":5000", f":{host.port}")
        (page / "front-end.js").write_text(module)
    yield host
    host.stop()


@pytest.fixture
def set_clock(host):
    """A function that sets the clock of the service ahead by so many minutes."""

    def set_clock(minutes):
        assert host.request("PUT", f"/clock/{minutes}").status == 200

    set_clock(0)
    return set_clock


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser, set_clock):
    """A browser without cookies and local storage."""
    context = browser.new_context()
    context.set_default_timeout(20_000)
    yield context
    context.close()


@pytest.fixture
def open_tab(context, pages):
    """A function that opens a page in a new tab."""

    def open_tab(url=f"http://localhost:{pages[0]}"):
        page = context.new_page()
        page.requested = []
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(url)
        page.wait_for_function("window.auth")
        page.requested.clear()
        return page

    return open_tab


@pytest.fixture
def tab(open_tab):
    """A tab whose user has registered."""
    page = open_tab()
    page.email = register(page)
    page.requested.clear()
    return page


def run(page, call, argument=None):
    """Return the result of a call, which is a JavaScript expression with the argument x."""
    return page.evaluate(f"(x) => within20s({call})", argument)


def start(page, call):
    """Start a call whose result is that of the expression `started`."""
    page.evaluate(f"window.started = {call}; started.catch(() => null); null")


def register(page):
    email = new_email()
    run(page, "auth.register(...x)", [email, PASSWORD])
    return email


def login(page, email):
    run(page, "auth.login(...x)", [email, PASSWORD])


def count(page, path):
    return sum(url.endswith(path) for url in page.requested)


def tokens_of(page):
    return page.evaluate("JSON.parse(localStorage.getItem('auth-jwt'))")


def store(page, tokens):
    page.evaluate("(x) => localStorage.setItem('auth-jwt', x)", json.dumps(tokens))


def wait_for_tokens_of(page, other_page):
    """Wait until the page sees the tokens that another one has stored or dropped."""
    tokens = other_page.evaluate("localStorage.getItem('auth-jwt')")
    page.wait_for_function("(x) => localStorage.getItem('auth-jwt') === x", arg=tokens)


def get_error(page, call, argument=None):
    """Return the error that the call throws."""
    properties = ("name", "message", "status", "detail", "retryAfter")
    copies = ", ".join(f"{name}: error.{name}" for name in properties)
    return run(page, f"{call}.then(() => null, (error) => ({{ {copies} }}))", argument)


def respond_with(status, body="", content_type="application/json", **headers):
    """Return a function that responds instead of the service."""
    headers |= {"Content-Type": content_type, "Access-Control-Expose-Headers": "Retry-After"}
    headers |= {"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Headers": "*"}
    return lambda route: route.fulfill(status=status, body=body, headers=headers)


def send_no_response(route):
    pass


def run_block(page, block, host):
    """Run a block of the document as a module of the page."""
    page.add_script_tag(type="module", content=block.replace(":5000", f":{host.port}"))


# Sessions


def test_a_registration_and_a_login_store_tokens_for_the_api(tab):
    assert run(tab, ME) == 200
    registered = tokens_of(tab)
    login(tab, tab.email)
    assert run(tab, ME) == 200
    assert tokens_of(tab)["refresh_token"] != registered["refresh_token"]
    assert tab.evaluate("Object.keys(localStorage)") == ["auth-jwt"]


def test_the_user_stays_logged_in_after_a_reload(tab):
    tab.reload()
    tab.wait_for_function("window.auth")
    assert run(tab, ME) == 200


def test_a_login_ends_the_session_that_it_replaces(host, tab):
    registered = tokens_of(tab)
    login(tab, tab.email)
    assert host.me(registered["access_token"]).status == 401
    assert host.refresh(registered["refresh_token"]).status == 401


def test_a_login_succeeds_if_the_replaced_session_cannot_be_ended(tab):
    tab.route("**/auth/logout", lambda route: route.abort())
    login(tab, tab.email)
    assert count(tab, "/auth/logout") == 1
    assert run(tab, ME) == 200


def test_a_logout_in_one_tab_logs_out_the_other(host, tab, open_tab):
    other_tab = open_tab()
    access_token = tokens_of(tab)["access_token"]
    run(tab, "auth.logout()")
    wait_for_tokens_of(other_tab, tab)
    assert run(other_tab, ME) == 401
    assert tokens_of(other_tab) is None
    assert count(other_tab, "/auth/refresh") == 0
    assert host.me(access_token).status == 401


@pytest.mark.parametrize(
    "response", [None, respond_with(503), respond_with(200, "<html>", "text/html")]
)
def test_a_logout_that_the_service_does_not_confirm_throws_and_logs_out(tab, response):
    tab.route("**/auth/logout", response or (lambda route: route.abort()))
    assert get_error(tab, "auth.logout()")["message"]
    assert tokens_of(tab) is None


def test_a_session_that_has_ended_logs_out(tab, set_clock):
    set_clock(8 * 24 * 60)
    assert run(tab, f"Promise.all([{ME}, {ME}])") == [401, 401]
    assert tokens_of(tab) is None
    assert count(tab, "/auth/refresh") == 1


@pytest.mark.parametrize("stored", ["x", "null", '"x"', "{}", '{"access_token": 1}'])
def test_other_content_of_the_storage_counts_as_logged_out(tab, stored):
    tab.evaluate("(x) => localStorage.setItem('auth-jwt', x)", stored)
    assert run(tab, ME) == 401
    assert run(tab, TOKEN) is None
    run(tab, "auth.logout()")
    login(tab, tab.email)
    assert run(tab, ME) == 200


# Storage

BLOCK_STORAGE = """Object.defineProperty(window, "localStorage", {
  get() { throw new DOMException("blocked", "SecurityError"); },
});"""
# Leaves at most 512 characters, which are too few for the tokens.
FILL_STORAGE = """for (let size = 2 ** 23; size >= 512; size /= 2) {
  try { localStorage.setItem(`x${size}`, "x".repeat(size)); } catch {}
}"""


@pytest.mark.parametrize("disable", [BLOCK_STORAGE, FILL_STORAGE])
@pytest.mark.parametrize("function", ["register", "login"])
def test_without_storage_no_request_is_sent(open_tab, disable, function):
    tab = open_tab()
    tab.evaluate(disable)
    error = get_error(tab, f"auth.{function}(...x)", [new_email(), PASSWORD])
    assert error["name"] in ("SecurityError", "QuotaExceededError")
    assert tab.requested == []


def test_without_storage_the_user_counts_as_logged_out(open_tab):
    tab = open_tab()
    tab.evaluate(BLOCK_STORAGE)
    assert run(tab, ME) == 401
    assert run(tab, TOKEN) is None
    run(tab, "auth.logout()")


# Refreshes


def test_five_calls_with_an_expired_access_token_share_one_refresh(tab, set_clock):
    set_clock(EXPIRED)
    assert run(tab, f"Promise.all([{ME}, {ME}, {ME}, {ME}, {ME}])") == [200] * 5
    assert count(tab, "/auth/refresh") == 1
    assert run(tab, ME) == 200
    assert count(tab, "/auth/refresh") == 1


def test_two_tabs_that_refresh_at_once_share_the_new_tokens(tab, open_tab, set_clock):
    other_tab = open_tab()
    set_clock(EXPIRED)
    for page in (tab, other_tab):
        start(page, f"Promise.all([{ME}, {ME}])")
    assert run(tab, "started") == run(other_tab, "started") == [200, 200]
    # A tab can see the new tokens of another one late. Then the service sends it the same ones.
    assert count(tab, "/auth/refresh") + count(other_tab, "/auth/refresh") in (1, 2)
    assert run(tab, ME) == run(other_tab, ME) == 200


def test_a_tab_that_slept_for_hours_uses_the_tokens_of_another_tab(tab, open_tab, set_clock):
    other_tab = open_tab()
    for number in (1, 2, 3):
        set_clock(number * EXPIRED)
        assert run(other_tab, ME) == 200
    wait_for_tokens_of(tab, other_tab)
    assert run(tab, ME) == 200
    assert (count(tab, "/auth/refresh"), count(other_tab, "/auth/refresh")) == (0, 3)


@pytest.mark.parametrize(("minutes", "refreshes"), [(EXPIRED, 0), (2 * EXPIRED, 1)])
def test_a_tab_that_slept_during_a_call_refreshes_the_tokens_of_another_tab_if_they_have_expired(
    tab, open_tab, set_clock, minutes, refreshes
):
    other_tab = open_tab()
    set_clock(EXPIRED)

    def sleep(route):
        response = route.fetch()
        assert response.status == 401
        assert run(other_tab, ME) == 200
        wait_for_tokens_of(tab, other_tab)
        set_clock(minutes)
        route.fulfill(response=response)

    tab.route("**/auth/me", sleep, times=1)
    assert run(tab, ME) == 200
    assert count(tab, "/auth/refresh") == refreshes


def test_a_logout_during_a_refresh_stays_a_logout(host, tab, set_clock):
    set_clock(EXPIRED)
    old = tokens_of(tab)
    renewed = []

    def log_out_first(route):
        response = route.fetch()
        renewed.append(response.json())
        start(tab, "auth.logout()")
        route.fulfill(response=response)

    tab.route("**/auth/refresh", log_out_first)
    assert run(tab, ME) == 401
    run(tab, "started")
    assert tokens_of(tab) is None
    assert renewed[0]["refresh_token"] != old["refresh_token"]
    assert host.me(renewed[0]["access_token"]).status == 401


def test_a_call_of_one_user_is_not_repeated_as_another(host, tab, set_clock):
    other_email = new_email()
    bob = host.register(other_email).body
    set_clock(EXPIRED)

    def log_in_as_bob_first(route):
        store(tab, bob)
        route.continue_()

    tab.route("**/auth/refresh", log_in_as_bob_first)
    assert run(tab, ME) == 401
    assert count(tab, "/auth/me") == 1
    tab.unroute("**/auth/refresh")
    assert tokens_of(tab) == bob
    assert run(tab, "auth.api('/auth/me').then((r) => r.json())")["email"] == other_email


def test_a_401_that_refreshes_do_not_cure_is_returned_after_two_repetitions(tab):
    tab.route("**/mine", respond_with(401, "{}"))
    assert run(tab, "auth.api('/mine').then((response) => response.status)") == 401
    paths = [url.rsplit("/", 1)[1] for url in tab.requested]
    assert paths == ["mine", "refresh", "mine", "refresh", "mine"]


def test_a_wrong_password_is_sent_once(tab):
    call = "auth.api('/password', { method: 'POST' }).then((response) => response.status)"
    assert run(tab, call) == 401
    assert (count(tab, "/password"), count(tab, "/auth/refresh")) == (1, 0)


# Outages


OUTAGES = {
    "503": respond_with(503, '{"detail": "Try again"}', **{"Retry-After": "2"}),
    "502": respond_with(502, "<html>", "text/html"),
    "204": respond_with(204),
    "half a response": respond_with(200, '{"access_'),
    "one token": respond_with(200, '{"user_id": "1", "access_token": "x"}'),
    "another page": respond_with(200, "<html>", "text/html"),
    "no connection": lambda route: route.abort(),
}


@pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES.keys())
def test_an_outage_during_a_refresh_keeps_the_tokens(tab, set_clock, outage):
    set_clock(EXPIRED)
    old = tokens_of(tab)
    tab.route("**/auth/refresh", outage)
    assert get_error(tab, "auth.api('/auth/me')")["message"]
    assert tokens_of(tab) == old
    tab.unroute("**/auth/refresh")
    assert run(tab, ME) == 200


def test_a_refresh_whose_response_is_lost_succeeds_at_the_next_call(tab, set_clock):
    set_clock(EXPIRED)

    def lose_response(route):
        assert route.fetch().status == 200
        route.abort()

    tab.route("**/auth/refresh", lose_response)
    assert get_error(tab, "auth.api('/auth/me')")["message"]
    tab.unroute("**/auth/refresh")
    assert run(tab, ME) == 200


@pytest.mark.parametrize("body", ["", "{}", "<html>"])
def test_a_401_of_a_gateway_during_a_refresh_ends_the_session(tab, set_clock, body):
    set_clock(EXPIRED)
    tab.route("**/auth/refresh", respond_with(401, body))
    assert run(tab, ME) == 401
    assert tokens_of(tab) is None


# Time limits


def test_a_refresh_without_a_response_does_not_block_other_tabs(tab, open_tab, set_clock):
    blocked_tab = open_tab()
    set_clock(EXPIRED)
    blocked_tab.route("**/auth/refresh", send_no_response)
    with blocked_tab.expect_request("**/auth/refresh"):
        start(blocked_tab, ME)
    start(tab, ME)
    blocked_tab.evaluate("endTimeLimits()")
    assert "timed out after 15000 ms" in get_error(blocked_tab, "started")["message"]
    assert run(tab, "started") == 200


def test_calls_that_wait_for_a_refresh_share_its_time_limit(tab, set_clock):
    set_clock(EXPIRED)
    tab.route("**/auth/refresh", send_no_response)
    tab.evaluate("""const send = fetch;
        window.responses = 0;
        window.fetch = (...request) => send(...request).finally(() => responses++);
        null""")
    with tab.expect_request("**/auth/refresh"):
        start(tab, f"Promise.allSettled([{ME}, {ME}, {ME}, {ME}, {ME}])")
    tab.wait_for_function("responses === 5")
    tab.evaluate("endTimeLimits()")
    results = run(tab, "started")
    assert [result["status"] for result in results] == ["rejected"] * 5
    # No other call waits for the lock.
    run(tab, "navigator.locks.request('auth-jwt', () => null)")
    assert count(tab, "/auth/refresh") == 1


def test_a_call_has_a_time_limit(tab):
    tab.route("**/mine", send_no_response)
    with tab.expect_request("**/mine"):
        start(tab, "auth.api('/mine')")
    tab.evaluate("endTimeLimits()")
    assert get_error(tab, "started")["name"] == "TimeoutError"


def test_the_time_limit_of_a_call_includes_its_body(tab):
    with tab.expect_response("**/stall"):
        start(tab, "auth.api('/stall', { method: 'POST' }).then((response) => response.text())")
    tab.evaluate("endTimeLimits()")
    assert get_error(tab, "started")["name"] == "TimeoutError"


def test_a_login_whose_body_stalls_throws_without_a_status(host, tab):
    old = tokens_of(tab)
    stall = f"http://localhost:{host.port}/stall"
    tab.route("**/auth/login", lambda route: route.continue_(url=stall))
    with tab.expect_response(stall):
        start(tab, "auth.login('alice@example.com', 'x')")
    tab.evaluate("endTimeLimits()")
    error = get_error(tab, "started")
    assert (error["name"], error["status"]) == ("TimeoutError", None)
    assert tokens_of(tab) == old


def test_a_signal_of_the_caller_replaces_the_time_limit_and_ends_the_call(tab):
    tab.route("**/mine", send_no_response)
    with tab.expect_request("**/mine"):
        start(tab, "auth.api('/mine', { signal: (window.own = new AbortController()).signal })")
    tab.evaluate("endTimeLimits()")
    assert run(tab, "Promise.race([started, 'waiting'])") == "waiting"
    tab.evaluate("own.abort()")
    assert get_error(tab, "started")["name"] == "AbortError"


def test_a_signal_ends_a_call_that_waits_for_a_refresh_but_not_the_refresh(tab, set_clock):
    set_clock(EXPIRED)
    waiting = []
    tab.route("**/auth/refresh", lambda route: waiting.append(route))
    with tab.expect_request("**/auth/refresh"):
        start(tab, "auth.api('/auth/me', { signal: (window.own = new AbortController()).signal })")
    tab.evaluate("own.abort()")
    assert get_error(tab, "started")["name"] == "AbortError"
    start(tab, ME)
    waiting[0].continue_()
    assert run(tab, "started") == 200
    assert count(tab, "/auth/refresh") == 1


# Access tokens for other clients


def test_a_web_socket_gets_a_valid_access_token(host, tab, set_clock):
    set_clock(EXPIRED)
    tab.evaluate(f"moveClock({16 * MINUTE})")
    with tab.expect_console_message() as message:
        run_block(tab, WEB_SOCKET, host)
    assert message.value.text == f"{tab.email}: Hello"
    assert count(tab, "/auth/refresh") == 1


def test_a_new_access_token_is_not_refreshed(tab):
    tokens = [run(tab, TOKEN) for _ in range(3)]
    assert tokens == [tokens_of(tab)["access_token"]] * 3
    assert count(tab, "/auth/refresh") == 0


def test_an_old_access_token_is_refreshed_before_it_expires(tab):
    old = tokens_of(tab)
    tab.evaluate(f"moveClock({MINUTE})")
    tokens = run(tab, f"Promise.all([{TOKEN}, {TOKEN}, {TOKEN}])")
    assert tokens == [tokens_of(tab)["access_token"]] * 3
    assert tokens[0] != old["access_token"]
    assert count(tab, "/auth/refresh") == 1


@pytest.mark.parametrize("hours", [-24, 24])
def test_the_clock_of_the_page_can_be_wrong(host, open_tab, set_clock, hours):
    tab = open_tab()
    tab.evaluate(f"moveClock({hours * 60 * MINUTE})")
    register(tab)
    assert run(tab, TOKEN) == tokens_of(tab)["access_token"]
    assert count(tab, "/auth/refresh") == 0
    set_clock(EXPIRED)
    tab.evaluate(f"moveClock({16 * MINUTE})")
    assert host.me(run(tab, TOKEN)).status == 200


def test_a_clock_that_is_set_back_does_not_make_an_access_token_new(host, tab, set_clock):
    set_clock(EXPIRED)
    tab.evaluate(f"moveClock({-60 * MINUTE})")
    assert host.me(run(tab, TOKEN)).status == 200


def test_a_tab_that_slept_does_not_get_the_expired_access_token_of_another_tab(
    host, tab, open_tab, set_clock
):
    other_tab = open_tab()
    other_tab.evaluate(
        "navigator.locks.request('auth-jwt', () => new Promise((end) => (window.end = end))); null"
    )
    other_tab.wait_for_function("!!window.end")
    tab.evaluate(f"moveClock({MINUTE})")
    start(tab, TOKEN)
    store(tab, host.refresh(tokens_of(tab)["refresh_token"]).body)
    set_clock(EXPIRED)
    other_tab.evaluate("end()")
    assert host.me(run(tab, "started")).status == 200


def test_without_a_session_there_is_no_access_token(tab, set_clock):
    set_clock(8 * 24 * 60)
    tab.evaluate(f"moveClock({MINUTE})")
    assert run(tab, f"{TOKEN}.then((token) => token === null)")
    assert tokens_of(tab) is None
    assert run(tab, f"{TOKEN}.then((token) => token === null)")
    assert count(tab, "/auth/refresh") == 1


def test_an_access_token_that_cannot_be_refreshed_is_not_returned(tab):
    old = tokens_of(tab)
    tab.evaluate(f"moveClock({MINUTE})")
    tab.route("**/auth/refresh", OUTAGES["503"])
    error = get_error(tab, TOKEN)
    assert (error["status"], error["retryAfter"]) == (503, 2)
    assert tokens_of(tab) == old


def test_getting_an_access_token_has_a_time_limit(tab):
    tab.evaluate(f"moveClock({MINUTE})")
    tab.route("**/auth/refresh", send_no_response)
    with tab.expect_request("**/auth/refresh"):
        start(tab, TOKEN)
    tab.evaluate("endTimeLimits()")
    assert get_error(tab, "started")["name"] == "TimeoutError"


# Addresses


@pytest.mark.parametrize(("path", "prefix"), [("same/", ""), ("prefix/", "/accounts")])
def test_the_service_can_have_the_origin_of_the_page(host, open_tab, set_clock, path, prefix):
    origin = f"http://localhost:{host.port}"
    tab = open_tab(f"{origin}/{path}")
    email = register(tab)
    set_clock(EXPIRED)
    assert run(tab, ME) == 200
    run(tab, "auth.logout()")
    login(tab, email)
    names = [url.removeprefix(f"{origin}{prefix}/auth/") for url in tab.requested]
    assert names == ["register", "me", "refresh", "me", "logout", "login"]


def test_without_locks_all_tabs_refresh_and_stay_logged_in(open_tab, pages, set_clock):
    tabs = [open_tab(f"http://lan.example:{pages[0]}/lan/") for _ in range(3)]
    assert tabs[0].evaluate("[isSecureContext, navigator.locks]") == [False, None]
    register(tabs[0])
    for tab in tabs:
        wait_for_tokens_of(tab, tabs[0])
    set_clock(EXPIRED)
    for tab in tabs:
        start(tab, f"Promise.all([{ME}, {ME}])")
    assert [run(tab, "started") for tab in tabs] == [[200, 200]] * 3
    set_clock(2 * EXPIRED)
    assert [run(tab, ME) for tab in tabs] == [200] * 3


BAD_PATHS = ["auth/me", "", "@other.example/x", ".other.example/x", "http://other.example/x"]
BAD_PATHS += ["//other.example/x", "/\\other.example/x", "/\t/other.example/x", "\\\\other.example"]


@pytest.mark.parametrize("path", ["", "same/"])
def test_a_path_that_could_name_another_host_is_refused(host, pages, open_tab, path):
    port = host.port if path else pages[0]
    tab = open_tab(f"http://localhost:{port}/{path}")
    register(tab)
    tab.requested.clear()
    for bad_path in [*BAD_PATHS, None]:
        assert get_error(tab, "auth.api(x)", bad_path)["name"] == "TypeError", bad_path
    assert get_error(tab, "auth.api(new URL('http://other.example'))")["name"] == "TypeError"
    assert tab.requested == []


# Calls and errors


def test_the_options_of_a_call_are_sent_with_the_access_token(tab):
    call = """auth.api("/auth/refresh", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: x,
    }).then((response) => response.status)"""
    body = json.dumps({"refresh_token": tokens_of(tab)["refresh_token"]})
    with tab.expect_request("**/auth/refresh") as request:
        assert run(tab, call, body) == 200
    assert request.value.headers["authorization"].startswith("Bearer ")


def test_a_call_without_tokens_is_sent_once(open_tab):
    tab = open_tab()
    assert run(tab, ME) == 401
    assert (count(tab, "/auth/me"), count(tab, "/auth/refresh")) == (1, 0)


def test_a_failed_login_throws_the_reason_and_keeps_the_tokens(tab):
    old = tokens_of(tab)
    error = get_error(tab, f"auth.login('{tab.email}', 'wrong')")
    assert (error["status"], error["message"]) == (401, "Wrong email or password")
    error = get_error(tab, "auth.login('alice', 'wrong')")
    assert (error["status"], error["detail"][0]["loc"]) == (422, ["body", "email"])
    assert error["message"] == error["detail"][0]["msg"]
    error = get_error(tab, "auth.register('alice@example.com', 'x'.repeat(5000))")
    assert error["status"] == 413
    assert error["message"]
    assert tokens_of(tab) == old


NO_TOKENS = {
    "204": respond_with(204),
    "a page": respond_with(200, "<html>", "text/html"),
    "no refresh token": respond_with(200, '{"user_id": "1", "access_token": "x"}'),
    "an error with tokens": respond_with(500, '{"access_token": "x", "refresh_token": "x"}'),
    "no access token": respond_with(200, '{"user_id": "1", "refresh_token": "x"}'),
}


@pytest.mark.parametrize("response", NO_TOKENS.values(), ids=NO_TOKENS.keys())
def test_a_login_without_both_tokens_has_failed(tab, response):
    old = tokens_of(tab)
    tab.route("**/auth/login", response)
    error = get_error(tab, "auth.login(...x)", [tab.email, PASSWORD])
    assert error["message"] == f"Unexpected response with status {error['status']}"
    assert tokens_of(tab) == old


BODIES = ["", "null", "1", '"x"', "[]", "[null]", "{}", '{"detail": null}', '{"detail": [null]}']
BODIES += ['{"detail": [{"msg": ""}]}', '{"detail": {}}', '{"title": "Bad Gateway"}', "<html>"]


def test_an_error_of_a_gateway_has_a_message_and_a_status(open_tab):
    tab = open_tab()
    bodies = iter(BODIES)
    tab.route("**/auth/login", lambda route: respond_with(502, next(bodies))(route))
    for body in BODIES:
        error = get_error(tab, "auth.login('alice@example.com', 'x')")
        assert error["message"] == "Unexpected response with status 502", body
        assert (error["status"], error["retryAfter"]) == (502, None), body


def test_retry_after_is_a_number_of_seconds(host, tab):
    for _ in range(20):
        assert host.login(tab.email, "wrong").status == 401
    error = get_error(tab, "auth.login(...x)", [tab.email, PASSWORD])
    assert error["status"] == 429
    assert 0 < error["retryAfter"] <= 3600


def test_retry_after_as_a_date_is_ignored(open_tab):
    tab = open_tab()
    header = {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}
    tab.route("**/auth/login", respond_with(503, "", **header))
    assert get_error(tab, "auth.login('alice@example.com', 'x')")["retryAfter"] is None


def test_without_a_connection_the_error_has_a_message_and_no_status(open_tab):
    tab = open_tab()
    tab.route("**/auth/login", lambda route: route.abort())
    error = get_error(tab, "auth.login('alice@example.com', 'x')")
    assert error["message"]
    assert error["status"] is None


# The other blocks of the document


def test_the_example_logs_in_and_prints_the_user(host, tab):
    with tab.expect_console_message() as message:
        run_block(tab, USE.replace("alice@example.com", tab.email), host)
    assert message.value.text == f"Hello {tab.email}"


def test_the_example_prints_the_reason_of_a_failed_login(host, tab):
    with tab.expect_console_message(lambda m: m.type == "log") as message:
        run_block(tab, USE.replace("MyS3cret@1", "wrong"), host)
    assert message.value.text == "Wrong email or password"


def test_a_long_call_has_its_own_time_limit(host, tab):
    with tab.expect_request("**/export"):
        run_block(tab, LONG_CALL, host)
    assert tab.evaluate("limits.at(-1)[0]") == 600_000


def test_another_tab_shows_the_login_after_a_logout(host, tab, open_tab):
    other_tab = open_tab()
    other_tab.evaluate("window.showLogin = () => (window.isShown = true); null")
    run_block(other_tab, STORAGE_EVENT, host)
    run(tab, "auth.logout()")
    other_tab.wait_for_function("window.isShown")


def test_the_document_has_no_other_blocks():
    assert DOCUMENT.count("\n```") == 2 * 4
