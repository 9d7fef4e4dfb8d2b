"""A fixture that several tests use."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def memory_service(tmp_path_factory):
    """The address of a service in memory; no request may cause a traceback in its log."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    settings = dict.fromkeys(["MONGO_URI", "JWT_SECRET_KEY", "CORS_ORIGINS"], "")
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port), "--no-access-log"]
    with (tmp_path_factory.mktemp("service") / "log").open("w+") as log:
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
