"""Tests of the README's JavaScript module in Chromium, with several tabs of one browser.

The module is served from another origin than the service. libfaketime moves the service's clock.
"""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import PASSWORD, ROOT, free_port, listens, new_email, wait_until
from playwright.sync_api import sync_playwright

README = (ROOT / "README.md").read_text()
[FRONT_END] = re.findall(r"^```javascript\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
LIBFAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
PAGE = """<script type="module">
import * as auth from "./auth.js";
window.auth = auth;
</script>"""
OPTIONS = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking"]
OPTIONS += ["--disable-component-update", "--disable-sync"]
EXPIRED = "+16m"  # An access token expires after 15 minutes.
ME = "auth.api('/auth/me').then((response) => response.status)"


class Clock:
    """The clock of the service."""

    def __init__(self, file):
        self.file = file
        self.set("+0")

    def set(self, offset):
        self.file.write_text(offset)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """The address of the front end, and its folder."""
    folder = tmp_path_factory.mktemp("front_end")
    (folder / "index.html").write_text(PAGE)
    handler = functools.partial(QuietHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}", folder
    server.shutdown()


@pytest.fixture(scope="module")
def service(origin, tmp_path_factory):
    """The address of a service in memory, and its clock."""
    address, folder = origin
    port = free_port()
    clock = Clock(tmp_path_factory.mktemp("clock") / "offset")
    environment = os.environ | dict.fromkeys(["MONGO_URI", "JWT_SECRET_KEY"], "")
    environment |= {"CORS_ORIGINS": address, "LD_PRELOAD": str(LIBFAKETIME)}
    environment |= {"FAKETIME_TIMESTAMP_FILE": str(clock.file), "FAKETIME_NO_CACHE": "1"}
    environment |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port), "--no-access-log"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    wait_until(lambda: listens(port), 30)
    module = FRONT_END.replace("http://localhost:5000", f"http://localhost:{port}")
    assert module != FRONT_END
    (folder / "auth.js").write_text(module)
    yield f"http://localhost:{port}", clock
    process.terminate()
    process.wait(15)


@pytest.fixture
def clock(service):
    service[1].set("+0")
    yield service[1]
    service[1].set("+0")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser, service, clock):
    """A browser without cookies and local storage."""
    context = browser.new_context()
    context.set_default_timeout(20_000)
    yield context
    context.close()


@pytest.fixture
def open_tab(context, origin):
    """A function that opens the front end in a new tab."""

    def open_tab():
        page = context.new_page()
        page.requested = []
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(origin[0])
        page.wait_for_function("window.auth")
        return page

    return open_tab


@pytest.fixture
def tab(open_tab):
    """A tab whose user has registered."""
    page = open_tab()
    page.email = new_email()
    page.evaluate("([email, password]) => auth.register(email, password)", [page.email, PASSWORD])
    return page


def count(page, path):
    return sum(url.endswith(path) for url in page.requested)


def tokens_of(page):
    return page.evaluate("JSON.parse(localStorage.getItem('auth-jwt'))")


def get_error(page, call):
    """Return the error that the call throws."""
    return page.evaluate(
        f"""{call}.then(() => null, (error) => (
            {{ message: error.message, status: error.status, detail: error.detail,
               retryAfter: error.retryAfter }}))"""
    )


def answer(status, body="", content_type="application/json", **headers):
    """Return a function that answers a request instead of the service."""
    headers = {"Content-Type": content_type, "Access-Control-Allow-Origin": "*", **headers}
    headers["Access-Control-Expose-Headers"] = "Retry-After"
    return lambda route: route.fulfill(status=status, body=body, headers=headers)


# Sessions


def test_a_registration_and_a_login_store_tokens_for_the_api(tab):
    assert tab.evaluate(ME) == 200
    registered = tokens_of(tab)
    tab.evaluate("([email, password]) => auth.login(email, password)", [tab.email, PASSWORD])
    assert tab.evaluate(ME) == 200
    assert tokens_of(tab)["refresh_token"] != registered["refresh_token"]


def test_the_user_stays_logged_in_after_a_reload(tab):
    tab.reload()
    tab.wait_for_function("window.auth")
    assert tab.evaluate(ME) == 200


def test_five_calls_with_an_expired_access_token_share_one_refresh(tab, clock):
    clock.set(EXPIRED)
    assert tab.evaluate(f"Promise.all([{ME}, {ME}, {ME}, {ME}, {ME}])") == [200] * 5
    assert count(tab, "/auth/refresh") == 1
    assert tab.evaluate(ME) == 200
    assert count(tab, "/auth/refresh") == 1


def test_two_tabs_share_one_refresh_and_stay_logged_in(tab, open_tab, clock):
    other_tab = open_tab()
    clock.set(EXPIRED)
    for page in (tab, other_tab):
        page.evaluate(f"window.result = Promise.all([{ME}, {ME}]); null")
    assert tab.evaluate("result") == other_tab.evaluate("result") == [200, 200]
    assert count(tab, "/auth/refresh") + count(other_tab, "/auth/refresh") == 1


