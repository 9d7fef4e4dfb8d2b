"""Tests of .github/docs/embedding.md: its blocks, its statements, and the recipes in host/.

The blocks build a project beside a link to this repository. The running host uses it in memory and
on MongoDB. The tests of races and of statements import it into this process.
"""

import contextlib
import functools
import http.server
import importlib
import inspect
import logging
import logging.config
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import httpx2
import jwt
import pymongo
import pytest
from argon2 import PasswordHasher
from fastapi import FastAPI, HTTPException, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from helpers import PASSWORD, ROOT, SETTINGS, Service, free_port, listens, new_email, wait_until
from playwright.sync_api import sync_playwright
from pymongo.errors import AutoReconnect
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

DOCS = ROOT / ".github/docs"
DOCUMENT = (DOCS / "embedding.md").read_text()
NEW_PASSWORD = "N3w-Passw0rd"
CHEAP_HASHER = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
OPTIONS = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking"]
OPTIONS += ["--disable-component-update", "--disable-sync"]


def find_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)


# A block that is added to the document has to be executed here too.
PACKAGE, CHANGES, REQUIREMENTS, ENV_FILE, RECIPES, START, TEST = find_blocks("bash")
[CHANGE_PASSWORD] = find_blocks("javascript")
assert DOCUMENT.count("```") == 2 * 8

# The application that the tests start. Its hashes are cheap.
TESTED_MAIN = """
import os

from argon2 import PasswordHasher
from fastapi import Request

import cookies
import web_socket
from accounts import auth
from main import app

auth.hasher = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
auth.UNKNOWN_USER |= {"password_hash": auth.hasher.hash("unknown")}
cookies.ORIGINS.append(os.environ["FRONT_END"])
web_socket.CHECK_INTERVAL = 0.5


@app.post("/cookies")
def show_cookies(request: Request) -> list[str]:
    return sorted(request.cookies)
"""


# The project


@pytest.fixture(scope="module")
def project(tmp_path_factory, session_mongod):
    """The folder of a project with modules of its own, which the document's blocks have built."""
    folder = tmp_path_factory.mktemp("embedding")
    (folder / "auth-jwt").symlink_to(ROOT)
    project = folder / "project"
    project.mkdir()
    (project / ".venv").symlink_to(sys.prefix)
    for name in ("app.py", "auth.py", "db.py"):
        (project / name).write_text('raise RuntimeError("not the module of the package")\n')
    for block in (PACKAGE, REQUIREMENTS, ENV_FILE, RECIPES):
        run_bash(block, project)
    env_file = project / "accounts/.env"
    settings = env_file.read_text()
    assert "mongodb://127.0.0.1:27017\n" in settings
    env_file.write_text(settings.replace("mongodb://127.0.0.1:27017", session_mongod.uri))
    (project / "tested_main.py").write_text(TESTED_MAIN)
    return project


def run_bash(block, folder):
    command = ["bash", "-euo", "pipefail", "-c", block]
    # All packages are installed already.
    environment = own_environment() | {"PIP_NO_INDEX": "1"}
    return subprocess.check_output(command, cwd=folder, env=environment, text=True, timeout=120)


def own_environment():
    """Return the environment of a host that has a setting with one of our names."""
    environment = {name: os.environ[name] for name in os.environ if name not in SETTINGS}
    return environment | {"CORS_ORIGINS": '["https://example.com"]'}


def test_the_package_differs_only_in_the_imports_of_its_modules(project):
    modules = ("app.py", "auth.py", "db.py")
    names = {path.name for path in (project / "accounts").iterdir()} - {"__pycache__"}
    assert names == {"__init__.py", "COMMIT", ".env", *modules}
    changed = {}
    for name in modules:
        before = (ROOT / name).read_text().splitlines()
        after = (project / "accounts" / name).read_text().splitlines()
        changed[name] = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    auth, db = (("import auth", "from . import auth"), ("import db", "from . import db"))
    assert changed == {"app.py": [auth, db], "auth.py": [db], "db.py": []}


def test_a_change_of_the_service_is_listed(project, tmp_path):
    clone = tmp_path / "auth-jwt"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    copy = tmp_path / "project"
    copy.mkdir()
    run_bash(PACKAGE, copy)
    assert run_bash(CHANGES, copy) == ""
    (clone / "db.py").write_text("")
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    subprocess.run(["git", *identity, "commit", "-qam", "Fix it"], cwd=clone, check=True)
    assert run_bash(CHANGES, copy).endswith(" Fix it\n")


def test_the_minimum_versions_are_of_the_same_packages_and_not_newer():
    def read(path):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        return dict(re.split("[=>]=", line) for line in lines)

    minimum, pinned = read(DOCS / "host/requirements.txt"), read(ROOT / "requirements.txt")
    assert minimum.keys() == pinned.keys()
    for name, version in minimum.items():
        assert version_of(version) <= version_of(pinned[name])


def version_of(text):
    return [int(number) for number in text.split(".")]


