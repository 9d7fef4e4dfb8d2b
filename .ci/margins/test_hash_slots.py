"""Tests of the slots for hashes: their shares, rejections, lack of memory and freezes."""

import asyncio
import multiprocessing
import os
import signal
import uuid
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Condition, Event
from time import sleep
from types import SimpleNamespace

import anyio.to_thread
import pytest
from argon2 import PasswordHasher
from argon2.exceptions import HashingError, VerificationError
from conftest import in_parallel
from fastapi.testclient import TestClient
from helpers import wait_until

import app
import auth
import db
from test_app import (
    ADDRESS,
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
NETWORKS = [f"192.0.2.{number}" for number in range(1, 6)]
OLDER_HASH = PasswordHasher(time_cost=2, memory_cost=8, parallelism=1).hash(PASSWORD)


class ConditionWithDeadline(Condition):
    """A condition that nobody waits for endlessly."""

    def wait_for(self, predicate):
        assert super().wait_for(predicate, 30), "The slot was not released within 30 s"


@pytest.fixture(autouse=True)
def no_endless_wait(monkeypatch):
    """Let a hash fail if it waits for one that has not released its slot."""
    monkeypatch.setattr(auth, "hash_slots", {})
    monkeypatch.setattr(auth, "hash_slots_changed", ConditionWithDeadline())


@pytest.fixture
def full(monkeypatch):
    """Let ADDRESS hold 8 of the 16 slots, which is its share."""
    monkeypatch.setattr(auth, "hash_slots", dict.fromkeys(range(8), ADDRESS))


def is_overloaded(response):
    expected = {"detail": "The service is overloaded; try again"}
    retry_after = response.headers.get("Retry-After")
    return (response.status_code, response.json(), retry_after) == (503, expected, "1")


# Shares


def start_logins(client, address, times, pool):
    """Start logins from an address, and wait until each holds a slot or was rejected."""
    places_before = len(auth.hash_slots)
    logins = [
        pool.submit(login, client_at(client, address), f"{uuid.uuid4().hex}@example.com")
        for _ in range(times)
    ]

    def is_each_login_decided():
        rejections = sum(login.done() for login in logins)
        return len(auth.hash_slots) - places_before + rejections == times

    wait_until(is_each_login_decided, 30)
    return logins


def count_places(logins):
    """Return how many of the logins got a slot. The others were rejected."""
    responses = [login.result() for login in logins]
    slots = [response.status_code for response in responses].count(401)
    assert slots + sum(map(is_overloaded, responses)) == len(responses)
    return slots


def test_the_networks_get_8_4_2_1_and_1_of_the_16_places(client, blocked_hasher):
    with ThreadPoolExecutor(40) as pool:
        logins = [start_logins(client, address, 10, pool) for address in NETWORKS[:3]]
        logins += [start_logins(client, address, 2, pool) for address in NETWORKS[3:]]
        logins.append(start_logins(client, "192.0.2.6", 1, pool))
        blocked_hasher.unblock.set()
        assert [count_places(each) for each in logins] == [8, 4, 2, 1, 1, 0]
    assert not auth.hash_slots


class SlowlyCountedPlaces(dict):
    """Slots that other threads could change between the count and the decision."""

    def values(self):
        sleep(0.01)
        return super().values()


def test_simultaneous_requests_never_get_more_places_than_their_share(monkeypatch):
    monkeypatch.setattr(auth, "hash_slots", SlowlyCountedPlaces())
    monkeypatch.setattr(auth, "MAX_RUNNING_HASHES", 16)
    all_have_tried = Barrier(16)

    def try_to_hold_a_place():
        try:
            with auth.hold_hash_slot(ADDRESS):
                all_have_tried.wait(30)
                return True
        except auth.Overloaded:
            all_have_tried.wait(30)
            return False

    assert sum(in_parallel(try_to_hold_a_place, 16)) == 8
    assert not auth.hash_slots


# Rejections


@pytest.mark.parametrize(
    "take_place",
    [
        lambda: auth.hash_password(PASSWORD, ADDRESS),
        lambda: auth.verify_password(OLDER_HASH, PASSWORD, ADDRESS),
    ],
    ids=["hash_password", "verify_password"],
)
def test_a_hash_needs_a_place(full, take_place):
    with pytest.raises(auth.Overloaded):
        take_place()
    assert len(auth.hash_slots) == 8


def test_a_rejected_login_is_no_failed_login(client, tokens, email, full, events):
    before = stored_user(tokens), events()
    assert is_overloaded(login(client, email, "wrong"))
    assert (stored_user(tokens), events()) == before


def test_a_network_without_a_free_place_can_use_its_tokens(client, tokens, full):
    assert me(client, tokens["access_token"]).status_code == 200
    assert refresh(client, tokens["refresh_token"]).status_code == 200


@pytest.fixture
def one_thread(client):
    """Let FastAPI run the routes in a single thread."""

    def set_threads(number):
        async def set_total_tokens():
            anyio.to_thread.current_default_thread_limiter().total_tokens = number

        client.portal.call(set_total_tokens)

    set_threads(1)
    yield
    set_threads(40)


@pytest.mark.parametrize("send", [register, login])
def test_a_rejection_is_delayed_by_a_second_in_which_it_occupies_no_thread(
    client, tokens, full, one_thread, monkeypatch, send
):
    delays, end = [], Event()

    async def wait_for_end(seconds):
        delays.append(seconds)
        while not end.is_set():
            await asyncio.sleep(0.01)

    monkeypatch.setattr(app, "REJECTION_DELAY", REJECTION_DELAY)
    monkeypatch.setattr(app, "asyncio", SimpleNamespace(sleep=wait_for_end))
    with ThreadPoolExecutor(2) as pool:
        rejection = pool.submit(send, client, "alice@example.com")
        try:
            wait_until(lambda: delays, 30)
            other_request = pool.submit(me, client, tokens["access_token"])
            assert other_request.result(30).status_code == 200
            assert not rejection.done()
        finally:
            end.set()
        assert is_overloaded(rejection.result(30))
    assert delays == [1.0]


# Release


class FailingHasher(PasswordHasher):
    """A hasher that raises an error."""

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


def test_a_place_is_released_after_a_hash_and_a_mismatch(client, tokens, email):
    responses = [login(client, email), login(client, email, "wrong"), register(client, email)]
    assert [response.status_code for response in responses] == [200, 401, 409]
    assert not auth.hash_slots


def test_a_place_is_released_after_an_unexpected_error_which_is_not_converted(
    client, email, monkeypatch
):
    monkeypatch.setattr(auth, "hasher", FailingHasher(verify_error=KeyError("unexpected")))
    with pytest.raises(KeyError, match="unexpected"):
        login(client, email)
    assert not auth.hash_slots


def test_no_place_is_held_during_a_query(client, email, monkeypatch):
    users, slots = db.users, []

    class WatchedCollection:
        def __getattr__(self, name):
            slots.append(len(auth.hash_slots))
            return getattr(users, name)

    monkeypatch.setattr(db, "users", WatchedCollection())
    responses = [register(client, email), login(client, email), login(client, email, "wrong")]
    assert [response.status_code for response in responses] == [201, 200, 401]
    assert set(slots) == {0}


# Two at a time


@pytest.mark.parametrize(("send", "status"), [(login, 200), (register, 409)])
def test_at_most_two_hashes_run_at_the_same_time(
    client, tokens, email, blocked_hasher, send, status
):
    # The login also replaces this hash.
    db.users.update_one({"email": email}, {"$set": {"password_hash": OLDER_HASH}})
    with ThreadPoolExecutor(8) as pool:
        requests = [pool.submit(send, client, email) for _ in range(8)]
        wait_until(lambda: len(auth.hash_slots) == 8 and blocked_hasher.running >= 2, 30)
        sleep(0.2)  # A third hash would start within this time.
        blocked_hasher.unblock.set()
        assert {request.result().status_code for request in requests} == {status}
    assert blocked_hasher.peak == 2


def test_a_client_that_hashes_again_waits_for_those_that_came_before(monkeypatch):
    order, end = [], Event()

    def verify(password_hash, password):
        order.append(password)
        assert end.wait(30)

    def verify_twice():
        auth.verify_password(OLDER_HASH, "first", ADDRESS)
        auth.verify_password(OLDER_HASH, "third", ADDRESS)

    monkeypatch.setattr(auth, "hasher", SimpleNamespace(verify=verify))
    monkeypatch.setattr(auth, "MAX_RUNNING_HASHES", 1)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(verify_twice)]
        wait_until(lambda: order == ["first"], 30)
        calls.append(pool.submit(auth.verify_password, OLDER_HASH, "second", "192.0.2.1"))
        wait_until(lambda: len(auth.hash_slots) == 2, 30)
        end.set()
        for call in calls:
            call.result(30)
    assert order == ["first", "second", "third"]


