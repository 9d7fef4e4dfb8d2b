"""Tests of the hash queue: fairness, overload, damaged hashes and freezes."""

import json
import multiprocessing
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from threading import Barrier

import anyio.to_thread
import pytest
from argon2 import PasswordHasher
from argon2.exceptions import HashingError, VerificationError, VerifyMismatchError
from argon2.low_level import error_to_str, lib
from conftest import FailingCollection, wait_until
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from pymongo.errors import ServerSelectionTimeoutError

import app
import auth
import db
from test_app import (
    ADDRESS,
    CHEAP_HASHER,
    PASSWORD,
    TEST_MONGO_URI,
    client_at,
    login,
    me,
    refresh,
    register,
    stored_user,
)

REJECTION_DELAY = app.REJECTION_DELAY
ROUTES = ["register", "login"]
# A network that holds 8 of the 16 places gets no other one.
FULL_FOR_CLIENT = [ADDRESS] * 8


def is_overloaded(response):
    expected = {"detail": "The service is overloaded; try again"}
    retry_after = response.headers.get("Retry-After")
    return (response.status_code, response.json(), retry_after) == (503, expected, "1")


# Fairness


def login_from(client, address, times, pool):
    """Start logins from an address, and wait until each holds a place or was rejected."""
    other_client = client_at(client, address)
    before = len(auth.hash_queue)
    logins = [
        pool.submit(login, other_client, f"{uuid.uuid4().hex}@example.com") for _ in range(times)
    ]
    wait_until(lambda: sum(map(is_done, logins)) + len(auth.hash_queue) - before == times)
    return logins


def is_done(request):
    return request.done()


def accepted(logins):
    """Return how many of the logins got a place. The others were rejected."""
    responses = [login.result() for login in logins]
    places = [response.status_code for response in responses].count(401)
    assert places + sum(map(is_overloaded, responses)) == len(responses)
    return places


def test_a_network_gets_at_most_half_of_the_free_places(client, blocked_hasher):
    with ThreadPoolExecutor(40) as pool:
        addresses = ["192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4", "192.0.2.5"]
        logins = [login_from(client, address, 10, pool) for address in addresses[:3]]
        logins += [login_from(client, address, 1, pool) for address in addresses[3:]]
        logins.append(login_from(client, addresses[0], 1, pool))
        blocked_hasher.unblock.set()
        assert [accepted(each) for each in logins] == [8, 4, 2, 1, 1, 0]
    assert auth.hash_queue == []


def test_the_addresses_of_an_ipv6_network_share_their_places(client, blocked_hasher):
    with ThreadPoolExecutor(40) as pool:
        logins = [
            login_from(client, "2001:db8:0:1::1", 10, pool),
            login_from(client, "2001:db8:0:1:ffff::2", 1, pool),
            login_from(client, "2001:db8::1", 1, pool),
        ]
        blocked_hasher.unblock.set()
        assert [accepted(each) for each in logins] == [8, 0, 1]


def test_ipv4_mapped_addresses_do_not_share_places(client, blocked_hasher):
    with ThreadPoolExecutor(40) as pool:
        logins = [
            login_from(client, "::ffff:192.0.2.1", 10, pool),
            login_from(client, "192.0.2.1", 1, pool),
            login_from(client, "::ffff:192.0.2.2", 1, pool),
        ]
        blocked_hasher.unblock.set()
        assert [accepted(each) for each in logins] == [8, 0, 1]


def test_a_request_without_a_client_address_is_accepted(client, tokens, email):
    anonymous_client = client_at(client, ADDRESS)
    anonymous_client._transport.client = None
    assert login(anonymous_client, email).status_code == 200


def test_requests_without_a_valid_client_address_share_their_places(client, monkeypatch):
    monkeypatch.setattr(auth, "hash_queue", ["unknown"] * 8)
    anonymous_client = client_at(client, ADDRESS)
    anonymous_client._transport.client = None
    for unknown_client in (anonymous_client, client_at(client, "host.example")):
        assert is_overloaded(login(unknown_client, "alice@example.com"))


def test_simultaneous_requests_never_get_more_places_than_their_share(frequent_thread_switches):
    all_have_tried = Barrier(16)

    def try_to_hold_a_place(_):
        try:
            with auth.place_in_hash_queue(ADDRESS):
                all_have_tried.wait(10)
                return True
        except auth.Overloaded:
            all_have_tried.wait(10)
            return False

    with ThreadPoolExecutor(16) as pool:
        for _ in range(100):
            assert sum(pool.map(try_to_hold_a_place, range(16))) == 8
    assert auth.hash_queue == []