def test_the_secrets_are_private_and_ignored_by_git(project):
    env_file = project / "accounts/.env"
    assert env_file.stat().st_mode & 0o77 == 0
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    subprocess.run(["git", "check-ignore", "-q", env_file], cwd=project, check=True)


def test_the_start_command_starts_the_host_at_port_8000(project):
    port = free_port()
    assert "http://127.0.0.1:8000" in DOCUMENT
    assert "--port" not in START  # 8000 is the default of uvicorn.
    process = subprocess.Popen(
        ["bash", "-c", f"exec {START.strip()} --port {port}"],
        cwd=project,
        env=own_environment(),
        start_new_session=True,
    )
    try:
        wait_until(lambda: listens(port), 60)
        assert httpx2.get(f"http://127.0.0.1:{port}/mine", timeout=30).status_code == 401
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# The tests of the project


@pytest.fixture
def databases(session_mongod):
    """A client of the server that .env of the project names."""
    with pymongo.MongoClient(session_mongod.uri) as client:
        yield client
        client.drop_database("auth_db")


@pytest.mark.parametrize(
    ("folder", "command"),
    [(".", TEST.strip()), ("tests", TEST.strip()), ("tests", ".venv/bin/pytest tests")],
)
def test_the_tests_of_the_project_do_not_touch_the_database(
    project, databases, tmp_path, folder, command
):
    copy = shutil.copytree(project, tmp_path / "project", symlinks=True)
    (copy / folder).mkdir(exist_ok=True)
    (copy / "test_main.py").rename(copy / folder / "test_main.py")
    # The second module registers the same user again.
    shutil.copy(copy / folder / "test_main.py", copy / folder / "test_more.py")
    databases.auth_db.users.insert_one({"email": "host@example.com"})
    before = contents_of(databases)
    output = run_bash(f"{command} -q -W error -p no:cacheprovider", copy)
    assert "4 passed" in output
    assert contents_of(databases) == before


def test_the_tests_of_the_project_can_use_a_test_database(project, databases, tmp_path):
    copy = shutil.copytree(project, tmp_path / "project", symlinks=True)
    conftest = (copy / "conftest.py").read_text()
    setting, assertion = re.findall(r'`(os\.environ\["M[^`]*|assert [^`]*)`', DOCUMENT)
    conftest = re.sub(r"^os\.environ.*", setting, conftest, flags=re.MULTILINE)
    conftest = re.sub(r"assert .*", assertion, conftest)
    (copy / "conftest.py").write_text(conftest)
    before = contents_of(databases)
    run_bash(f"{TEST.strip()} -q -k registered -p no:cacheprovider", copy)
    assert databases.test.users.count_documents({}) == 1
    databases.drop_database("test")
    assert contents_of(databases) == before


def contents_of(client):
    return {
        (database, name): list(client[database][name].find())
        for database in set(client.list_database_names()) - {"admin", "config", "local"}
        for name in client[database].list_collection_names()
    }


def test_the_fixture_refuses_to_delete_users_of_a_database(project, tmp_path):
    copy = shutil.copytree(project, tmp_path / "project", symlinks=True)
    # The import of a plugin comes before conftest.py.
    (copy / "plugin.py").write_text("import accounts.auth")
    command = f"PYTHONPATH=. {TEST.strip()} -q -p plugin -p no:cacheprovider || true"
    assert "The tests would delete all users." in run_bash(command, copy)


# The running host


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


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def address_of(name, port):
    """Return the address of a page. Chromium resolves all names of .localhost to this machine."""
    return f"http://{name}.localhost:{port}"


@pytest.fixture(scope="module", params=["memory", "mongodb"])
def service(request, project, pages, session_mongod):
    """The running host. No request may cause a traceback in its log."""
    front_end = address_of("app.site", pages[0])
    uri = "" if request.param == "memory" else None  # In accounts/.env.
    service = Service(uri, app="tested_main:app", folder=project, FRONT_END=front_end)
    yield service
    service.stop()
    with pymongo.MongoClient(session_mongod.uri) as client:
        if request.param == "memory":
            assert client.auth_db.users.count_documents({}) == 0
        client.drop_database("auth_db")


@pytest.fixture
def client(service):
    with httpx2.Client(base_url=f"http://127.0.0.1:{service.port}", timeout=30) as client:
        yield client


@pytest.fixture
def email():
    return new_email()


@pytest.fixture
def tokens(client, email):
    return register(client, email)


def register(client, email):
    response = client.post("/auth/register", json={"email": email, "password": PASSWORD})
    assert response.status_code == 201
    return response.json()


def login(client, email, password=PASSWORD):
    return client.post("/auth/login", json={"email": email, "password": password})


def refresh(client, tokens):
    body = {"refresh_token": tokens["refresh_token"]}
    return client.post("/auth/refresh", json=body)


def logout(client, tokens):
    return client.post("/auth/logout", json={"refresh_token": tokens["refresh_token"]})


def bearer(tokens):
    return {"Authorization": f"Bearer {tokens['access_token']}"}


def status_of_mine(client, tokens):
    return client.get("/mine", headers=bearer(tokens)).status_code


