"""Tests of outages of MongoDB and of the circuit breaker."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier, BrokenBarrierError, Event
from types import SimpleNamespace

import dns.exception
import dns.resolver
import pytest
from bson.errors import InvalidBSON
from conftest import FailingCollection, in_parallel
from fastapi.testclient import TestClient
from pymongo import MongoClient
from pymongo.errors import (
    AutoReconnect,
    ConfigurationError,
    CursorNotFound,
    ExecutionTimeout,
    InvalidOperation,
    NetworkTimeout,
    OperationFailure,
    ProtocolError,
    ServerSelectionTimeoutError,
    WTimeoutError,
)

import app
import auth
import db
from test_app import (
    TEST_MONGO_URI,
    is_invalid_token,
    login,
    logout,
    me,
    refresh,
    register,
    stored_user,
)

BEGIN = ("ERROR", "MongoDB is not responding. Is it running, and is MONGO_URI correct?")
END = ("WARNING", "MongoDB is responding again.")


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock of db.py, which stands still until a test sets it."""
    clock = SimpleNamespace(time=1000.0)
    monkeypatch.setattr(db, "monotonic", lambda: clock.time)
    return clock


@pytest.fixture
def outage(monkeypatch):
    """Replace the collection with one that gets no response."""
    collection = FailingCollection(ServerSelectionTimeoutError("127.0.0.1:27017: s3cret"))
    monkeypatch.setattr(db, "users", collection)
    return collection


@pytest.fixture
def database_down(monkeypatch):
    """Replace the collection with one on a port where no server listens."""
    with MongoClient("mongodb://127.0.0.1:9", connect=False, timeoutMS=50) as server:
        monkeypatch.setattr(db, "users", server["none"]["users"])
        monkeypatch.setattr(db, "last_response", 0.0)
        yield


def is_unavailable(response):
    expected = {"detail": "The database is unavailable; try again"}
    retry_after = response.headers.get("Retry-After")
    return (response.status_code, response.json(), retry_after) == (503, expected, "2")


def is_database_error(response):
    expected = {"detail": "Internal server error"}
    has_retry_after = "Retry-After" in response.headers
    return (response.status_code, response.json(), has_retry_after) == (500, expected, False)


# Responses during an outage

REQUESTS = {
    "register": lambda client, email, tokens: register(client, "new-" + email),
    "login": lambda client, email, tokens: login(client, email),
    "me": lambda client, email, tokens: me(client, tokens["access_token"]),
    "refresh": lambda client, email, tokens: refresh(client, tokens["refresh_token"]),
    "logout": lambda client, email, tokens: logout(client, tokens["refresh_token"]),
}


@pytest.mark.parametrize("send", REQUESTS.values(), ids=REQUESTS.keys())
def test_a_request_that_needs_the_database_is_503_without_it(
    client, tokens, email, database_down, send
):
    assert is_unavailable(send(client, email, tokens))
    breaker_is_open = db.next_attempt > 0
    assert breaker_is_open
    assert is_unavailable(send(client, email, tokens))
    assert auth.hash_queue == []


def test_requests_that_need_no_database_work_without_it(client, other_user, database_down):
    assert client.post("/auth/login", json={"email": "x"}).status_code == 422
    assert is_invalid_token(me(client, "x"))
    assert is_invalid_token(refresh(client, "x"))
    assert is_invalid_token(logout(client, other_user["access_token"]))


# Which errors are an outage


def caused_by(cause, error):
    error.__cause__ = cause
    return error


DNS_ERRORS = [
    dns.resolver.NXDOMAIN(),
    dns.resolver.NoAnswer(),
    dns.resolver.NoNameservers(),
    dns.resolver.LifetimeTimeout(timeout=1, errors=[]),
]
RETRYABLE = {"errorLabels": ["RetryableWriteError"]}
OUTAGES = [
    ServerSelectionTimeoutError("s3cret"),
    AutoReconnect("s3cret"),
    NetworkTimeout("s3cret"),
    ProtocolError("s3cret"),
    ExecutionTimeout("s3cret", 50, {"codeName": "MaxTimeMSExpired"}),
    WTimeoutError("s3cret"),
    OperationFailure("s3cret", 11602, {"codeName": "InterruptedDueToReplState"} | RETRYABLE),
    # For example from mongos, or from Azure Cosmos DB. PyMongo does not retry most of them.
    *[OperationFailure("s3cret", code) for code in (6, 7, 24, 89, 112, 133, 262, 462, 9001, 16500)],
    *[caused_by(cause, ConfigurationError("s3cret")) for cause in DNS_ERRORS],
]


@pytest.mark.parametrize("error", OUTAGES, ids=lambda error: type(error).__name__)
def test_an_error_without_a_usable_response_is_503(client, other_user, events, monkeypatch, error):
    monkeypatch.setattr(db, "users", FailingCollection(error))
    assert is_unavailable(me(client, other_user["access_token"]))
    assert events() == [BEGIN]