# Rejections


@pytest.mark.parametrize("route", ROUTES)
def test_a_rejected_request_uses_no_database_and_others_are_not_affected(
    client, tokens, email, route, monkeypatch
):
    monkeypatch.setattr(auth, "hash_queue", FULL_FOR_CLIENT)
    with monkeypatch.context() as patch:
        patch.setattr(db, "users", None)
        response = client.post(f"/auth/{route}", json={"email": email, "password": PASSWORD})
    assert is_overloaded(response)
    assert me(client, tokens["access_token"]).status_code == 200
    assert refresh(client, tokens["refresh_token"]).status_code == 200
    other_client = client_at(client, "192.0.2.1")
    assert login(other_client, email).status_code == 200


def set_threads(client, number):
    """Set the size of the thread pool in which FastAPI runs the routes."""

    async def set_total_tokens():
        anyio.to_thread.current_default_thread_limiter().total_tokens = number

    client.portal.call(set_total_tokens)


@contextmanager
def threads(client, number):
    set_threads(client, number)
    try:
        yield
    finally:
        set_threads(client, 40)


def test_a_rejection_takes_half_a_second_and_no_thread(client, tokens, monkeypatch):
    monkeypatch.setattr(app, "REJECTION_DELAY", REJECTION_DELAY)
    monkeypatch.setattr(auth, "hash_queue", FULL_FOR_CLIENT)
    others = []
    with threads(client, 1), ThreadPoolExecutor(1) as pool:
        rejected = pool.submit(login, client, "alice@example.com")
        while not rejected.done() and len(others) < 1000:
            others.append(me(client, tokens["access_token"]).status_code)
    assert is_overloaded(rejected.result())
    assert timedelta(seconds=0.5) < rejected.result().elapsed < timedelta(seconds=5)
    assert others[:10] == [200] * 10


@pytest.mark.parametrize("route", ROUTES)
def test_a_refused_body_does_not_wait_for_a_place(client, route, blocked_hasher):
    with ThreadPoolExecutor(8) as pool:
        login_from(client, "192.0.2.1", 8, pool)
        response = client_at(client, "192.0.2.1").post(f"/auth/{route}", json={"email": "x"})
        assert response.status_code == 422
        assert len(auth.hash_queue) == 8
        blocked_hasher.unblock.set()


# Release of places


def test_a_place_is_released_after_each_response(client, tokens, email, monkeypatch):
    responses = [login(client, email), login(client, email, "wrong"), register(client, email)]
    responses.append(client.post("/auth/login", json={}))
    with monkeypatch.context() as patch:
        patch.setattr(auth, "hash_queue", ["192.0.2.1"] * 16)
        responses.append(login(client, email))
        assert auth.hash_queue == ["192.0.2.1"] * 16
    with monkeypatch.context() as patch:
        patch.setattr(db, "users", FailingCollection(ServerSelectionTimeoutError()))
        responses.append(login(client, email))
    assert [response.status_code for response in responses] == [200, 401, 409, 422, 503, 503]
    assert auth.hash_queue == []


def test_a_place_is_released_after_an_unexpected_error(client, email, monkeypatch):
    def fail(email):
        assert auth.hash_queue == [ADDRESS]
        raise KeyError("unexpected")

    monkeypatch.setattr(db, "find_user_by_email", fail)
    with pytest.raises(KeyError, match="unexpected"):
        login(client, email)
    assert auth.hash_queue == []


@pytest.mark.parametrize("query", ["create_user", "add_session"])
def test_no_place_is_held_while_a_user_or_session_is_stored(client, email, query, monkeypatch):
    store, queues = getattr(db, query), []

    def record_queue_and_store(*args):
        queues.append(list(auth.hash_queue))
        return store(*args)

    monkeypatch.setattr(db, query, record_queue_and_store)
    assert register(client, email).status_code == 201
    assert login(client, email).status_code == 200
    assert queues == [[]]


# Two threads