# main.py


def test_the_host_returns_its_data_to_the_current_user_only(client, email, tokens):
    response = client.get("/mine", headers=bearer(tokens))
    assert (response.status_code, response.json()) == (200, {"owner": email})
    assert client.get("/mine").status_code == 401
    assert client.get("/mine", headers={"Authorization": "Bearer x"}).status_code == 401


def test_the_host_decides_which_origins_are_allowed(client):
    response = client.get("/mine", headers={"Origin": "http://localhost:5173"})
    assert response.headers["Access-Control-Allow-Origin"] == "http://localhost:5173"
    assert "WWW-Authenticate" in response.headers["Access-Control-Expose-Headers"]
    response = client.get("/mine", headers={"Origin": "https://example.com"})
    assert "Access-Control-Allow-Origin" not in response.headers


# optional_user.py


def test_only_a_request_without_authorization_is_anonymous(client):
    assert client.get("/greeting").json() == {"greeting": "Hello"}


def test_a_visitor_with_a_token_is_greeted_by_email(client, email, tokens):
    response = client.get("/greeting", headers=bearer(tokens))
    assert response.json() == {"greeting": f"Hello {email}"}


# password.py


def change_password(client, tokens, current=PASSWORD, new=NEW_PASSWORD):
    body = {"current_password": current, "new_password": new}
    return client.post("/password", json=body, headers=bearer(tokens))


def test_a_password_change_returns_working_tokens(client, email, tokens):
    response = change_password(client, tokens)
    assert response.status_code == 200
    assert response.headers["Cache-Control"] == "no-store"
    assert status_of_mine(client, response.json()) == 200
    assert refresh(client, response.json()).status_code == 200


def test_a_password_change_replaces_the_password(client, email, tokens):
    change_password(client, tokens)
    assert login(client, email).status_code == 401
    assert login(client, email, NEW_PASSWORD).status_code == 200


def test_a_password_change_ends_every_other_session(client, email, tokens):
    others = [tokens, login(client, email).json()]
    change_password(client, tokens)
    assert [status_of_mine(client, other) for other in others] == [401, 401]
    assert [refresh(client, other).status_code for other in others] == [401, 401]


def test_a_password_change_needs_the_current_password(client, email, tokens):
    response = change_password(client, tokens, current=NEW_PASSWORD)
    assert response.status_code == 401
    # front-end.js refreshes its tokens after any other challenge, and sends the request again.
    assert response.headers["WWW-Authenticate"] == "Bearer"
    body = {"new_password": NEW_PASSWORD}
    assert client.post("/password", json=body, headers=bearer(tokens)).status_code == 422
    assert login(client, email).status_code == 200


def test_a_password_change_needs_an_access_token(client, email, tokens):
    body = {"current_password": PASSWORD, "new_password": NEW_PASSWORD}
    assert client.post("/password", json=body).status_code == 401
    assert login(client, email).status_code == 200


def test_a_wrong_current_password_counts_for_the_login_limit(client, email, tokens):
    statuses = [change_password(client, tokens, current="wrong").status_code for _ in range(21)]
    assert statuses == [401] * 20 + [429]
    assert change_password(client, tokens).status_code == 429
    assert login(client, email).status_code == 429


def test_a_weak_new_password_is_a_422_that_quotes_no_password(client, tokens):
    response = change_password(client, tokens, new="hunter2")
    assert response.status_code == 422
    assert "hunter2" not in response.text
    assert PASSWORD not in response.text


def test_a_large_password_change_is_a_413(client, tokens):
    assert change_password(client, tokens, current="x" * 5000).status_code == 413


# lists.py


def test_a_user_sees_only_their_own_lists(client, tokens):
    others = register(client, new_email())
    for owner, name in ((tokens, "food"), (others, "books"), (tokens, "films")):
        response = client.post("/lists", json={"name": name}, headers=bearer(owner))
        assert response.status_code == 201
    assert client.get("/lists", headers=bearer(tokens)).json() == ["food", "films"]
    assert client.get("/lists", headers=bearer(others)).json() == ["books"]
    assert client.get("/lists").status_code == 401


# web_socket.py


@pytest.fixture
def open_socket(service):
    """A function that opens a WebSocket and sends the messages."""
    with contextlib.ExitStack() as stack:

        def open_socket(*messages):
            address = f"ws://127.0.0.1:{service.port}/echo"
            socket = stack.enter_context(connect(address))
            for message in messages:
                socket.send(message)
            return socket

        yield open_socket


def close_code_of(socket):
    with pytest.raises(ConnectionClosed) as closed:
        socket.recv(timeout=30)
    return closed.value.rcvd.code


def test_a_socket_with_an_access_token_gets_responses(open_socket, email, tokens):
    socket = open_socket(tokens["access_token"], "hello", "")
    assert socket.recv(timeout=30) == f"{email}: hello"
    assert socket.recv(timeout=30) == f"{email}: "


def test_a_socket_with_a_binary_message_is_closed(open_socket, email, tokens):
    assert close_code_of(open_socket(b"x")) == 1003
    assert close_code_of(open_socket(tokens["access_token"], b"x")) == 1003


