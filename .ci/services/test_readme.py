"""Tests that execute the README's bash and Python blocks. Other modules execute the rest.

TEST, the README's test command, is executed by .ci/run. The variable MONGOD contains the path of
MongoDB's binary.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pymongo
import pytest
from helpers import Mongod

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
MODULES = ("app.py", "auth.py", "db.py")
KEY = "a key for the tests, longer than 32 bytes"
ALICE = {"email": "alice@example.com", "password": "MyS3cret@1"}
# An empty variable hides the one in .env.
IN_MEMORY = dict.fromkeys(["MONGO_URI", "MONGO_DB_NAME", "JWT_SECRET_KEY", "CORS_ORIGINS"], "")


def find_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


# A block that is added to the README has to be executed here too.
RUN, CURL, TEST, PACKAGE = find_blocks("bash")
HOST, OPTIONAL, SET_PASSWORD, HOST_CONFTEST, HOST_TEST, CONVERT, OPERATE_FIRST, OPERATE = (
    find_blocks("python")
)


@contextlib.contextmanager
def service(command, folder, port, environment):
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=folder, env=environment, start_new_session=True
    )
    try:
        for _ in range(1200):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            assert process.poll() is None
            time.sleep(0.1)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(10)


def request(url, body=None, token=None, method=None, **headers):
    headers |= {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    data = json.dumps(body).encode() if body else None
    message = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(message, timeout=30) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


@pytest.fixture
def mongod(tmp_path):
    mongod = Mongod(tmp_path / "data")
    yield mongod
    mongod.kill()


def test_the_curl_commands_print_what_the_readme_shows():
    with service(RUN, ROOT, 5000, os.environ | IN_MEMORY):
        printed = subprocess.check_output(["bash", "-euo", "pipefail", "-c", CURL], text=True)
    expected = re.findall(r"^# → (.*)$", CURL, re.MULTILINE)
    lines = printed.splitlines()
    assert len(lines) == len(expected) == 6
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(re.escape(pattern).replace("…", ".+"), line)


@pytest.fixture
def project(tmp_path):
    """A project with modules of its own and the README's package and example."""
    (tmp_path / "auth-jwt").symlink_to(ROOT)
    project = tmp_path / "project"
    project.mkdir()
    for name in MODULES:
        (project / name).write_text('raise RuntimeError("not the module of the package")\n')
    subprocess.run(["bash", "-euo", "pipefail", "-c", PACKAGE], cwd=project, check=True)
    (project / "main.py").write_text(HOST + OPTIONAL + SET_PASSWORD)
    (project / "conftest.py").write_text(HOST_CONFTEST)
    # The second module registers the same user again.
    (project / "test_main.py").write_text(HOST_TEST)
    (project / "test_more.py").write_text(HOST_TEST)
    return project


def test_the_package_differs_only_in_the_imports_of_its_modules(project):
    names = {path.name for path in (project / "accounts").iterdir()}
    assert names == {"__init__.py", *MODULES}
    changed = {}
    for name in MODULES:
        before = (ROOT / name).read_text().splitlines()
        after = (project / "accounts" / name).read_text().splitlines()
        changed[name] = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    auth, db = (("import auth", "from . import auth"), ("import db", "from . import db"))
    assert changed == {"app.py": [auth, db], "auth.py": [db], "db.py": []}


@contextlib.contextmanager
def host_service(project, environment):
    command = f"exec {sys.executable} -m uvicorn main:app --port 5001"
    with service(command, project, 5001, environment):
        yield "http://127.0.0.1:5001"


@pytest.fixture
def host_environment(project, mongod):
    (project / ".env").write_text(f"MONGO_URI={mongod.uri}\nJWT_SECRET_KEY={KEY}\n")
    # The host has settings of its own.
    environment = {name: value for name, value in os.environ.items() if name not in IN_MEMORY}
    return environment | {"CORS_ORIGINS": '["http://localhost:5173"]'}


def test_the_tests_of_the_example_do_not_touch_the_database(project, mongod, host_environment):
    with pymongo.MongoClient(mongod.uri) as client:
        users = client["auth_db"]["users"]
        users.insert_one({"_id": 1, "email": "host@example.com"})
        command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"]
        subprocess.run(command, cwd=project, env=host_environment, check=True)
        assert list(users.find()) == [{"_id": 1, "email": "host@example.com"}]
        assert client.list_database_names() == ["admin", "auth_db", "config", "local"]


def test_the_example_works_in_a_project_with_its_own_modules(project, mongod, host_environment):
    with host_service(project, host_environment) as url:
        status, _, body = request(f"{url}/auth/register", ALICE)
        assert status == 201
        token = json.loads(body)["access_token"]
        status, headers, body = request(f"{url}/mine", token=token, Origin="http://localhost:5173")
        assert (status, json.loads(body)) == (200, {"owner": ALICE["email"]})
        assert headers["Access-Control-Allow-Origin"] == "http://localhost:5173"
        assert request(f"{url}/mine", token="x")[0] == 401
        assert request(f"{url}/auth/register", ALICE)[0] == 409
        paths = json.loads(request(f"{url}/openapi.json")[2])["paths"]
        assert paths["/auth/login"]["post"]["operationId"] == "login"
    with pymongo.MongoClient(mongod.uri) as client:
        assert client["auth_db"]["users"].count_documents({"email": ALICE["email"]}) == 1