@pytest.mark.parametrize(("route", "status"), [("login", 200), ("register", 409)])
def test_at_most_two_passwords_are_hashed_at_the_same_time(
    client, tokens, email, route, status, blocked_hasher
):
    # A login also hashes, because the hash of this user has other parameters.
    old_hash = PasswordHasher(time_cost=2, memory_cost=8, parallelism=1).hash(PASSWORD)
    db.users.update_one({"email": email}, {"$set": {"password_hash": old_hash}})
    body = {"email": email, "password": PASSWORD}
    with ThreadPoolExecutor(8) as pool:
        requests = [pool.submit(client.post, f"/auth/{route}", json=body) for _ in range(8)]
        wait_until(lambda: len(auth.hash_queue) == 8 and blocked_hasher.running >= 2)
        blocked_hasher.unblock.set()
        assert {request.result().status_code for request in requests} == {status}
    assert blocked_hasher.peak == 2


# A third hash would start within this time.
TIME_TO_START = 0.2


def test_two_event_loops_share_the_two_threads(client, email, blocked_hasher):
    with TestClient(app.app) as one, TestClient(app.app) as two, ThreadPoolExecutor(8) as pool:
        clients = [client_at(loop, f"192.0.2.{i}") for i in range(4) for loop in (one, two)]
        logins = [pool.submit(login, client, f"{i}-{email}") for i, client in enumerate(clients)]
        wait_until(lambda: len(auth.hash_queue) == 8 and blocked_hasher.running >= 2)
        time.sleep(TIME_TO_START)
        blocked_hasher.unblock.set()
        assert [login.result().status_code for login in logins] == [401] * 8
    assert blocked_hasher.peak == 2
    assert auth.hash_queue == []