def test_a_logout_closes_a_quiet_socket(client, open_socket, email, tokens):
    socket = open_socket(tokens["access_token"], "hello")
    socket.recv(timeout=30)
    logout(client, tokens)
    assert close_code_of(socket) == 4401


# cookies.py and web_socket.py in Chromium


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser):
    """A browser without cookies and local storage."""
    context = browser.new_context()
    context.set_default_timeout(30_000)
    yield context
    context.close()


@pytest.fixture
def open_page(context, pages):
    """A function that opens a page of this host."""

    def open_page(name):
        page = context.new_page()
        page.goto(address_of(name, pages[0]))
        return page

    return open_page


@pytest.fixture
def api(service):
    """The address of the host, which has the same site as app.site.localhost."""
    return address_of("api.site", service.port)


@pytest.fixture
def page(open_page, api):
    """A page of the front end whose user has registered."""
    page = open_page("app.site")
    credentials = {"email": new_email(), "password": PASSWORD}
    assert send(page, "POST", f"{api}/session/register", credentials) == 204
    return page


def send(page, method, url, body=None):
    """Let the page send a request with cookies. Return the status."""
    return page.evaluate(
        """([method, url, body]) => fetch(url, {
            method,
            credentials: "include",
            headers: { "Content-Type": "application/json" },
            body: body ? JSON.stringify(body) : undefined,
        }).then((response) => response.status)""",
        [method, url, body],
    )


def submit_form(page, url):
    """Let the page send a form, as an attacker would. Return the text of the response."""
    with page.expect_navigation(url=url):
        page.evaluate(
            """(url) => {
                document.body.innerHTML = `<form method="post" action="${url}">`;
                document.forms[0].submit();
            }""",
            url,
        )
    return page.inner_text("body")


def test_a_page_has_a_session_without_access_to_its_tokens(context, page, api):
    assert send(page, "GET", f"{api}/session") == 200
    assert page.evaluate("document.cookie") == ""
    assert len(context.cookies()) == 2
    for cookie in context.cookies():
        assert (cookie["httpOnly"], cookie["secure"], cookie["sameSite"]) == (True, True, "Lax")
        # Neither is sent to other hosts of the site.
        assert cookie["domain"] == "api.site.localhost"


def test_a_refresh_replaces_the_cookies(context, page, api):
    old = {cookie["name"]: cookie["value"] for cookie in context.cookies()}
    assert send(page, "POST", f"{api}/session/refresh") == 204
    new = {cookie["name"]: cookie["value"] for cookie in context.cookies()}
    assert old.keys() == new.keys()
    assert all(old[name] != new[name] for name in old)
    assert send(page, "GET", f"{api}/session") == 200


def test_a_logout_deletes_the_cookies_and_ends_the_session(context, client, page, api):
    cookies = "; ".join(f"{cookie['name']}={cookie['value']}" for cookie in context.cookies())
    assert client.get("/session", headers={"Cookie": cookies}).status_code == 200
    assert send(page, "POST", f"{api}/session/logout") == 204
    assert context.cookies() == []
    assert send(page, "GET", f"{api}/session") == 401
    assert client.get("/session", headers={"Cookie": cookies}).status_code == 401


def test_a_post_from_another_site_has_no_cookies(open_page, page, api):
    assert "access_token" in submit_form(open_page("app.site"), f"{api}/cookies")
    assert submit_form(open_page("evil"), f"{api}/cookies") == "[]"


@pytest.mark.parametrize("attacker", ["evil", "evil.site"])
def test_a_post_from_another_origin_changes_nothing(open_page, page, api, attacker):
    assert "403" not in submit_form(open_page("app.site"), f"{api}/cookies")
    attack = submit_form(open_page(attacker), f"{api}/session/logout")
    assert attack == '{"detail":"This origin may not use the cookies"}'
    assert send(page, "GET", f"{api}/session") == 200


def test_another_subdomain_cannot_replace_the_cookies(context, open_page, page, api):
    before = context.cookies()
    other_page = open_page("evil.site")
    for cookie in before:
        change = f"{cookie['name']}=x; Domain=site.localhost; Path=/; Secure"
        other_page.evaluate("(change) => { document.cookie = change }", change)
    other_page.evaluate("document.cookie = 'other=x; Domain=site.localhost; Path=/; Secure'")
    assert {cookie["name"] for cookie in context.cookies()} - {c["name"] for c in before} == {
        "other"
    }
    assert len(context.cookies()) == len(before) + 1
    assert send(page, "GET", f"{api}/session") == 200


def test_a_page_can_use_the_web_socket(client, email, tokens, open_page, api):
    response = open_page("app.site").evaluate(
        """([url, token]) => new Promise((resolve, reject) => {
            const socket = new WebSocket(url);
            socket.onopen = () => { socket.send(token); socket.send("hello"); };
            socket.onmessage = (event) => resolve(event.data);
            socket.onclose = (event) => reject(new Error(event.code));
        })""",
        [f"{api.replace('http', 'ws')}/echo", tokens["access_token"]],
    )
    assert response == f"{email}: hello"


