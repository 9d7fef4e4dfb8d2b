"""Tests that execute the README's bash, Python and JavaScript blocks.

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
HOST, HOST_TEST = find_blocks("python")
[FRONT_END] = find_blocks("javascript")


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


def request(url, body=None, token=None, **headers):
    headers |= {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    data = json.dumps(body).encode() if body else None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as response:
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


def test_the_front_end_module_refreshes_once_and_survives_outages(mongod, tmp_path):
    assert len(FRONT_END.splitlines()) <= 40
    script = tmp_path / "front_end.mjs"
    script.write_text(FRONT_END + (ROOT / ".ci/front_end.mjs").read_text())
    # With a known key, the test can sign an expired access token.
    settings = IN_MEMORY | {"MONGO_URI": mongod.uri, "JWT_SECRET_KEY": KEY}
    with service(RUN, ROOT, 5000, os.environ | settings):
        variables = {"KEY": KEY, "EMAIL": ALICE["email"]}
        subprocess.run([BIN / "node", script], env=os.environ | variables, check=True, timeout=120)


@pytest.fixture
def project(tmp_path):
    """A project with modules of its own and the README's package and example."""
    (tmp_path / "auth-jwt").symlink_to(ROOT)
    project = tmp_path / "project"
    project.mkdir()
    for name in MODULES:
        (project / name).write_text('raise RuntimeError("not the module of the package")\n')
    subprocess.run(["bash", "-euo", "pipefail", "-c", PACKAGE], cwd=project, check=True)
    (project / "main.py").write_text(HOST)
    (project / "test_main.py").write_text(HOST_TEST)
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


def test_the_example_and_its_test_work_in_a_project_with_its_own_modules(project, mongod):
    (project / ".env").write_text(f"MONGO_URI={mongod.uri}\nJWT_SECRET_KEY={KEY}\n")
    environment = {name: value for name, value in os.environ.items() if name not in IN_MEMORY}
    with pymongo.MongoClient(mongod.uri) as client:
        users = client["auth_db"]["users"]
        users.insert_one({"_id": 1, "email": "host@example.com"})

        for _ in range(2):
            command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "test_main.py"]
            subprocess.run(command, cwd=project, env=environment, check=True)
            assert list(users.find()) == [{"_id": 1, "email": "host@example.com"}]
            assert client.list_database_names() == ["admin", "auth_db", "config", "local"]

        command = f"exec {sys.executable} -m uvicorn main:app --port 5001"
        with service(command, project, 5001, environment):
            url = "http://127.0.0.1:5001"
            status, _, body = request(f"{url}/auth/register", ALICE)
            assert status == 201
            token = json.loads(body)["access_token"]
            status, headers, body = request(
                f"{url}/mine", token=token, Origin="http://localhost:5173"
            )
            assert (status, json.loads(body)) == (200, {"owner": ALICE["email"]})
            assert headers["Access-Control-Allow-Origin"] == "http://localhost:5173"
            assert request(f"{url}/mine", token="x")[0] == 401
            assert request(f"{url}/auth/register", ALICE)[0] == 409
            paths = json.loads(request(f"{url}/openapi.json")[2])["paths"]
            assert paths["/auth/login"]["post"]["operationId"] == "login"
        assert users.count_documents({"email": ALICE["email"]}) == 1