def start_login(client, address):
    """Start a login from an address. Return a future whose cancellation cancels the request."""
    body = json.dumps({"email": "alice@example.com", "password": PASSWORD}).encode()

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        pass

    scope = {"type": "http", "method": "POST", "path": "/auth/login", "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "client": (address, 50000)}
    return client.portal.start_task_soon(app.app, scope, receive, send)


def test_a_cancelled_login_does_not_let_a_third_hash_run(client, blocked_hasher):
    cancelled = [start_login(client, "192.0.2.1") for _ in range(4)]
    wait_until(lambda: len(auth.hash_queue) == 4 and blocked_hasher.running == 2)
    for request in cancelled:
        request.cancel()
    others = [start_login(client, "192.0.2.2") for _ in range(4)]
    wait_until(lambda: auth.hash_queue == ["192.0.2.1"] * 4 + ["192.0.2.2"] * 4)
    time.sleep(TIME_TO_START)
    blocked_hasher.unblock.set()
    for request in others:
        request.result(10)
    wait_until(lambda: auth.hash_queue == [])
    assert blocked_hasher.peak == 2


# Lack of memory or threads


class FailingHasher(PasswordHasher):
    """A hasher that raises these errors."""

    def __init__(self, *, hash_error=None, verify_error=None):
        super().__init__(time_cost=1, memory_cost=8, parallelism=1)
        self.hash_error, self.verify_error = hash_error, verify_error

    def hash(self, password):
        if self.hash_error:
            raise self.hash_error
        return super().hash(password)

    def verify(self, hash, password):
        if self.verify_error:
            raise self.verify_error
        return super().verify(hash, password)


MEMORY_MESSAGE = error_to_str(lib.ARGON2_MEMORY_ALLOCATION_ERROR)
THREAD_MESSAGE = error_to_str(lib.ARGON2_THREAD_FAIL)


@pytest.mark.parametrize(
    "error",
    [
        VerificationError(MEMORY_MESSAGE),
        VerificationError(THREAD_MESSAGE),
        MemoryError(),
        RuntimeError("can't start new thread"),
    ],
    ids=repr,
)
def test_a_password_that_cannot_be_verified_is_503_and_no_failed_login(
    client, tokens, email, events, monkeypatch, error
):
    with monkeypatch.context() as patch:
        patch.setattr(auth, "hasher", FailingHasher(verify_error=error))
        responses = [login(client, email) for _ in range(6)] + [login(client, "unknown-" + email)]
    assert all(map(is_overloaded, responses))
    assert events() == [("ERROR", f"The service is overloaded: {error!r}")] * 7
    assert "login_failures" not in stored_user(tokens)
    assert auth.hash_queue == []
    assert login(client, email).status_code == 200


@pytest.mark.parametrize(
    "error",
    [HashingError(MEMORY_MESSAGE), MemoryError(), RuntimeError("can't start new thread")],
    ids=repr,
)
def test_a_password_that_cannot_be_hashed_is_503(client, email, events, monkeypatch, error):
    with monkeypatch.context() as patch:
        patch.setattr(auth, "hasher", FailingHasher(hash_error=error))
        assert is_overloaded(register(client, email))
    assert events() == [("ERROR", f"The service is overloaded: {error!r}")]
    assert auth.hash_queue == []
    assert register(client, email).status_code == 201


def test_an_older_hash_that_cannot_be_replaced_for_lack_of_memory_is_503(
    client, tokens, email, monkeypatch
):
    old_hash = PasswordHasher(time_cost=2, memory_cost=8, parallelism=1).hash(PASSWORD)
    db.users.update_one({"email": email}, {"$set": {"password_hash": old_hash}})
    with monkeypatch.context() as patch:
        patch.setattr(auth, "hasher", FailingHasher(hash_error=HashingError(MEMORY_MESSAGE)))
        assert is_overloaded(login(client, email))
    user = stored_user(tokens)
    assert user["password_hash"] == old_hash
    assert "login_failures" not in user
    assert login(client, email).status_code == 200


@pytest.fixture
def no_hash_thread(monkeypatch):
    """Let the start of a hash thread fail, as at the limit of threads."""
    start = threading.Thread.start

    def start_unless_for_hashes(thread):
        if thread.name.startswith("hash"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(auth, "hash_threads", ThreadPoolExecutor(2, "hash"))
    monkeypatch.setattr(threading.Thread, "start", start_unless_for_hashes)


@pytest.mark.parametrize("send", [register, login])
def test_a_request_for_which_no_hash_thread_can_be_started_is_503(
    client, tokens, email, events, no_hash_thread, send
):
    events().clear()
    assert is_overloaded(send(client, email))
    error = RuntimeError("can't start new thread")
    assert events()[-1] == ("ERROR", f"The service is overloaded: {error!r}")
    assert "login_failures" not in stored_user(tokens)
    assert auth.hash_queue == []


def test_an_unexpected_error_outside_hashing_keeps_its_traceback_and_cause(
    client, tokens, monkeypatch
):
    def fail(*args):
        raise RuntimeError("unexpected") from KeyError("cause")

    monkeypatch.setattr(db, "find_user_by_session", fail)
    with pytest.raises(RuntimeError, match="unexpected") as raised:
        me(client, tokens["access_token"])
    assert raised.traceback[-1].name == "fail"
    assert isinstance(raised.value.__cause__, KeyError)


# Damaged hashes


@pytest.mark.parametrize("field", [1, 2, 3, 4, 5])
def test_a_truncated_password_hash_is_a_wrong_password(client, tokens, email, field):
    parts = stored_user(tokens)["password_hash"].split("$")
    parts[field] = parts[field][:-2]
    db.users.update_one({"email": email}, {"$set": {"password_hash": "$".join(parts)}})
    assert login(client, email).status_code == 401
    assert len(stored_user(tokens)["login_failures"]) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("argon2id", "argon2x"),
        ("v=19", "v=99"),
        ("m=8", "m=1"),
        ("t=1", "t=0"),
        ("p=1", "p=0"),
        ("p=1", "p=99999999"),
        ("m=8,", ""),
        ("$m", "$"),
    ],
)
def test_a_damaged_password_hash_is_a_wrong_password(client, tokens, email, old, new):
    damaged = stored_user(tokens)["password_hash"].replace(old, new, 1)
    db.users.update_one({"email": email}, {"$set": {"password_hash": damaged}})
    assert login(client, email).status_code == 401


# Apps that use the hash queue in routes of their own


@pytest.mark.parametrize(
    "error", [HTTPException(401, "Not you"), VerifyMismatchError(), MemoryError(), RuntimeError()]
)
def test_an_error_of_the_caller_passes_through_the_queue_unchanged(error):
    with pytest.raises(type(error)) as raised, auth.place_in_hash_queue(ADDRESS):
        raise error
    assert raised.value is error
    assert auth.hash_queue == []