# Lack of memory or threads


@pytest.mark.parametrize(
    "error", [VerificationError("Memory allocation error"), MemoryError()], ids=repr
)
def test_a_password_that_cannot_be_verified_is_503_and_no_failed_login(
    client, tokens, email, events, monkeypatch, error
):
    events_before = events()
    with monkeypatch.context() as patch:
        patch.setattr(auth, "hasher", FailingHasher(verify_error=error))
        assert is_overloaded(login(client, email))
        assert is_overloaded(login(client, "unknown-" + email))
    logged = [("ERROR", f"The service is overloaded: {error!r}")] * 2
    assert events() == events_before + logged
    assert "login_failures" not in stored_user(tokens)
    assert not auth.hash_slots
    assert login(client, email).status_code == 200


@pytest.mark.parametrize("error", [HashingError("Threading failure"), MemoryError()], ids=repr)
def test_a_password_that_cannot_be_hashed_is_503(client, email, events, monkeypatch, error):
    with monkeypatch.context() as patch:
        patch.setattr(auth, "hasher", FailingHasher(hash_error=error))
        assert is_overloaded(register(client, email))
    assert events() == [("ERROR", f"The service is overloaded: {error!r}")]
    assert not auth.hash_slots
    assert register(client, email).status_code == 201


def test_an_older_hash_that_cannot_be_replaced_is_503_and_stays(client, tokens, email, monkeypatch):
    db.users.update_one({"email": email}, {"$set": {"password_hash": OLDER_HASH}})
    before = stored_user(tokens)
    with monkeypatch.context() as patch:
        patch.setattr(auth, "hasher", FailingHasher(hash_error=MemoryError()))
        assert is_overloaded(login(client, email))
    assert stored_user(tokens) == before
    assert login(client, email).status_code == 200


