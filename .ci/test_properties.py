"""Property tests that schemathesis derives from the service's OpenAPI document."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def service(tmp_path):
    """The address of a service in memory; no request may cause a traceback in its log."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    settings = dict.fromkeys(["MONGO_URI", "JWT_SECRET_KEY", "CORS_ORIGINS"], "")
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port), "--no-access-log"]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stderr=log)
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        process.terminate()
        process.wait(10)
        log.seek(0)
        assert "Traceback" not in log.read()


def test_all_requests_get_a_documented_response(service, tmp_path):
    body = json.dumps({"email": "user@example.com", "password": "MyS3cret@1"}).encode()
    headers = {"Content-Type": "application/json"}
    register = urllib.request.Request(f"{service}/auth/register", body, headers)
    with urllib.request.urlopen(register) as response:
        access_token = json.load(response)["access_token"]
    command = ["schemathesis", "run", f"{service}/openapi.json", "--no-color"]
    command += ["--header", f"Authorization: Bearer {access_token}"]
    command += ["--phases", "examples,coverage,fuzzing,stateful", "--continue-on-failure"]
    command += ["--max-examples", "40", "--max-time", "40", "--report-dir", str(tmp_path)]
    # JSON Schema cannot describe all rules for a password.
    command += ["--exclude-checks", "positive_data_acceptance"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    print(result.stdout)
    assert result.returncode == 0