def test_a_wrong_password_in_a_route_of_another_app_keeps_its_own_response(cheap_hasher):
    host = FastAPI()
    password_hash = CHEAP_HASHER.hash(PASSWORD)

    @host.exception_handler(VerifyMismatchError)
    def reject(request, error):
        return JSONResponse({"detail": "Not you"}, 401)

    @host.post("/confirm")
    def confirm(network: auth.ClientNetwork, password: str):
        with auth.place_in_hash_queue(network):
            if password == "own hasher":
                CHEAP_HASHER.verify(password_hash, password)
            if not auth.verify_password(password_hash, password):
                raise HTTPException(401, "Not you")

    client = TestClient(host)
    for password in ("own hasher", "wrong"):
        response = client.post("/confirm", params={"password": password})
        assert (response.status_code, response.json()) == (401, {"detail": "Not you"})
    assert client.post("/confirm", params={"password": PASSWORD}).status_code == 200


def test_a_nested_use_takes_two_places():
    with auth.place_in_hash_queue(ADDRESS), auth.place_in_hash_queue(ADDRESS):
        assert auth.hash_queue == [ADDRESS] * 2
    assert auth.hash_queue == []


def test_a_nested_use_beyond_the_share_of_the_network_is_rejected(monkeypatch):
    monkeypatch.setattr(auth, "hash_queue", [ADDRESS] * 7)
    with (
        auth.place_in_hash_queue(ADDRESS),
        pytest.raises(auth.Overloaded),
        auth.place_in_hash_queue(ADDRESS),
    ):
        pass
    assert auth.hash_queue == [ADDRESS] * 7


# Freezes. The requests are sent in another process, which a freeze cannot outlive.

FREEZE_DEADLINE = 40  # seconds


def run_in_new_process(function, *args):
    """Run the function of this file in a new process. Its errors are printed."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join(FREEZE_DEADLINE)
    was_frozen = process.exitcode is None
    process.kill()
    process.join()
    assert not was_frozen
    assert process.exitcode == 0


only_memory = pytest.mark.skipif(bool(TEST_MONGO_URI), reason="the database does not matter")


def send_at_once(client, sends, times):
    """Send each request so many times from each of five networks. Return the status codes."""
    clients = [TestClient(client.app, client=(f"192.0.2.{i}", 50000)) for i in range(5)]
    for other_client in clients:
        other_client.portal = client.portal
    calls = [(send, other) for _ in range(times) for other in clients for send in sends]
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call[0](call[1]).status_code, calls))


def login_alice(client):
    return login(client, "alice@example.com")


def post_hash(client):
    return client.post("/hash")


def assert_service_works(client):
    tokens = login_alice(client).json()
    assert me(client, tokens["access_token"]).status_code == 200
    assert auth.hash_queue == []


def send_to_host(add_route):
    """Send logins and requests to a route of another app at the same time."""
    host = FastAPI()
    host.include_router(app.router)
    add_route(host)
    with TestClient(host) as client:
        assert register(client, "alice@example.com").status_code == 201
        statuses = send_at_once(client, [login_alice, post_hash], times=3)
        assert 200 in statuses
        assert set(statuses) <= {200, 503}
        assert_service_works(client)
        assert post_hash(client).status_code == 200


def add_async_route(host):
    @host.post("/hash")
    async def hash_in_event_loop(network: auth.ClientNetwork):
        with auth.place_in_hash_queue(network):
            await anyio.sleep(0.01)
            auth.hash_password(PASSWORD)


def add_nested_route(host):
    @host.post("/hash")
    def hash_with_two_places(network: auth.ClientNetwork):
        with auth.place_in_hash_queue(network):
            time.sleep(0.01)
            with auth.place_in_hash_queue(network):
                auth.hash_password(PASSWORD)


@only_memory
@pytest.mark.parametrize("add_route", [add_async_route, add_nested_route])
def test_a_route_of_another_app_does_not_freeze_the_process(add_route):
    run_in_new_process(send_to_host, add_route)


def login_with_threads(number):
    """Send a burst of logins to a service with this number of threads."""
    with TestClient(app.app) as client, threads(client, number):
        assert register(client, "alice@example.com").status_code == 201
        # More logins than threads.
        statuses = send_at_once(client, [login_alice], times=number // 5 + 2)
        assert 200 in statuses
        assert set(statuses) <= {200, 503}
        assert_service_works(client)


@only_memory
@pytest.mark.parametrize("number", [10, 40, 200])
def test_a_burst_of_logins_ends_with_any_number_of_threads(number):
    run_in_new_process(login_with_threads, number)
