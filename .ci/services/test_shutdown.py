"""Tests of the end of a service after SIGTERM while clients have open requests."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

from helpers import TWO_WORKERS, Service, copy_modules, new_email, statuses_of

HALF_A_REQUEST = (
    b"POST /auth/login HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b'Content-Length: 60\r\nExpect: 100-continue\r\n\r\n{"email": "alice@'
)


def end_with_an_open_request(service):
    """Return the seconds between SIGTERM and the end of the service. Half a request is open."""
    with socket.create_connection(("127.0.0.1", service.port), 5) as client:
        client.sendall(HALF_A_REQUEST)
        # The service waits for the other half.
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        service.process.terminate()
        started = time.monotonic()
        service.process.wait(60)
        seconds = time.monotonic() - started
    service.reader.join(10)
    # uvicorn logs the request that it cancels.
    assert service.log.count("Traceback") == 1
    assert service.log.count("CancelledError: Task cancelled") == 1
    return seconds


def test_app_py_ends_ten_seconds_after_sigterm_at_the_latest(tmp_path):
    copy_modules(tmp_path)
    service = Service("", script="app.py", folder=tmp_path)
    seconds = end_with_an_open_request(service)
    print(f"python app.py ended after {seconds:.1f} s")
    # Docker kills a process after ten seconds.
    assert seconds < 10


def test_workers_end_after_their_graceful_shutdown_timeout(mongod):
    service = Service(mongod.uri, "--timeout-graceful-shutdown", "1", *TWO_WORKERS)
    service.wait_for_log("startup complete", 2)
    end_with_an_open_request(service)


def test_a_login_in_progress_ends_before_the_service(mongod, service):
    email = new_email()
    service.register(email)
    queries = mongod.set_fail_point(
        "alwaysOn", failCommands=["find"], blockConnection=True, blockTimeMS=500
    )
    with ThreadPoolExecutor(6) as pool:
        logins = [pool.submit(service.login, email) for _ in range(6)]
        mongod.wait_for_fail_point(queries + 6)
        service.process.terminate()
        assert set(statuses_of(login.result() for login in logins)) == {200}