def test_a_tab_that_slept_for_hours_uses_the_tokens_of_another_tab(tab, open_tab, clock):
    other_tab = open_tab()
    for offset in ("+16m", "+32m", "+48m"):
        clock.set(offset)
        assert other_tab.evaluate(ME) == 200
    assert tab.evaluate(ME) == 200
    assert (count(tab, "/auth/refresh"), count(other_tab, "/auth/refresh")) == (0, 3)


def test_a_logout_in_one_tab_logs_out_the_other(tab, open_tab):
    other_tab = open_tab()
    access_token = tokens_of(tab)["access_token"]
    tab.evaluate("auth.logout()")
    assert other_tab.evaluate(ME) == 401
    assert tokens_of(other_tab) is None
    assert count(other_tab, "/auth/refresh") == 0
    header = "{ headers: { Authorization: `Bearer " + access_token + "` } }"
    assert tab.evaluate(f"auth.api('/auth/me', {header}).then((r) => r.status)") == 401


def test_a_session_that_has_ended_logs_out(tab, clock):
    clock.set("+8d")
    assert tab.evaluate(f"Promise.all([{ME}, {ME}])") == [401, 401]
    assert tokens_of(tab) is None
    assert count(tab, "/auth/refresh") == 1


def test_a_logout_during_a_refresh_stays_a_logout(tab, clock):
    clock.set(EXPIRED)
    old = tokens_of(tab)
    renewed = []

    def log_out_first(route):
        response = route.fetch()
        renewed.append(response.json())
        tab.evaluate("window.loggedOut = auth.logout(); null")
        route.fulfill(response=response)

    tab.route("**/auth/refresh", log_out_first)
    assert tab.evaluate(ME) == 401
    tab.evaluate("loggedOut")
    assert tokens_of(tab) is None
    assert renewed[0]["refresh_token"] != old["refresh_token"]
    header = "{ headers: { Authorization: `Bearer " + renewed[0]["access_token"] + "` } }"
    assert tab.evaluate(f"auth.api('/auth/me', {header}).then((r) => r.status)") == 401


def test_a_call_of_one_user_is_not_repeated_as_another(tab, open_tab, clock):
    alice = tokens_of(tab)
    other_email = new_email()
    tab.evaluate("([e, p]) => auth.register(e, p)", [other_email, PASSWORD])
    bob = tokens_of(tab)
    store = "(tokens) => localStorage.setItem('auth-jwt', JSON.stringify(tokens))"
    tab.evaluate(store, alice)
    clock.set(EXPIRED)

    def log_in_as_bob_first(route):
        tab.evaluate(store, bob)
        route.continue_()

    tab.route("**/auth/refresh", log_in_as_bob_first)
    tab.requested.clear()
    assert tab.evaluate(ME) == 401
    assert count(tab, "/auth/me") == 1
    tab.unroute("**/auth/refresh")
    assert tokens_of(tab) == bob
    assert tab.evaluate("auth.api('/auth/me').then((r) => r.json())")["email"] == other_email


def test_a_logout_without_the_service_throws_and_logs_out(tab):
    tab.route("**/auth/logout", lambda route: route.abort())
    error = get_error(tab, "auth.logout()")
    assert error["message"]
    assert tokens_of(tab) is None


@pytest.mark.parametrize("stored", ["", "x", "null", "1", '"x"', "{}", "[]"])
def test_other_content_of_the_storage_counts_as_logged_out(tab, stored):
    tab.evaluate("(stored) => localStorage.setItem('auth-jwt', stored)", stored)
    assert tab.evaluate(ME) == 401
    tab.evaluate("auth.logout()")
    tab.evaluate("([email, password]) => auth.login(email, password)", [tab.email, PASSWORD])
    assert tab.evaluate(ME) == 200


# Outages


OUTAGES = {
    "503": answer(503, '{"detail": "Try again"}', **{"Retry-After": "2"}),
    "502": answer(502, "<html>", "text/html"),
    "half a response": answer(200, '{"access_'),
    "another page": answer(200, "<html>", "text/html"),
    "no connection": lambda route: route.abort(),
}


@pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES.keys())
def test_an_outage_during_a_refresh_keeps_the_tokens(tab, clock, outage):
    clock.set(EXPIRED)
    old = tokens_of(tab)
    tab.route("**/auth/refresh", outage)
    assert get_error(tab, "auth.api('/auth/me')")["message"]
    assert tokens_of(tab) == old
    tab.unroute("**/auth/refresh")
    assert tab.evaluate(ME) == 200