UNAUTHORIZED = OperationFailure("s3cret", 13, {"codeName": "Unauthorized"})
DATABASE_ERRORS = [
    (UNAUTHORIZED, "Unauthorized"),
    (OperationFailure("s3cret", 13), "OperationFailure"),
    (OperationFailure("s3cret", 13, {}), "OperationFailure"),
    (OperationFailure("s3cret", 13, {"errorLabels": ["Other"]}), "OperationFailure"),
    (CursorNotFound("s3cret", 43, {"codeName": "CursorNotFound"}), "CursorNotFound"),
    (ConfigurationError("s3cret"), "ConfigurationError"),
    (caused_by(ValueError("s3cret"), ConfigurationError("s3cret")), "ConfigurationError"),
    (InvalidOperation("s3cret"), "InvalidOperation"),
    (InvalidBSON("s3cret"), "InvalidBSON"),
    (ValueError("s3cret"), "ValueError"),
]


@pytest.mark.parametrize(("error", "name"), DATABASE_ERRORS)
def test_another_error_of_mongodb_is_500_and_logged_with_its_name(
    client, other_user, events, monkeypatch, error, name
):
    monkeypatch.setattr(db, "users", FailingCollection(error))
    assert is_database_error(me(client, other_user["access_token"]))
    assert events() == [("ERROR", f"MongoDB returned an error: {name}")]


@pytest.mark.parametrize("send", REQUESTS.values(), ids=REQUESTS.keys())
def test_a_permanent_error_does_not_open_the_breaker(client, tokens, email, monkeypatch, send):
    collection = FailingCollection(UNAUTHORIZED)
    monkeypatch.setattr(db, "users", collection)
    for attempt in range(1, 4):
        assert is_database_error(send(client, email, tokens))
        assert collection.operations == attempt
    assert auth.hash_queue == []