def test_the_front_end_stays_logged_in_after_a_password_change(client, pages, open_page, api):
    module = (DOCS / "front-end.js").read_text()
    assert '"http://localhost:5000"' in module
    module = module.replace("http://localhost:5000", api) + CHANGE_PASSWORD
    (pages[1] / "front-end.js").write_text(module)
    page = open_page("app.site")
    email = new_email()
    result = page.evaluate(
        """async ([email, password, newPassword]) => {
            const auth = await import("/front-end.js");
            await auth.register(email, password);
            const error = await auth.changePassword("wrong", newPassword).catch((e) => e);
            await auth.changePassword(password, newPassword);
            return [error.status, error.message, (await auth.api("/mine")).status];
        }""",
        [email, PASSWORD, NEW_PASSWORD],
    )
    assert result == [401, "Wrong email or password", 200]
    assert login(client, email, NEW_PASSWORD).status_code == 200


# The project in this process


@pytest.fixture(params=["memory", "mongodb"])
def host(request, project, session_mongod, monkeypatch):
    """A function that imports a module of the project. Users are in memory or in MongoDB."""
    for name in SETTINGS:
        monkeypatch.setenv(name, "")
    if request.param == "mongodb":
        monkeypatch.setenv("MONGO_URI", session_mongod.uri)
        monkeypatch.setenv("MONGO_DB_NAME", "embedding")
        monkeypatch.setenv("JWT_SECRET_KEY", "a key for the tests, longer than 32 bytes")
    others = set(sys.modules)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(project)
        auth = importlib.import_module("accounts.auth")
        auth.hasher = CHEAP_HASHER
        auth.UNKNOWN_USER |= {"password_hash": CHEAP_HASHER.hash("unknown")}
        yield importlib.import_module
    users = auth.db.users
    users.database.client.drop_database(users.database.name)
    users.database.client.close()
    for name in set(sys.modules) - others:
        if Path(getattr(sys.modules[name], "__file__", None) or "").is_relative_to(project):
            del sys.modules[name]


only_in_memory = pytest.mark.parametrize("host", ["memory"], indirect=True)


@pytest.fixture
def host_client(host):
    """A client of the application in this process. Secure cookies need https."""
    with TestClient(host("main").app, base_url="https://testserver") as client:
        yield client


def interrupt(patch, db, position, action):
    """Run the action before the database call at this position. Return the names of the calls."""
    users, calls = db.users, []

    class InterruptedCollection:
        def __getattr__(self, name):
            def call(*args, **kwargs):
                calls.append(name)
                if len(calls) - 1 == position:
                    action()
                return getattr(users, name)(*args, **kwargs)

            return call

    patch.setattr(db, "users", InterruptedCollection())
    # The action runs inside the call, in another thread.
    patch.setattr(db, "memory_lock", contextlib.nullcontext())
    return calls


def change_with_interruption(host, client, tokens, position, action):
    """Return the response to a password change, and the result of the action."""
    results = []
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, host("accounts.db"), position, lambda: results.append(action()))
        response = change_password(client, tokens)
    [result] = results
    return response, result


def positions_of(host, client):
    """Return the positions of all database calls of a password change."""
    with pytest.MonkeyPatch.context() as patch:
        tokens = register(client, new_email())
        calls = interrupt(patch, host("accounts.db"), None, None)
        assert change_password(client, tokens).status_code == 200
    # The session, the user, the user again, the new session, the new password.
    assert calls == ["find_one", "find_one", "find_one", "update_one", "update_one"]
    return range(len(calls))


def reset(users, email):
    change = {"password_hash": CHEAP_HASHER.hash("operator"), "refresh_tokens": []}
    users.update_one({"email": email}, {"$set": change})


def disable(users, email):
    rename = {"password_hash": "disabled_hash"}
    users.update_one({"email": email}, {"$rename": rename, "$set": {"refresh_tokens": []}})


def delete(users, email):
    users.delete_one({"email": email})


@pytest.mark.parametrize("act", [reset, disable, delete])
def test_an_operators_change_during_a_password_change_stays(host, host_client, act):
    users = host("accounts.db").users
    for position in positions_of(host, host_client):
        email = new_email()
        tokens = register(host_client, email)

        def act_as_operator(email=email):
            act(users, email)
            return users.find_one({"email": email})

        response, expected = change_with_interruption(
            host, host_client, tokens, position, act_as_operator
        )
        assert response.status_code == 401
        stored = users.find_one({"email": email})
        if stored:  # A wrong password is recorded.
            stored.pop("login_failures", None)
            expected.pop("login_failures", None)
        assert stored == expected


@pytest.mark.parametrize("start", [login, refresh])
def test_a_session_of_the_old_password_does_not_survive_the_change(host, host_client, start):
    for position in positions_of(host, host_client):
        email = new_email()
        tokens = register(host_client, email)
        argument = email if start is login else tokens
        response, other = change_with_interruption(
            host, host_client, tokens, position, functools.partial(start, host_client, argument)
        )
        assert response.status_code == other.status_code == 200
        assert status_of_mine(host_client, response.json()) == 200
        assert status_of_mine(host_client, other.json()) == 401