def test_a_mismatch_is_not_logged_as_overload(client, tokens, email, events):
    login(client, email, "wrong")
    assert not [message for _, message in events() if "overloaded" in message]


# Freezes. Each function runs in a new process, so that a freeze ends with it.

only_memory = pytest.mark.skipif(bool(TEST_MONGO_URI), reason="the database does not matter")


def run_in_new_process(function):
    process = multiprocessing.get_context("spawn").Process(target=function)
    process.start()
    process.join(60)
    was_frozen = process.exitcode is None
    process.kill()
    process.join()
    assert not was_frozen
    assert process.exitcode == 0


def hash_before_and_after_fork():
    auth.hash_password(PASSWORD, ADDRESS)
    if os.fork() == 0:
        signal.alarm(30)  # ends the process
        try:
            auth.hash_password(PASSWORD, ADDRESS)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.wait()[1] == 0


@only_memory
def test_a_process_that_was_forked_after_a_hash_can_hash():
    run_in_new_process(hash_before_and_after_fork)


def hash_in_the_event_loop_and_in_threads():
    app.REJECTION_DELAY = 0
    # A hash takes some milliseconds, so that many wait at the same time.
    auth.hasher = PasswordHasher(time_cost=1, memory_cost=2048, parallelism=1)

    @app.app.post("/hash")
    async def hash_in_the_event_loop(network: auth.ClientNetwork):
        auth.hash_password(PASSWORD, network)

    with TestClient(app.app) as client:
        assert register(client, "alice@example.com").status_code == 201

        def send(number):
            other_client = client_at(client, NETWORKS[number % 5])
            if number % 2:
                return other_client.post("/hash").status_code
            return login(other_client, "alice@example.com").status_code

        # More requests than FastAPI has threads.
        with ThreadPoolExecutor(60) as pool:
            statuses = set(pool.map(send, range(60)))
        assert {200} <= statuses <= {200, 503}
        assert not auth.hash_slots
        assert [send(0), send(1)] == [200, 200]


@only_memory
def test_hashes_in_the_event_loop_of_another_app_do_not_freeze_the_process():
    run_in_new_process(hash_in_the_event_loop_and_in_threads)
