"""A fixture that several tests use."""

import os
import subprocess
import sys

import pytest
from test_faults import ROOT, free_port, listens, wait_until


@pytest.fixture(scope="module")
def memory_service(tmp_path_factory):
    """The address of a service in memory; no request may cause a traceback in its log."""
    port = free_port()
    settings = dict.fromkeys(["MONGO_URI", "JWT_SECRET_KEY", "CORS_ORIGINS"], "")
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port), "--no-access-log"]
    with (tmp_path_factory.mktemp("service") / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stderr=log)
        wait_until(lambda: listens(port), 30)
        yield f"http://127.0.0.1:{port}"
        process.terminate()
        process.wait(10)
        log.seek(0)
        assert "Traceback" not in log.read()