def test_of_two_password_changes_at_once_the_first_stays(host, host_client):
    for position in positions_of(host, host_client):
        email = new_email()
        tokens = register(host_client, email)
        response, first = change_with_interruption(
            host,
            host_client,
            tokens,
            position,
            functools.partial(change_password, host_client, tokens, new="An0ther-Password"),
        )
        assert (response.status_code, first.status_code) == (401, 200)
        assert status_of_mine(host_client, first.json()) == 200
        assert login(host_client, email, "An0ther-Password").status_code == 200
        assert login(host_client, email, NEW_PASSWORD).status_code == 401


@only_in_memory
def test_a_password_change_is_logged(host, host_client, caplog):
    caplog.set_level(logging.INFO, "auth_jwt")
    tokens = register(host_client, new_email())
    change_password(host_client, tokens)
    user = tokens["user_id"]
    event = rf"authn_password_change user={user} session=[0-9a-f]{{32}} network=unknown"
    assert re.fullmatch(event, caplog.records[-1].getMessage())


@only_in_memory
def test_routes_that_hash_are_plain_functions(host):
    password, cookies = host("password"), host("cookies")
    for route in (password.change_password, cookies.register, cookies.log_in):
        assert not inspect.iscoroutinefunction(route)


# lists.py


def test_the_lists_of_a_deleted_user_can_be_deleted(host, host_client):
    lists, db = host("lists"), host("accounts.db")
    tokens = [register(host_client, new_email()) for _ in range(2)]
    for owner in (*tokens, tokens[0]):
        host_client.post("/lists", json={"name": "food"}, headers=bearer(owner))
    db.users.delete_one({"email": db.users.find_one({})["email"]})
    assert lists.lists.count_documents({}) == 3
    assert lists.delete_orphaned_lists() == 2
    assert host_client.get("/lists", headers=bearer(tokens[1])).json() == ["food"]
    assert lists.delete_orphaned_lists() == 0


def test_the_lists_of_a_user_who_registers_during_the_deletion_stay(host, host_client, monkeypatch):
    lists, users = host("lists"), host("accounts.db").users
    register_and_store(host_client)
    find_values = users.distinct

    def find_values_before_registration(*args):
        values = find_values(*args)
        register_and_store(host_client)
        return values

    monkeypatch.setattr(users, "distinct", find_values_before_registration)
    users.delete_many({})
    assert lists.delete_orphaned_lists() == 1
    assert lists.lists.count_documents({}) == 1


def register_and_store(client):
    """Register a user with one list."""
    tokens = register(client, new_email())
    assert client.post("/lists", json={"name": "food"}, headers=bearer(tokens)).status_code == 201


# optional_user.py


@only_in_memory
@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Bearer x", "Token x", "x"])
def test_a_visitor_with_another_authorization_gets_a_401(host_client, header):
    response = host_client.get("/greeting", headers={"Authorization": header})
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'


@only_in_memory
def test_an_outage_during_a_query_of_the_host_is_a_503(host, host_client, monkeypatch):
    def fail(*args):
        raise AutoReconnect

    failing_lists = SimpleNamespace(find=fail, insert_one=fail)
    monkeypatch.setattr(host("lists"), "lists", failing_lists)
    headers = bearer(register(host_client, new_email()))
    responses = [
        host_client.get("/lists", headers=headers),
        host_client.post("/lists", json={"name": "food"}, headers=headers),
    ]
    assert [response.status_code for response in responses] == [503, 503]


@only_in_memory
def test_the_optional_token_keeps_the_entry_of_the_service_in_the_documentation(host):
    app = FastAPI()
    app.include_router(host("accounts.app").router)
    schemes = app.openapi()["components"]["securitySchemes"]
    app.include_router(host("optional_user").router)
    app.openapi_schema = None
    assert app.openapi()["components"]["securitySchemes"] == schemes


# web_socket.py


@only_in_memory
def test_a_client_that_leaves_causes_no_traceback(host_client):
    tokens = register(host_client, new_email())
    for messages in ([], [tokens["access_token"]]):
        with host_client.websocket_connect("/echo") as socket:
            for message in messages:
                socket.send_text(message)


@only_in_memory
def test_a_socket_that_sends_no_token_in_time_is_closed(host, host_client, monkeypatch):
    monkeypatch.setattr(host("web_socket"), "TOKEN_DEADLINE", 0)
    with host_client.websocket_connect("/echo") as socket:
        assert code_after_close(socket) == 4401