def test_a_refresh_whose_response_is_lost_succeeds_at_the_next_call(tab, clock):
    clock.set(EXPIRED)

    def lose_response(route):
        assert route.fetch().status == 200
        route.abort()

    tab.route("**/auth/refresh", lose_response)
    assert get_error(tab, "auth.api('/auth/me')")["message"]
    tab.unroute("**/auth/refresh")
    assert tab.evaluate(ME) == 200


def test_a_refresh_without_a_response_does_not_block_other_tabs(context, tab, open_tab, clock):
    context.add_init_script(
        """const timeout = AbortSignal.timeout;
        AbortSignal.timeout = (milliseconds) => timeout.call(AbortSignal, milliseconds / 15);"""
    )
    blocked_tab = open_tab()
    clock.set(EXPIRED)
    blocked_tab.route("**/auth/refresh", lambda route: None)
    with blocked_tab.expect_request("**/auth/refresh"):
        blocked_tab.evaluate(f"window.result = {ME}.catch((error) => error.message); null")
    ten_seconds = "new Promise((resolve) => setTimeout(resolve, 10_000, 'blocked'))"
    assert tab.evaluate(f"Promise.race([{ME}, {ten_seconds}])") == 200
    assert "timed out" in blocked_tab.evaluate(f"Promise.race([result, {ten_seconds}])")


@pytest.mark.parametrize("body", ["", "null", "{}", "[]", "<html>"])
def test_a_401_of_a_gateway_during_a_refresh_ends_the_session(tab, clock, body):
    clock.set(EXPIRED)
    tab.route("**/auth/refresh", answer(401, body))
    assert tab.evaluate(ME) == 401
    assert tokens_of(tab) is None


# Calls and errors


def test_the_options_of_a_call_are_sent_with_the_access_token(tab):
    call = """(body) => auth.api("/auth/refresh", {
        method: "POST", headers: { "Content-Type": "application/json" }, body,
    }).then((response) => response.status)"""
    body = '{"refresh_token": "' + tokens_of(tab)["refresh_token"] + '"}'
    with tab.expect_request("**/auth/refresh") as request:
        assert tab.evaluate(call, body) == 200
    assert request.value.headers["authorization"].startswith("Bearer ")


def test_a_401_that_a_refresh_does_not_cure_is_returned_after_one_repetition(tab):
    tab.route("**/mine", answer(401, "{}", **{"Access-Control-Allow-Headers": "*"}))
    tab.requested.clear()
    assert tab.evaluate("auth.api('/mine').then((response) => response.status)") == 401
    sent = [url.rsplit("/", 1)[1] for url in tab.requested]
    assert [path for path in sent if path != ""] == ["mine", "refresh", "mine"]


def test_a_call_without_tokens_is_sent_once(open_tab):
    page = open_tab()
    assert page.evaluate(ME) == 401
    assert (count(page, "/auth/me"), count(page, "/auth/refresh")) == (1, 0)


def test_a_failed_login_throws_the_reason_and_keeps_the_tokens(tab):
    old = tokens_of(tab)
    error = get_error(tab, f"auth.login('{tab.email}', 'wrong')")
    assert (error["status"], error["message"]) == (401, "Wrong email or password")
    error = get_error(tab, "auth.login('alice', 'wrong')")
    assert (error["status"], error["detail"][0]["loc"]) == (422, ["body", "email"])
    assert error["message"] == error["detail"][0]["msg"]
    error = get_error(tab, "auth.register('alice@example.com', 'x'.repeat(9000))")
    assert error["status"] == 413
    assert error["message"]
    assert tokens_of(tab) == old


BODIES = ["", "null", "1", '"x"', "[]", "[null]", "{}", '{"detail": null}', '{"detail": [null]}']
BODIES += ['{"detail": [{"msg": ""}]}', '{"detail": {}}', '{"title": "Bad Gateway"}', "<html>"]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("content_type", ["text/html", "application/problem+json"])
def test_an_error_of_a_gateway_has_a_message_and_a_status(tab, body, content_type):
    tab.route("**/auth/login", answer(502, body, content_type))
    error = get_error(tab, f"auth.login('{tab.email}', '{PASSWORD}')")
    assert (error["message"], error["status"]) == ("The server responded with status 502", 502)
    assert error["retryAfter"] is None


def test_retry_after_is_a_number_of_seconds(tab):
    for _ in range(5):
        get_error(tab, f"auth.login('{tab.email}', 'wrong')")
    error = get_error(tab, f"auth.login('{tab.email}', 'wrong')")
    assert error["status"] == 429
    assert 0 < error["retryAfter"] <= 60


def test_retry_after_as_a_date_is_ignored(tab):
    header = {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}
    tab.route("**/auth/login", answer(503, "", **header))
    assert get_error(tab, f"auth.login('{tab.email}', 'x')")["retryAfter"] is None


def test_without_a_connection_the_error_has_a_message_and_no_status(tab):
    tab.route("**/auth/login", lambda route: route.abort())
    error = get_error(tab, f"auth.login('{tab.email}', 'x')")
    assert error["message"]
    assert error["status"] is None
