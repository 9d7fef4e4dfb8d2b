"""Tests that run the README's own commands and code."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RUN, CURL, TEST = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[:3]
PYTHON = re.search(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[1]
# An empty variable hides the one in .env.
ENVIRONMENT = os.environ | dict.fromkeys(["MONGO_URI", "JWT_SECRET_KEY", "CORS_ORIGINS"], "")


@contextlib.contextmanager
def service(command, folder, port):
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=folder, env=ENVIRONMENT, start_new_session=True
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


def request(url, body=None, token=None):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    data = json.dumps(body).encode() if body else None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_curl_commands_print_what_the_readme_shows():
    with service(RUN, ROOT, 5000):
        printed = subprocess.check_output(["bash", "-euo", "pipefail", "-c", CURL], text=True)
    expected = re.findall(r"^# → (.*)$", CURL, re.MULTILINE)
    lines = printed.splitlines()
    assert len(lines) == len(expected) == 6
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(re.escape(pattern).replace("…", ".+"), line)


@pytest.mark.parametrize("name", ["app", "main"])
def test_the_python_example_works_in_a_project_with_its_own_app(tmp_path, name):
    for module in ("auth.py", "db.py"):
        shutil.copy(ROOT / module, tmp_path)
    shutil.copy(ROOT / "app.py", tmp_path / "auth_routes.py")
    (tmp_path / f"{name}.py").write_text(PYTHON)
    command = f"exec {ROOT}/.venv/bin/uvicorn {name}:app --port 5001"
    with service(command, tmp_path, 5001):
        url = "http://127.0.0.1:5001"
        alice = {"email": "alice@example.com", "password": "MyS3cret@1"}
        status, tokens = request(f"{url}/auth/register", alice)
        assert status == 201
        expected = (200, {"owner": "alice@example.com"})
        assert request(f"{url}/mine", token=tokens["access_token"]) == expected
        assert request(f"{url}/mine", token="x")[0] == 401
        assert request(f"{url}/auth/register", alice)[0] == 409