@pytest.mark.parametrize("error", DNS_ERRORS, ids=lambda error: type(error).__name__)
def test_a_failed_dns_lookup_of_mongodb_srv_is_an_outage(
    cheap_hasher, other_user, events, monkeypatch, error
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(dns.resolver, "resolve", fail)
    with MongoClient("mongodb+srv://alice:s3cret@db.example.net", connect=False) as server:
        monkeypatch.setattr(db, "users", server["none"]["users"])
        with TestClient(app.app) as client:
            assert is_unavailable(me(client, other_user["access_token"]))
    assert [event for event in events() if event[0] == "ERROR"] == [BEGIN]


# Circuit breaker


def test_an_open_breaker_allows_one_attempt_per_second(client, other_user, clock, outage):
    attempts = []
    for _ in range(8):
        assert is_unavailable(me(client, other_user["access_token"]))
        attempts.append(outage.operations)
        clock.time += 0.5
    assert attempts == [1, 1, 2, 2, 3, 3, 4, 4]


def test_the_first_response_closes_the_breaker(client, other_user, clock, monkeypatch):
    monkeypatch.setattr(db, "next_attempt", clock.time)
    for _ in range(2):
        assert me(client, other_user["access_token"]).status_code == 200


def test_an_error_of_the_server_closes_the_breaker(client, other_user, clock, monkeypatch):
    monkeypatch.setattr(db, "next_attempt", clock.time)
    with monkeypatch.context() as patch:
        patch.setattr(db, "users", FailingCollection(UNAUTHORIZED))
        assert is_database_error(me(client, other_user["access_token"]))
    assert me(client, other_user["access_token"]).status_code == 200


def test_an_error_of_the_program_neither_opens_nor_closes_the_breaker(clock, monkeypatch):
    monkeypatch.setattr(db, "next_attempt", clock.time)
    with pytest.raises(KeyError), db.circuit_breaker():
        raise KeyError
    with pytest.raises(db.DatabaseUnavailable), db.circuit_breaker():
        pass


@pytest.mark.parametrize(
    "query",
    [
        db.create_user,
        db.find_user_by_email,
        db.find_user_by_session,
        db.replace_password_hash,
        db.record_failed_login,
        db.has_session_since,
        db.add_session,
        db.advance_session,
        db.find_session,
        db.delete_session,
    ],
)
def test_no_query_runs_while_the_breaker_is_open(query, clock, monkeypatch):
    monkeypatch.setattr(db, "next_attempt", clock.time + 1)
    with pytest.raises(db.DatabaseUnavailable):
        query()


@pytest.mark.parametrize(("seconds", "operations"), [(1.0, 2), (1.1, 1)])
def test_failures_open_the_breaker_a_second_after_the_last_response(
    client, other_user, clock, monkeypatch, seconds, operations
):
    assert me(client, other_user["access_token"]).status_code == 200
    clock.time += seconds
    collection = FailingCollection(ServerSelectionTimeoutError())
    monkeypatch.setattr(db, "users", collection)
    for _ in range(2):
        assert is_unavailable(me(client, other_user["access_token"]))
    assert collection.operations == operations


def test_a_query_from_before_the_last_response_does_not_open_the_breaker(
    client, other_user, monkeypatch
):
    monkeypatch.setattr(db, "memory_lock", nullcontext())
    reached, unblock = Event(), Event()

    def fail_late():
        reached.set()
        assert unblock.wait(10)
        raise ServerSelectionTimeoutError

    with ThreadPoolExecutor(1) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(db, "users", FailingCollection(fail_late))
            late = pool.submit(me, client, other_user["access_token"])
            assert reached.wait(10)
        assert me(client, other_user["access_token"]).status_code == 200
        unblock.set()
        assert is_unavailable(late.result())
    assert me(client, other_user["access_token"]).status_code == 200


def test_a_late_failure_does_not_postpone_the_next_attempt(client, other_user, clock, monkeypatch):
    monkeypatch.setattr(db, "memory_lock", nullcontext())

    def fail_after_half_a_second():
        clock.time += 0.5
        raise ServerSelectionTimeoutError

    collection = FailingCollection(fail_after_half_a_second)
    monkeypatch.setattr(db, "users", collection)
    monkeypatch.setattr(db, "next_attempt", clock.time)
    assert is_unavailable(me(client, other_user["access_token"]))
    clock.time += 0.5
    assert is_unavailable(me(client, other_user["access_token"]))
    assert collection.operations == 2


# The log


def test_the_beginning_and_the_end_of_an_outage_are_logged_once(
    client, other_user, clock, events, monkeypatch
):
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(db, "users", FailingCollection(ServerSelectionTimeoutError("s3cret")))
            for _ in range(4):
                clock.time += 2
                assert is_unavailable(me(client, other_user["access_token"]))
        clock.time += 2
        for _ in range(3):
            assert me(client, other_user["access_token"]).status_code == 200
    assert events() == [BEGIN, END] * 2


def test_a_first_response_is_not_logged(client, other_user, events):
    assert me(client, other_user["access_token"]).status_code == 200
    assert events() == []


# Threads


def test_only_503_and_200_are_returned_while_the_breaker_opens_and_closes(
    client, other_user, frequent_thread_switches, monkeypatch
):
    monkeypatch.setattr(db, "memory_lock", nullcontext())
    monkeypatch.setattr(db, "RETRY_INTERVAL", 0.001)
    users, failing = db.users, FailingCollection(ServerSelectionTimeoutError())
    statuses = []

    def request_often():
        for _ in range(40):
            monkeypatch.setattr(db, "users", failing if len(statuses) % 3 else users)
            statuses.append(me(client, other_user["access_token"]).status_code)

    in_parallel(request_often, 16)
    monkeypatch.setattr(db, "users", users)
    assert set(statuses) == {200, 503}


def test_a_thread_can_close_the_breaker_while_another_one_checks_it(monkeypatch):
    monkeypatch.setattr(db, "memory_lock", nullcontext())

    def close_and_return_time():
        monkeypatch.setattr(db, "next_attempt", 0.0)
        return 1000.0

    monkeypatch.setattr(db, "next_attempt", 1000.5)
    monkeypatch.setattr(db, "monotonic", close_and_return_time)
    with pytest.raises(db.DatabaseUnavailable), db.circuit_breaker():
        pass
    with db.circuit_breaker():
        pass


def test_queries_run_one_at_a_time_in_memory_and_in_parallel_on_mongodb(
    client, other_user, monkeypatch
):
    both, alone = Barrier(2), []

    def find_none():
        try:
            both.wait(10 if TEST_MONGO_URI else 0.3)
        except BrokenBarrierError:
            alone.append(True)

    monkeypatch.setattr(db, "users", FailingCollection(find_none))
    in_parallel(lambda: me(client, other_user["access_token"]), 2)
    assert bool(alone) == (not TEST_MONGO_URI)


# Start during an outage


def test_the_service_starts_without_mongodb_and_creates_the_index_later(
    email, cheap_hasher, empty_collection, clock, events, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(db, "users", FailingCollection(ServerSelectionTimeoutError()))
        with TestClient(app.app) as client:
            assert is_unavailable(register(client, email))
    clock.time += 1
    client = TestClient(app.app)
    assert [register(client, email).status_code for _ in range(2)] == [201, 409]
    assert db.users.index_information()["email_1"]["unique"]
    assert [event for event in events() if event in (BEGIN, END)] == [BEGIN, END]


def test_a_failed_login_without_the_database_is_503(client, tokens, email, monkeypatch):
    collection = FailingCollection(ServerSelectionTimeoutError())
    collection.find_one = db.users.find_one
    with monkeypatch.context() as patch:
        patch.setattr(db, "users", collection)
        assert is_unavailable(login(client, email, "wrong"))
    assert auth.hash_queue == []
    assert "login_failures" not in stored_user(tokens)
