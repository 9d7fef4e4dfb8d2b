"""Fixtures and helpers that the tests at the margins use in addition to those of test_app.py."""

import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock

# These settings come from test_app.py, so it is imported before the modules.
import test_app  # isort: skip
import pytest
from argon2 import PasswordHasher

import app
import auth
import db

cheap_hasher, default_hasher = test_app.cheap_hasher, test_app.default_hasher
client, email, tokens = test_app.client, test_app.email, test_app.tokens
set_clock, events = test_app.set_clock, test_app.events
browser, host = test_app.browser, test_app.host

BEFORE_FIRST_QUERY = {name: getattr(db, name) for name in ("next_attempt", "last_response")}

only_mongodb = pytest.mark.skipif(
    not test_app.TEST_MONGO_URI, reason="mongomock differs from MongoDB here"
)


@pytest.fixture(scope="session")
def other_user(client):
    """The tokens of a user that no test changes."""
    return test_app.register(client, "other@example.com").json()


@pytest.fixture(scope="session", autouse=True)
def database(client):
    """Drop the database at the end, although some tests do not use the fixture client."""


@pytest.fixture(autouse=True)
def no_rejection_delay(monkeypatch):
    monkeypatch.setattr(app, "REJECTION_DELAY", 0)


@pytest.fixture(autouse=True)
def no_outage(monkeypatch):
    """Start and end each test as before the first query."""
    for name, value in BEFORE_FIRST_QUERY.items():
        monkeypatch.setattr(db, name, value)


@pytest.fixture
def frequent_thread_switches():
    """Switch threads as often as possible to expose races."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def empty_collection(monkeypatch):
    """Replace the collection with an empty one that has no index."""
    monkeypatch.setattr(db, "users", db.users.database[f"users_{uuid.uuid4().hex}"])
    return db.users


class FailingCollection:
    """A collection whose operations raise an error, or call a function, and are counted."""

    def __init__(self, error):
        self.error, self.operations, self.lock = error, 0, Lock()

    def operate(self, *args, **kwargs):
        with self.lock:
            self.operations += 1
        if isinstance(self.error, Exception):
            raise self.error
        return self.error()

    find_one = find_one_and_update = insert_one = update_one = operate
    create_index = index_information = operate

    def with_options(self, **options):
        return self


class BlockedHasher(PasswordHasher):
    """A hasher that waits for an event and records the hashes that run at the same time."""

    def __init__(self):
        super().__init__(time_cost=1, memory_cost=8, parallelism=1)
        self.lock, self.unblock, self.running, self.peak = Lock(), Event(), 0, 0

    def run(self, operation, *args):
        with self.lock:
            self.running += 1
            self.peak = max(self.peak, self.running)
        assert self.unblock.wait(10)
        try:
            return operation(*args)
        finally:
            with self.lock:
                self.running -= 1

    def hash(self, password):
        return self.run(super().hash, password)

    def verify(self, hash, password):
        return self.run(super().verify, hash, password)


@pytest.fixture
def blocked_hasher(monkeypatch):
    hasher = BlockedHasher()
    monkeypatch.setattr(auth, "hasher", hasher)
    yield hasher
    hasher.unblock.set()


def in_parallel(call, times):
    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(lambda _: call(), range(times)))
