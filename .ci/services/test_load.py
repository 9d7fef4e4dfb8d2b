"""Tests of a service that is flooded with logins or lacks memory."""

import json
import resource
import socket
import statistics
from pathlib import Path

import pytest
from helpers import (
    PASSWORD,
    REJECTION_DELAY,
    Service,
    new_email,
    repeat,
    send_at_once,
    statuses_of,
    wait_until,
)


def test_without_memory_for_a_hash_logins_and_registrations_are_503(service, users):
    email = new_email()
    service.register(email)
    process = service.process.pid
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[0])
    old_limit = resource.prlimit(process, resource.RLIMIT_AS)
    # Less than the 64 MiB of a hash.
    limit = pages * resource.getpagesize() + 32 * 1024**2
    resource.prlimit(process, resource.RLIMIT_AS, (limit, old_limit[1]))
    responses = [service.login(email), service.login(email, "wrong"), service.register(new_email())]
    resource.prlimit(process, resource.RLIMIT_AS, old_limit)
    assert statuses_of(responses) == [503, 503, 503]
    service.wait_for_log("The service is overloaded: ", 3)
    assert "login_failures" not in users.find_one({"email": email})
    assert service.login(email).status == 200


def test_aborted_logins_leave_no_place_taken(service):
    email = new_email()
    service.register(email)
    body = json.dumps({"email": email, "password": PASSWORD}).encode()
    head = f"POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    request = head.encode() + b"Content-Type: application/json\r\n\r\n" + body

    def abort_logins(client):
        source = (f"127.0.1.{client + 1}", 0)
        for _ in range(8):
            with socket.create_connection(("127.0.0.1", service.port), 5, source) as connection:
                connection.sendall(request)

    send_at_once(10, abort_logins)
    # One network can take half of the slots again.
    wait_until(
        lambda: set(statuses_of(send_at_once(8, lambda _: service.login(email)))) == {200}, 60
    )


HOST_WITH_20_THREADS = """
from contextlib import asynccontextmanager
from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI
from app import router

@asynccontextmanager
async def use_20_threads(_):
    current_default_thread_limiter().total_tokens = 20
    yield

app = FastAPI(lifespan=use_20_threads)
app.include_router(router)
"""


@pytest.fixture
def flooded_service(mongod, tmp_path):
    """A service with 20 threads, and the responses to 64 clients of one network that log in.

    The hashes of a network occupy at most 8 threads.
    """
    (tmp_path / "host.py").write_text(HOST_WITH_20_THREADS)
    service = Service(mongod.uri, "--app-dir", str(tmp_path), app="host:app")

    def log_in(_):
        return service.login("bob@example.com", source="127.0.1.1")

    with repeat(64, log_in, obey_retry_after=False) as responses:
        wait_until(lambda: 503 in statuses_of(responses), 60)
        yield service, responses
    service.stop()


def test_others_can_log_in_during_a_flood_of_logins(flooded_service):
    service, _ = flooded_service
    email = new_email()
    logins = [service.register(email, source="127.0.2.1")]
    logins += [service.login(email, source="127.0.2.1") for _ in range(3)]
    assert statuses_of(logins) == [201] + [200] * 3
    print(f"The slowest login took {max(login.seconds for login in logins):.1f} s")


def test_a_rejected_login_is_delayed_and_occupies_no_thread(flooded_service):
    service, flood = flooded_service
    rejected = [response.seconds for response in flood if response.status == 503]
    assert min(rejected) >= REJECTION_DELAY
    # It needs a thread, because the dependency that reads the token is a plain function.
    others = [service.me("malformed") for _ in range(20)]
    assert set(statuses_of(others)) == {401}
    median = statistics.median(response.seconds for response in others)
    print(f"The median of the other responses took {median:.2f} s")
    # If each of 56 rejected logins occupied one of the 12 free threads for a second, these requests
    # would wait for several of them.
    assert median < REJECTION_DELAY