def test_the_optional_user_allows_anonymous_requests_only(project, host_environment):
    with host_service(project, host_environment) as url:
        token = json.loads(request(f"{url}/auth/register", ALICE)[2])["access_token"]
        with urllib.request.urlopen(f"{url}/greeting") as response:
            assert json.load(response) == {"greeting": "Hello"}
        status, _, body = request(f"{url}/greeting", token=token)
        assert (status, json.loads(body)) == (200, {"greeting": f"Hello {ALICE['email']}"})
        assert request(f"{url}/greeting", token="x")[0] == 401


def test_the_route_that_sets_a_password_ends_all_sessions(project, host_environment):
    with host_service(project, host_environment) as url:
        token = json.loads(request(f"{url}/auth/register", ALICE)[2])["access_token"]

        def put_password(password):
            return request(f"{url}/password", {"password": password}, token, method="PUT")

        status, _, body = put_password("hunter2")
        assert status == 422
        assert b"hunter2" not in body
        assert put_password("N3w-Passw0rd")[0] == 204
        assert request(f"{url}/mine", token=token)[0] == 401
        assert request(f"{url}/auth/login", ALICE)[0] == 401
        new_credentials = ALICE | {"password": "N3w-Passw0rd"}
        assert request(f"{url}/auth/login", new_credentials)[0] == 200


# Commands for operators

OPERATIONS = dict(re.findall(r"^# (.*)\n((?:[^#\n].*\n)+)", OPERATE, re.MULTILINE))


@pytest.fixture
def operate(mongod):
    """A running service, the tokens of its user, and a function that runs a command."""
    settings = IN_MEMORY | {"MONGO_URI": mongod.uri, "JWT_SECRET_KEY": KEY}
    command = f"exec {sys.executable} -m uvicorn app:app --port 5001"
    with service(command, ROOT, 5001, os.environ | settings):
        url = "http://127.0.0.1:5001/auth"
        tokens = json.loads(request(f"{url}/register", ALICE)[2])

        def run(*descriptions):
            commands = "".join(OPERATIONS[description] for description in descriptions)
            return subprocess.check_output(
                [sys.executable, "-c", OPERATE_FIRST + commands],
                cwd=ROOT,
                env=os.environ | settings,
                timeout=60,
                text=True,
            )

        yield url, tokens["access_token"], run


def test_each_command_for_operators_is_tested():
    assert list(OPERATIONS) == [
        "Set a new password and end all sessions of the user.",
        "End all sessions of the user.",
        "End all sessions of all users.",
        "Disable the user. A login is then a 401, as for a wrong password.",
        "Enable the user again.",
        "Allow logins again after a 429.",
        "Delete the user.",
        "List who is logged in. Expired sessions stay until later logins remove them.",
    ]


def test_an_operator_can_set_a_password(operate):
    url, token, run = operate
    run("Set a new password and end all sessions of the user.")
    assert request(f"{url}/me", token=token)[0] == 401
    assert request(f"{url}/login", ALICE)[0] == 401
    assert request(f"{url}/login", ALICE | {"password": "N3w@password"})[0] == 200


@pytest.mark.parametrize(
    "description", ["End all sessions of the user.", "End all sessions of all users."]
)
def test_an_operator_can_end_sessions(operate, description):
    url, token, run = operate
    assert request(f"{url}/me", token=token)[0] == 200
    run(description)
    assert request(f"{url}/me", token=token)[0] == 401
    assert request(f"{url}/login", ALICE)[0] == 200


def test_an_operator_can_disable_and_enable_a_user(operate):
    url, token, run = operate
    run("Disable the user. A login is then a 401, as for a wrong password.")
    assert request(f"{url}/me", token=token)[0] == 401
    assert request(f"{url}/login", ALICE)[0] == 401
    assert request(f"{url}/register", ALICE)[0] == 409
    run("Enable the user again.", "Allow logins again after a 429.")
    assert request(f"{url}/login", ALICE)[0] == 200


def test_an_operator_can_allow_logins_again(operate):
    url, _, run = operate
    wrong = ALICE | {"password": "wrong"}
    assert [request(f"{url}/login", wrong)[0] for _ in range(6)] == [401] * 5 + [429]
    run("Allow logins again after a 429.")
    assert request(f"{url}/login", ALICE)[0] == 200


def test_an_operator_can_list_and_delete_users(operate):
    url, token, run = operate
    listing = "List who is logged in. Expired sessions stay until later logins remove them."
    assert run(listing) == f"['{ALICE['email']}']\n"
    run("Delete the user.")
    assert run(listing) == "[]\n"
    assert request(f"{url}/me", token=token)[0] == 401
    assert request(f"{url}/register", ALICE)[0] == 201


def test_emails_of_an_existing_collection_can_be_converted(operate, mongod):
    url, _, _ = operate
    with pymongo.MongoClient(mongod.uri) as client:
        users = client["auth_db"]["users"]
        # An upper-case, decomposed local part and a domain in Punycode.
        users.update_one({}, {"$set": {"email": "Zoe\u0308@XN--BCHER-KVA.example.com"}})
    email = "zo\u00eb@b\u00fccher.example.com"
    assert request(f"{url}/login", ALICE | {"email": email})[0] == 401
    settings = {"MONGO_URI": mongod.uri, "JWT_SECRET_KEY": KEY}
    environment = os.environ | IN_MEMORY | settings
    subprocess.run([sys.executable, "-c", CONVERT], cwd=ROOT, env=environment, check=True)
    assert request(f"{url}/login", ALICE | {"email": email})[0] == 200


def test_settings_can_be_checked_without_a_start():
    check = re.search(r'`\.venv/bin/python -c "(import app; .*?)"`', README)[1]
    environment = os.environ | IN_MEMORY | {"CORS_ORIGINS": "s3cret"}
    command = [sys.executable, "-c", check]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 3
    assert "CORS_ORIGINS" in process.stderr