@only_in_memory
def test_a_quiet_socket_stays_open(host, host_client, monkeypatch):
    monkeypatch.setattr(host("web_socket"), "CHECK_INTERVAL", 0.01)
    db = host("accounts.db")
    tokens = register(host_client, new_email())
    find_user, checks = db.find_user_by_session, []

    def count_and_find_user(user_id, sid):
        checks.append(sid)
        return find_user(user_id, sid)

    monkeypatch.setattr(db, "find_user_by_session", count_and_find_user)
    with host_client.websocket_connect("/echo") as socket:
        socket.send_text(tokens["access_token"])
        wait_until(lambda: len(checks) > 3, 10)
        socket.send_text("hello")
        assert socket.receive_text().endswith("hello")


@only_in_memory
def test_a_socket_is_closed_when_its_token_expires(host, host_client, monkeypatch):
    monkeypatch.setattr(host("web_socket"), "CHECK_INTERVAL", 0.01)
    tokens = register(host_client, new_email())
    with host_client.websocket_connect("/echo") as socket:
        socket.send_text(tokens["access_token"])
        socket.send_text("hello")
        assert socket.receive_text().endswith("hello")
        late_clock = SimpleNamespace(now=lambda tz: datetime.now(tz) + timedelta(minutes=16))
        monkeypatch.setattr(jwt.api_jwt, "datetime", late_clock)
        assert code_after_close(socket) == 4401


@only_in_memory
@pytest.mark.parametrize("message", ["", "x", "x" * 100_000])
def test_a_socket_without_a_token_is_closed(host_client, message):
    with host_client.websocket_connect("/echo") as socket:
        socket.send_text(message)
        assert code_after_close(socket) == 4401


@only_in_memory
def test_a_socket_with_a_refresh_token_is_closed(host_client):
    tokens = register(host_client, new_email())
    with host_client.websocket_connect("/echo") as socket:
        socket.send_text(tokens["refresh_token"])
        assert code_after_close(socket) == 4401


@only_in_memory
def test_a_message_after_a_logout_gets_no_response(host_client):
    tokens = register(host_client, new_email())
    with host_client.websocket_connect("/echo") as socket:
        socket.send_text(tokens["access_token"])
        socket.send_text("hello")
        socket.receive_text()
        logout(host_client, tokens)
        socket.send_text("hello")
        assert code_after_close(socket) == 4401


@only_in_memory
def test_an_outage_closes_a_socket_with_another_code(host, host_client, monkeypatch):
    db = host("accounts.db")
    tokens = register(host_client, new_email())
    monkeypatch.setattr(db, "next_attempt", float("inf"))
    with host_client.websocket_connect("/echo") as socket:
        socket.send_text(tokens["access_token"])
        assert code_after_close(socket) == 4503


def code_after_close(socket):
    """Return the code with which the server closes the connection within 10 seconds."""
    pool = ThreadPoolExecutor(1)
    error = pool.submit(socket.receive_text).exception(timeout=10)
    pool.shutdown(wait=False)
    assert isinstance(error, WebSocketDisconnect)
    return error.code


# cookies.py


ORIGIN = {"Origin": "http://localhost:5173"}


@pytest.fixture
def cookie_client(host_client):
    """A client with the cookies of a new user."""
    credentials = {"email": new_email(), "password": PASSWORD}
    response = host_client.post("/session/register", json=credentials, headers=ORIGIN)
    assert (response.status_code, response.text) == (204, "")
    return host_client


@only_in_memory
@pytest.mark.parametrize("path", ["register", "login", "refresh", "logout"])
@pytest.mark.parametrize(
    "headers", [{}, {"Origin": "null"}, {"Origin": "http://localhost:5173.example.com"}]
)
def test_a_post_without_an_allowed_origin_is_a_403(cookie_client, path, headers):
    credentials = {"email": new_email(), "password": PASSWORD}
    response = cookie_client.post(f"/session/{path}", json=credentials, headers=headers)
    assert response.status_code == 403
    assert "Set-Cookie" not in response.headers
    assert cookie_client.get("/session").status_code == 200


@only_in_memory
def test_a_login_sets_cookies_for_the_lifetime_of_the_refresh_token(host, cookie_client):
    email = cookie_client.get("/session").json()["email"]
    credentials = {"email": email, "password": PASSWORD}
    response = cookie_client.post("/session/login", json=credentials, headers=ORIGIN)
    assert response.status_code == 204
    assert response.headers["Cache-Control"] == "no-store"
    cookies = response.headers.get_list("Set-Cookie")
    assert len(cookies) == 2
    assert all("Max-Age=604800; Path=/;" in cookie for cookie in cookies)


@only_in_memory
@pytest.mark.parametrize("path", ["refresh", "logout"])
def test_a_post_without_cookies_is_a_401(host_client, path):
    assert host_client.post(f"/session/{path}", headers=ORIGIN).status_code == 401


@only_in_memory
def test_a_route_with_cookies_can_change_the_password(host, cookie_client):
    app, auth, cookies, password = map(host, ("main", "accounts.auth", "cookies", "password"))

    @app.app.post("/session/password", status_code=204)
    def change(
        body: password.PasswordChange,
        user: cookies.CookieUser,
        network: auth.ClientNetwork,
        response: Response,
    ):
        cookies.set_cookies(response, password.change_password(body, user, network))

    body = {"current_password": PASSWORD, "new_password": NEW_PASSWORD}
    assert cookie_client.post("/session/password", json=body).status_code == 403
    assert cookie_client.post("/session/password", json=body, headers=ORIGIN).status_code == 204
    assert cookie_client.get("/session").status_code == 200


