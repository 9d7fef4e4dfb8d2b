"""Tests of outages of MongoDB and of its other errors."""

import math
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import dns.resolver
import pytest
from bson.errors import InvalidBSON, InvalidId
from conftest import FailingCollection, in_parallel
from fastapi import HTTPException
from fastapi.testclient import TestClient
from pydantic import ValidationError
from pymongo import MongoClient
from pymongo.errors import (
    AutoReconnect,
    ConfigurationError,
    CursorNotFound,
    ExecutionTimeout,
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

NO_RESPONSE = ServerSelectionTimeoutError("127.0.0.1:27017: s3cret")
UNAUTHORIZED = OperationFailure("s3cret", 13, {"codeName": "Unauthorized"})
END = ("WARNING", "MongoDB is responding again.")


def beginning(name="ServerSelectionTimeoutError"):
    """Return the event that an outage begins with this error."""
    hint = "Is it running, and is MONGO_URI correct?"
    return ("ERROR", f"MongoDB is not responding ({name}). {hint}")


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock of db.py, which stands still until a test sets it."""
    clock = SimpleNamespace(time=1000.0)
    monkeypatch.setattr(db, "monotonic", lambda: clock.time)
    return clock


@pytest.fixture
def fail(monkeypatch):
    """A function that replaces the collection with one that raises an error, and returns it."""

    def fail(error):
        collection = FailingCollection(error)
        monkeypatch.setattr(db, "users", collection)
        return collection

    return fail


@pytest.fixture
def repair(monkeypatch):
    """A function that restores the collection."""
    users = db.users
    return lambda: monkeypatch.setattr(db, "users", users)


@pytest.fixture
def no_server(monkeypatch):
    """Replace the collection with one on a port where no server listens."""
    with MongoClient("mongodb://127.0.0.1:9", connect=False, timeoutMS=50) as server:
        monkeypatch.setattr(db, "users", server["none"]["users"])
        yield


def is_unavailable(response):
    expected = {"detail": "The database is unavailable; try again"}
    retry_after = response.headers.get("Retry-After")
    return (response.status_code, response.json(), retry_after) == (503, expected, "2")


def is_database_error(response):
    expected = {"detail": "Internal server error"}
    has_retry_after = "Retry-After" in response.headers
    return (response.status_code, response.json(), has_retry_after) == (500, expected, False)


# Responses

REQUESTS = {
    "register": lambda client, email, tokens: register(client, "new-" + email),
    "login": lambda client, email, tokens: login(client, email),
    "me": lambda client, email, tokens: me(client, tokens["access_token"]),
    "refresh": lambda client, email, tokens: refresh(client, tokens["refresh_token"]),
    "logout": lambda client, email, tokens: logout(client, tokens["refresh_token"]),
}
each_request = pytest.mark.parametrize("send", REQUESTS.values(), ids=REQUESTS.keys())


@each_request
def test_a_request_that_needs_the_database_is_503_without_it(
    client, tokens, email, no_server, send
):
    for _ in range(2):
        assert is_unavailable(send(client, email, tokens))
    assert not auth.hash_slots


def test_a_request_that_needs_no_database_works_without_it(client, other_user, no_server):
    assert client.post("/auth/login", json={"email": "x"}).status_code == 422
    assert is_invalid_token(me(client, "x"))
    assert is_invalid_token(refresh(client, "x"))
    assert is_invalid_token(logout(client, other_user["access_token"]))


@each_request
def test_an_error_of_mongodb_is_500_and_no_outage(client, tokens, email, fail, send):
    collection = fail(UNAUTHORIZED)
    for attempt in range(1, 4):
        assert is_database_error(send(client, email, tokens))
        assert collection.operations == attempt
    assert not auth.hash_slots


def test_a_failed_login_that_cannot_be_recorded_is_503(client, tokens, email, fail, repair):
    find_one = db.users.find_one
    fail(NO_RESPONSE).find_one = find_one
    assert is_unavailable(login(client, email, "wrong"))
    repair()
    assert "login_failures" not in stored_user(tokens)


# Which errors are an outage

RETRYABLE = {"codeName": "InterruptedDueToReplStateChange", "errorLabels": ["RetryableWriteError"]}
OUTAGES = [
    (AutoReconnect("s3cret"), "AutoReconnect"),
    (NetworkTimeout("s3cret"), "NetworkTimeout"),
    (ProtocolError("s3cret"), "ProtocolError"),
    (ConfigurationError("s3cret"), "ConfigurationError"),
    (WTimeoutError("s3cret"), "WTimeoutError"),
    (ExecutionTimeout("s3cret", 50, {"codeName": "MaxTimeMSExpired"}), "MaxTimeMSExpired"),
    (OperationFailure("s3cret", 11602, RETRYABLE), "InterruptedDueToReplStateChange"),
]


@pytest.mark.parametrize(("error", "name"), OUTAGES, ids=[name for _, name in OUTAGES])
def test_an_error_without_a_usable_response_is_an_outage(
    client, other_user, events, fail, error, name
):
    fail(error)
    assert is_unavailable(me(client, other_user["access_token"]))
    assert events() == [beginning(name)]


OTHER_ERRORS = [
    (UNAUTHORIZED, "Unauthorized"),
    (OperationFailure("s3cret", 13), "OperationFailure"),
    (OperationFailure("s3cret", 13, {"errorLabels": ["Other"]}), "OperationFailure"),
    (CursorNotFound("s3cret", 43, {"codeName": "CursorNotFound"}), "CursorNotFound"),
    (InvalidBSON("s3cret"), "InvalidBSON"),
]


@pytest.mark.parametrize(("error", "name"), OTHER_ERRORS)
def test_another_error_of_mongodb_is_logged_with_its_name(
    client, other_user, events, fail, error, name
):
    fail(error)
    assert is_database_error(me(client, other_user["access_token"]))
    assert events() == [("ERROR", f"MongoDB returned an error: {name}")]


def test_a_failed_dns_lookup_of_mongodb_srv_is_an_outage(client, other_user, events, monkeypatch):
    def resolve(*args, **kwargs):
        raise dns.resolver.NXDOMAIN

    monkeypatch.setattr(dns.resolver, "resolve", resolve)
    with MongoClient("mongodb+srv://alice:s3cret@db.example.net", connect=False) as server:
        monkeypatch.setattr(db, "users", server["none"]["users"])
        assert is_unavailable(me(client, other_user["access_token"]))
    assert events() == [beginning("ConfigurationError")]


# The beginning of an outage


@pytest.mark.parametrize(("seconds", "attempts"), [(1.0, 2), (1.1, 1)])
def test_an_outage_begins_a_second_after_the_last_response(
    client, other_user, clock, fail, seconds, attempts
):
    assert me(client, other_user["access_token"]).status_code == 200
    clock.time += seconds
    collection = fail(NO_RESPONSE)
    for _ in range(2):
        assert is_unavailable(me(client, other_user["access_token"]))
    assert collection.operations == attempts


@pytest.mark.parametrize("uptime", [0.0, 0.5])
def test_an_outage_can_begin_before_the_first_response(client, other_user, clock, fail, uptime):
    clock.time = uptime
    collection = fail(NO_RESPONSE)
    for _ in range(2):
        assert is_unavailable(me(client, other_user["access_token"]))
    assert collection.operations == 1


def test_a_query_that_fails_while_another_one_gets_a_response_begins_no_outage(
    client, other_user, fail, repair, monkeypatch
):
    monkeypatch.setattr(db, "memory_lock", nullcontext())

    def fail_after_another_query():
        repair()
        assert me(client, other_user["access_token"]).status_code == 200
        raise NO_RESPONSE

    fail(fail_after_another_query)
    assert is_unavailable(me(client, other_user["access_token"]))
    assert me(client, other_user["access_token"]).status_code == 200


# During an outage


def test_one_attempt_per_second_is_made_during_an_outage(client, other_user, clock, fail):
    collection = fail(NO_RESPONSE)
    attempts = []
    for _ in range(8):
        assert is_unavailable(me(client, other_user["access_token"]))
        attempts.append(collection.operations)
        clock.time += 0.5
    assert attempts == [1, 1, 2, 2, 3, 3, 4, 4]


def test_an_attempt_that_takes_long_does_not_postpone_the_next_one(client, other_user, clock, fail):
    def fail_after_half_a_second():
        clock.time += 0.5
        raise NO_RESPONSE

    collection = fail(fail_after_half_a_second)
    db.next_attempt = clock.time
    assert is_unavailable(me(client, other_user["access_token"]))
    clock.time += 0.5
    assert is_unavailable(me(client, other_user["access_token"]))
    assert collection.operations == 2


QUERIES = [
    db.create_user,
    db.find_user_by_email,
    db.find_user_by_session,
    db.record_failed_login,
    db.has_session_since,
    db.add_session,
    db.advance_session,
    db.find_session,
    db.delete_session,
]


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.__name__)
def test_no_query_runs_during_an_outage(query):
    db.next_attempt = math.inf
    with pytest.raises(db.DatabaseUnavailable):
        query()  # The arguments are not looked at.


# The end of an outage


def test_the_first_response_ends_the_outage(client, other_user, clock):
    db.next_attempt = clock.time
    for _ in range(2):
        assert me(client, other_user["access_token"]).status_code == 200


def test_an_error_of_mongodb_ends_the_outage(client, other_user, clock, fail, repair):
    db.next_attempt = clock.time
    fail(UNAUTHORIZED)
    assert is_database_error(me(client, other_user["access_token"]))
    repair()
    assert me(client, other_user["access_token"]).status_code == 200


def test_the_beginning_and_the_end_of_each_outage_are_logged_once(
    client, other_user, clock, events, fail, repair
):
    for _ in range(2):
        fail(NO_RESPONSE)
        for _ in range(4):
            clock.time += 2
            assert is_unavailable(me(client, other_user["access_token"]))
        repair()
        for _ in range(3):
            clock.time += 2
            assert me(client, other_user["access_token"]).status_code == 200
    assert events() == [beginning(), END] * 2


def test_a_response_without_an_outage_is_not_logged(client, other_user, events):
    assert me(client, other_user["access_token"]).status_code == 200
    assert events() == []


def test_the_service_starts_during_an_outage_and_creates_the_index_later(
    email, cheap_hasher, empty_collection, clock, events, fail, repair
):
    fail(NO_RESPONSE)
    with TestClient(app.app) as client:
        assert is_unavailable(register(client, email))
        repair()
        clock.time += 1
        assert [register(client, email).status_code for _ in range(2)] == [201, 409]
    assert empty_collection.index_information()["email_1"]["unique"]
    assert [event for event in events() if event in (beginning(), END)] == [beginning(), END]


# Errors of other code inside the `with` statement


@pytest.mark.parametrize(
    "error",
    [
        InvalidId(),
        ValidationError.from_exception_data("Item", []),
        ValueError(),
        HTTPException(404),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_other_code_passes_through_unchanged(error, events):
    with pytest.raises(type(error)) as raised, db.circuit_breaker():
        raise error
    assert raised.value is error
    assert events() == []


def test_an_error_of_other_code_begins_no_outage():
    with pytest.raises(KeyError), db.circuit_breaker():
        raise KeyError
    assert db.find_user_by_email("nobody@example.com") is None


def test_an_error_of_other_code_does_not_end_an_outage(clock):
    db.next_attempt = clock.time
    with pytest.raises(KeyError), db.circuit_breaker():
        raise KeyError
    with pytest.raises(db.DatabaseUnavailable):
        db.find_user_by_email("nobody@example.com")


# Threads


def test_a_query_can_be_nested_in_another_one(monkeypatch):
    # If this test fails, the lock of the other tests remains free.
    monkeypatch.setattr(db, "memory_lock", type(db.memory_lock)())
    found = []

    def nest():
        with db.circuit_breaker():
            found.append(db.find_user_by_email("nobody@example.com"))

    # A lock that cannot be acquired twice would block the thread for good.
    thread = threading.Thread(target=nest, daemon=True)
    thread.start()
    thread.join(10)
    assert found == [None]


def test_another_thread_can_end_the_outage_while_a_query_reads_the_clock(monkeypatch):
    def read_clock():
        db.next_attempt = None  # as another thread sets it that has got a response
        return 1000.0

    db.next_attempt = 1000.5
    monkeypatch.setattr(db, "monotonic", read_clock)
    with pytest.raises(db.DatabaseUnavailable):
        db.find_user_by_email("nobody@example.com")


@pytest.mark.skipif(bool(TEST_MONGO_URI), reason="The queries of MongoDB need no lock.")
def test_only_one_query_at_a_time_runs_in_memory(client, other_user, monkeypatch):
    running, peaks = [], []

    def find_none():
        running.append(1)
        peaks.append(len(running))
        time.sleep(0.01)
        running.pop()

    monkeypatch.setattr(db, "users", FailingCollection(find_none))
    in_parallel(lambda: me(client, other_user["access_token"]), 8)
    assert peaks == [1] * 8


@pytest.mark.skipif(not TEST_MONGO_URI, reason="In memory, only one query at a time runs.")
def test_queries_of_mongodb_run_in_parallel(client, other_user, monkeypatch):
    both_run = threading.Barrier(2, timeout=10)

    def find_none():
        both_run.wait()

    monkeypatch.setattr(db, "users", FailingCollection(find_none))
    in_parallel(lambda: me(client, other_user["access_token"]), 2)
    assert not both_run.broken
