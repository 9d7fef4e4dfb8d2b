"""Tests of the end of a service after SIGTERM while clients have open requests."""

import re
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import ROOT, UVICORN, Service, free_port, listens, new_email, start_command, wait_until

HALF_A_REQUEST = (
    b"POST /auth/login HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b'Content-Length: 60\r\n\r\n{"email": "alice@'
)


def end_with_an_open_request(process, port):
    """Return the seconds between SIGTERM and the end of the service. Half a request is open."""
    try:
        wait_until(lambda: listens(port), 30)
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            client.sendall(HALF_A_REQUEST)
            time.sleep(0.5)
            process.terminate()
            started = time.monotonic()
            log = process.communicate(timeout=20)[1]
            seconds = time.monotonic() - started
    finally:
        process.kill()
    # uvicorn logs the request that it cancels.
    assert log.count("Traceback") == log.count("CancelledError: Task cancelled") == 1
    return seconds


def test_app_py_ends_ten_seconds_after_sigterm_at_the_latest(mongod, tmp_path):
    # Port 5000 can be taken.
    port = free_port()
    for name in ("auth.py", "db.py"):
        shutil.copy(ROOT / name, tmp_path)
    code, replaced = re.subn("port=5000", f"port={port}", (ROOT / "app.py").read_text())
    assert replaced == 1
    (tmp_path / "app.py").write_text(code)
    process = start_command(mongod.uri, "app.py", folder=tmp_path)
    seconds = end_with_an_open_request(process, port)
    print(f"python app.py ended after {seconds:.1f} s")
    assert 7 < seconds < 10


@pytest.mark.parametrize("options", [(), ("--workers", "2")], ids=["one worker", "two workers"])
def test_uvicorn_ends_after_its_graceful_shutdown_timeout(mongod, options):
    port = free_port()
    limit = ("--timeout-graceful-shutdown", "2")
    process = start_command(mongod.uri, *UVICORN, "--port", str(port), *limit, *options)
    seconds = end_with_an_open_request(process, port)
    print(f"uvicorn with {options} ended after {seconds:.1f} s")
    assert 1.5 < seconds < 5


def test_a_login_in_progress_ends_before_the_service(mongod):
    service = Service(mongod.uri, "--timeout-graceful-shutdown", "8")
    email = new_email()
    service.register(email)
    with ThreadPoolExecutor(6) as pool:
        logins = [pool.submit(service.login, email) for _ in range(6)]
        time.sleep(0.15)
        service.process.terminate()
        assert {login.result().status for login in logins} == {200}
    service.stop()