@only_in_memory
def test_the_cookies_work_for_a_web_socket_from_an_allowed_origin_only(host, cookie_client):
    app, cookie_user = host("main").app, host("cookies").CookieUser

    @app.websocket("/socket")
    async def greet(websocket: WebSocket, user: cookie_user):
        await websocket.accept()
        await websocket.send_text(user.email)

    email = cookie_client.get("/session").json()["email"]
    with cookie_client.websocket_connect("wss://testserver/socket", headers=ORIGIN) as socket:
        assert socket.receive_text() == email
    other = {"Origin": "https://example.com"}
    with (
        pytest.raises(WebSocketDisconnect),
        cookie_client.websocket_connect("wss://testserver/socket", headers=other),
    ):
        pass


@only_in_memory
def test_a_host_with_cookies_only_prepares_the_database_without_the_router(host):
    prepare_database = host("accounts.app").prepare_database
    app = FastAPI(lifespan=prepare_database)
    app.include_router(host("cookies").router)
    with TestClient(app):
        assert "email_1" in host("accounts.db").users.index_information()


# Statements of the document


@only_in_memory
def test_include_router_adds_the_lifespan_to_that_of_the_host(host):
    states = []

    @asynccontextmanager
    async def lifespan(_):
        states.append("start")
        yield
        states.append("end")

    app = FastAPI(lifespan=lifespan)
    app.include_router(host("accounts.app").router, prefix="/api")
    with TestClient(app) as client:
        assert states == ["start"]
        assert "email_1" in host("accounts.db").users.index_information()
        assert client.get("/api/auth/me").status_code == 401
    assert states == ["start", "end"]


@only_in_memory
def test_the_first_registration_in_a_mounted_application_creates_the_index(host):
    mounted, app = FastAPI(), FastAPI()
    mounted.include_router(host("accounts.app").router)
    app.mount("/api", mounted)
    users = host("accounts.db").users
    with TestClient(app, base_url="http://testserver/api/") as client:
        assert "email_1" not in users.index_information()
        client.post(
            "auth/register", json={"email": new_email(), "password": PASSWORD}
        ).raise_for_status()
        assert "email_1" in users.index_information()


@only_in_memory
@pytest.mark.parametrize("router_first", [True, False])
def test_url_for_returns_the_first_route_with_a_name(host, router_first):
    app = FastAPI()
    if router_first:
        app.include_router(host("accounts.app").router)

    @app.get("/sign-in")
    def login():
        pass

    if not router_first:
        app.include_router(host("accounts.app").router)
    assert app.url_path_for("login") == ("/auth/login" if router_first else "/sign-in")


@only_in_memory
def test_the_current_user_works_in_async_and_web_socket_routes(host, host_client):
    app, current_user = host("main").app, host("accounts.auth").CurrentUser

    @app.get("/async")
    async def show(user: current_user) -> str:
        return user.email

    @app.websocket("/socket")
    async def greet(websocket: WebSocket, user: current_user):
        await websocket.accept()
        await websocket.send_text(user.email)

    email = new_email()
    headers = bearer(register(host_client, email))
    assert host_client.get("/async", headers=headers).json() == email
    with host_client.websocket_connect("/socket", headers=headers) as socket:
        assert socket.receive_text() == email
    with (
        pytest.raises(WebSocketDenialResponse) as denied,
        host_client.websocket_connect("/socket"),
    ):
        pass
    assert denied.value.status_code == 401


@only_in_memory
def test_a_handler_of_the_host_gets_the_headers_of_an_error_and_no_input(host):
    app, errors = FastAPI(), []
    app.include_router(host("accounts.app").router)

    @app.exception_handler(HTTPException)
    def show_error(request, error):
        return JSONResponse({}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    def show_invalid_input(request, error):
        errors.extend(error.errors())
        return JSONResponse({}, 422)

    client = TestClient(app)
    assert client.get("/auth/me").headers["WWW-Authenticate"] == "Bearer"
    assert login(client, "alice").status_code == 422
    assert [error.keys() for error in errors] == [{"loc", "msg", "type"}]


@only_in_memory
@pytest.mark.parametrize("disable", [True, False])
def test_dict_config_silences_the_security_events_unless_told_otherwise(host, disable):
    logger = host("accounts.auth").logger
    others = {name: log.disabled for name, log in loggers().items()}
    config = {"version": 1} if disable else {"version": 1, "disable_existing_loggers": False}
    try:
        logging.config.dictConfig(config)
        assert logger.isEnabledFor(logging.CRITICAL) is not disable
    finally:
        for name, log in loggers().items():
            log.disabled = others[name]


def loggers():
    return {
        name: log
        for name, log in logging.root.manager.loggerDict.items()
        if isinstance(log, logging.Logger)
    }
