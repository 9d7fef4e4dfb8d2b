"""Tests over HTTP, in memory or on the MongoDB server at TEST_MONGO_URI.

The tests use a database with a random name and drop it at the end. They do not use .env.
"""

import base64
import json
import logging
import os
import runpy
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Event, Lock

TEST_MONGO_URI = os.getenv("TEST_MONGO_URI", "")
SETTINGS = {  # An empty variable counts as not set, and hides the one in .env.
    "MONGO_URI": TEST_MONGO_URI,
    "MONGO_DB_NAME": f"auth_jwt_test_{uuid.uuid4().hex}",
    "JWT_SECRET_KEY": TEST_MONGO_URI and "a key for the tests, longer than 32 bytes",
    "ACCESS_TOKEN_EXPIRE_MINUTES": "",
    "REFRESH_TOKEN_EXPIRE_DAYS": "",
    "CORS_ORIGINS": "",
}
os.environ.update(SETTINGS)

import anyio.to_thread
import jwt
import pytest
import uvicorn
from argon2 import PasswordHasher
from argon2.exceptions import HashingError, VerificationError
from argon2.low_level import error_to_str, lib
from bson import ObjectId
from fastapi import Depends, FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from pymongo import MongoClient, ReadPreference
from pymongo.errors import ExecutionTimeout, OperationFailure, ServerSelectionTimeoutError

import app
import auth
import db

HERE = Path(__file__).parent
PASSWORD = "MyS3cret@1"
ADDRESS = "192.0.2.100"  # of the fixture client
AS_JSON = {"Content-Type": "application/json"}
DEFAULT_HASHER, UNKNOWN_USER = auth.hasher, auth.UNKNOWN_USER
CHEAP_HASHER = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


# Fixtures


@pytest.fixture(scope="session", autouse=True)
def cheap_hasher():
    """Make hashes cheap by default, so that the tests are fast."""
    auth.hasher = CHEAP_HASHER
    auth.UNKNOWN_USER = UNKNOWN_USER | {"password_hash": CHEAP_HASHER.hash("unknown")}


@pytest.fixture
def default_hasher(monkeypatch):
    """The hasher of the service."""
    monkeypatch.setattr(auth, "hasher", DEFAULT_HASHER)
    monkeypatch.setattr(auth, "UNKNOWN_USER", UNKNOWN_USER)


@pytest.fixture(scope="session")
def client(cheap_hasher):
    database = db.users.database
    with TestClient(app.app, client=(ADDRESS, 50000)) as client:
        yield client
    database.client.drop_database(database.name)
    database.client.close()


@pytest.fixture(autouse=True)
def no_rejection_delay(monkeypatch):
    monkeypatch.setattr(auth, "REJECTION_DELAY", 0)


@pytest.fixture(autouse=True)
def closed_breaker(monkeypatch):
    """Start and end each test with a closed circuit breaker."""
    monkeypatch.setattr(db, "next_attempt", 0.0)
    monkeypatch.setattr(db, "last_success", 0.0)


@pytest.fixture
def email():
    return f"{uuid.uuid4().hex}@example.com"


@pytest.fixture
def tokens(client, email):
    """The tokens of a new user."""
    return register(client, email).json()


@pytest.fixture(scope="session")
def other_user(client):
    """The tokens of a user that no test changes."""
    return register(client, "other@example.com").json()


class AnyDatetime(type):
    def __instancecheck__(cls, value):
        return isinstance(value, datetime)


class PyJWTClock(metaclass=AnyDatetime):
    """Replaces the datetime class in PyJWT."""

    @staticmethod
    def now(tz):
        return auth.now()


@pytest.fixture
def set_clock(monkeypatch):
    """A function that stops the clocks of auth.py and PyJWT at an offset from the present."""
    start = datetime.now(UTC).replace(microsecond=0)
    monkeypatch.setattr(jwt.api_jwt, "datetime", PyJWTClock)

    def set_clock(**ahead):
        monkeypatch.setattr(auth, "now", lambda: start + timedelta(**ahead))

    set_clock()
    return set_clock


@pytest.fixture
def frequent_thread_switches():
    """Switch threads as often as possible to expose races."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def database_down(monkeypatch):
    """Replace the collection with one on a port where no server listens."""
    with MongoClient("mongodb://127.0.0.1:9", connect=False, timeoutMS=50) as server:
        monkeypatch.setattr(db, "users", server["none"]["users"])
        yield


@pytest.fixture
def empty_collection(monkeypatch):
    """Replace the collection with an empty one that has no index."""
    monkeypatch.setattr(db, "users", db.users.database[f"users_{uuid.uuid4().hex}"])
    db.create_index.cache_clear()
    yield db.users
    db.create_index.cache_clear()


@pytest.fixture
def events(caplog):
    """The security events, as pairs of level and message."""
    caplog.set_level(logging.INFO, "auth_jwt")
    return lambda: [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "auth_jwt"]


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


# Helpers


def register(client, email, password=PASSWORD):
    return client.post("/auth/register", json={"email": email, "password": password})


def login(client, email, password=PASSWORD):
    return client.post("/auth/login", json={"email": email, "password": password})


def refresh(client, token):
    return client.post("/auth/refresh", json={"refresh_token": token})


def logout(client, token):
    return client.post("/auth/logout", json={"refresh_token": token})


def me(client, token):
    return client.get("/auth/me", headers={"Authorization": f"Bearer {token}"})


def client_at(client, address):
    """Return a client at another address, on the same event loop."""
    other_client = TestClient(app.app, client=(address, 50000))
    other_client.portal = client.portal
    return other_client


def is_invalid_token(response):
    challenge = response.headers.get("WWW-Authenticate")
    return (response.status_code, challenge) == (401, 'Bearer error="invalid_token"')


def in_parallel(call, times):
    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(lambda _: call(), range(times)))


def run_in_pairs(monkeypatch, name):
    """Make each call of a query wait for a second one, so that both run at the same time."""
    barrier, query = Barrier(2), getattr(db, name)

    def wait_and_run(*args):
        barrier.wait(10)
        return query(*args)

    monkeypatch.setattr(db, name, wait_and_run)


def claims_of(token):
    return jwt.decode(token, options={"verify_signature": False})


def stored_user(tokens):
    return db.users.find_one({"_id": ObjectId(tokens["user_id"])})


# Register


def test_register_returns_201_with_the_user_id_and_two_tokens(client, email):
    response = register(client, email)
    assert response.status_code == 201
    assert response.json().keys() == {"user_id", "access_token", "refresh_token"}
    assert ObjectId.is_valid(response.json()["user_id"])


def test_register_starts_a_session(client, tokens):
    assert me(client, tokens["access_token"]).status_code == 200
    assert refresh(client, tokens["refresh_token"]).status_code == 200


def test_register_rejects_a_taken_email_in_any_letter_case(client, tokens, email):
    for taken in (email, email.upper(), email.title()):
        response = register(client, taken)
        assert (response.status_code, response.json()) == (
            409,
            {"detail": "This email is already registered"},
        )


@pytest.mark.parametrize("taken", ["H\u0331x", "h\u0331x", "\u1e96x"])
def test_register_rejects_a_taken_email_in_any_unicode_form(client, taken):
    domain = f"@{uuid.uuid4().hex}.example.com"
    assert register(client, "H\u0331x" + domain).status_code == 201
    assert register(client, taken + domain).status_code == 409
    assert login(client, taken + domain).status_code == 200


def test_only_one_of_two_simultaneous_registrations_succeeds(
    client, frequent_thread_switches, monkeypatch
):
    run_in_pairs(monkeypatch, "create_user")
    for _ in range(30):
        email = f"{uuid.uuid4().hex}@example.com"
        responses = in_parallel(lambda email=email: register(client, email), 2)
        assert sorted(response.status_code for response in responses) == [201, 409]
        assert db.users.count_documents({"email": email}) == 1


def test_register_stores_a_hash_with_the_second_recommended_option_of_rfc_9106(
    client, email, default_hasher
):
    tokens = register(client, email).json()
    assert stored_user(tokens)["password_hash"].startswith("$argon2id$v=19$m=65536,t=3,p=4$")


def test_the_database_contains_no_password_no_token_and_no_unknown_field(client, email):
    body = {"email": email, "password": PASSWORD, "role": "admin", "_id": "x", "created_at": "y"}
    tokens = client.post("/auth/register", json=body).json()
    user = stored_user(tokens)
    assert user.keys() == {"_id", "email", "password_hash", "created_at", "refresh_tokens"}
    session_fields = {"sid", "generation", "issued_at", "network"}
    assert user["refresh_tokens"][0].keys() == session_fields
    for secret in (PASSWORD, tokens["access_token"], tokens["refresh_token"]):
        assert secret not in str(user)


BAD_EMAILS = {
    "": "must have an @-sign",
    "alice": "must have an @-sign",
    "alice@": "must be something after the @-sign",
    "@example.com": "must be something before the @-sign",
    "a b@example.com": "contains invalid characters before the @-sign",
    "alice@example": "should have a period",
    "a@ex(ample.com": "after the @-sign contains invalid characters",
    "a" * 255 + "@b.com": "is too long",
    "alice@localhost": "should have a period",
    "alice@example.test": "is a special-use or reserved name",
}


@pytest.mark.parametrize(("bad_email", "reason"), BAD_EMAILS.items())
@pytest.mark.parametrize("route", ["register", "login"])
def test_the_response_to_an_invalid_email_gives_the_reason(client, route, bad_email, reason):
    response = client.post(f"/auth/{route}", json={"email": bad_email, "password": PASSWORD})
    assert response.status_code == 422
    (error,) = response.json()["detail"]
    assert (error.keys(), error["loc"]) == ({"loc", "msg", "type"}, ["body", "email"])
    assert reason in error["msg"]
    assert PASSWORD not in response.text


@pytest.mark.parametrize(
    ("weak_password", "missing"),
    [
        (
            "",
            "at least 8 characters, a lower-case letter, an upper-case letter, a digit, a symbol",
        ),
        ("aB3$567", "at least 8 characters"),
        ("STRONGP@SS1", "a lower-case letter"),
        ("strongp@ss1", "an upper-case letter"),
        ("StrongP@ss", "a digit"),
        ("StrongPass1", "a symbol"),
        ("strongpass", "an upper-case letter, a digit, a symbol"),
        ("Пароль②ß!", "a digit"),
    ],
)
def test_the_response_to_a_weak_password_names_all_unmet_rules(
    client, email, weak_password, missing
):
    response = register(client, email, weak_password)
    assert response.status_code == 422
    assert response.json() == {
        "detail": [
            {
                "loc": ["body", "password"],
                "msg": f"The password needs {missing}",
                "type": "weak_password",
            }
        ]
    }


@pytest.mark.parametrize(
    "good", ["MyS3cret@1", "StrongP@ssw0rd", "aB3$5678", "aB3$" * 32, "Пароль٣ с пробелом"]
)
def test_a_strong_password_is_accepted(client, email, good):
    assert register(client, email, good).status_code == 201
    assert login(client, email, good).status_code == 200


@pytest.mark.parametrize("route", ["register", "login"])
def test_a_password_of_129_characters_is_rejected(client, email, route):
    body = {"email": email, "password": "aB3$" * 32 + "x"}
    response = client.post(f"/auth/{route}", json=body)
    assert response.status_code == 422
    assert [(e["loc"], e["msg"]) for e in response.json()["detail"]] == [
        (["body", "password"], "String should have at most 128 characters")
    ]


def test_composed_and_decomposed_forms_of_a_password_match(client, email):
    composed, decomposed = "Grüße@Zoë1" * 12, "Gru\u0308ße@Zoe\u03081" * 12
    assert len(composed) <= 128 < len(decomposed)
    register(client, email, decomposed)
    assert login(client, email, composed).status_code == 200


# Login


def test_login_returns_200_with_the_user_id_and_two_tokens(client, tokens, email):
    response = login(client, email.upper())
    assert response.status_code == 200
    assert response.json().keys() == {"user_id", "access_token", "refresh_token"}
    assert response.json()["user_id"] == tokens["user_id"]
    assert me(client, response.json()["access_token"]).json()["email"] == email


def test_login_responds_the_same_to_an_unknown_email_and_a_wrong_password(client, tokens, email):
    for response in (
        login(client, "unknown-" + email),
        login(client, email, PASSWORD + "x"),
        login(client, email, ""),
    ):
        assert (response.status_code, response.json()) == (
            401,
            {"detail": "Wrong email or password"},
        )
        assert response.headers["WWW-Authenticate"] == "Bearer"


def test_login_verifies_a_hash_of_the_same_cost_for_an_unknown_email(
    client, email, default_hasher, monkeypatch
):
    verified = []

    class Hasher(PasswordHasher):
        def verify(self, hash, password):
            verified.append(hash)
            return super().verify(hash, password)

    monkeypatch.setattr(auth, "hasher", Hasher())
    login(client, email)
    assert [hash.split("$")[1:4] for hash in verified] == [["argon2id", "v=19", "m=65536,t=3,p=4"]]


def test_login_also_records_a_failure_for_an_unknown_email(client, tokens, email, monkeypatch):
    recorded = []
    monkeypatch.setattr(db, "record_failed_login", lambda *args: recorded.append(args[:2]))
    login(client, email, "wrong")
    login(client, "unknown-" + email, "wrong")
    assert recorded == [(email, ADDRESS), ("unknown-" + email, ADDRESS)]


def test_login_replaces_a_hash_with_older_parameters_once(client, tokens, email, default_hasher):
    assert stored_user(tokens)["password_hash"].startswith("$argon2id$v=19$m=8,t=1,p=1$")
    assert login(client, email).status_code == 200
    new_hash = stored_user(tokens)["password_hash"]
    assert new_hash.startswith("$argon2id$v=19$m=65536,t=3,p=4$")
    assert login(client, email).status_code == 200
    assert stored_user(tokens)["password_hash"] == new_hash


@pytest.mark.parametrize("stored", ["$2b$12$not-argon2", "", "ü", None, 1])
def test_login_with_an_unusable_password_hash_is_rejected(client, tokens, email, stored):
    db.users.update_one({"email": email}, {"$set": {"password_hash": stored}})
    assert login(client, email).status_code == 401


def test_login_does_not_overwrite_a_password_that_was_just_changed(
    client, tokens, email, monkeypatch
):
    class Hasher(PasswordHasher):
        def hash(self, password):
            db.users.update_one({"email": email}, {"$set": {"password_hash": "changed"}})
            return super().hash(password)

    monkeypatch.setattr(auth, "hasher", Hasher())
    login(client, email)
    assert stored_user(tokens)["password_hash"] == "changed"


def test_login_of_a_user_that_was_just_deleted_is_rejected(client, email, monkeypatch):
    monkeypatch.setattr(auth, "authenticate", lambda *args: str(ObjectId()))
    assert login(client, email).status_code == 401


def test_login_above_20_sessions_ends_the_one_refreshed_longest_ago(
    client, tokens, email, set_clock
):
    second = login(client, email).json()
    for hours in range(1, 19):
        set_clock(hours=hours)
        login(client, email)
    set_clock(hours=20)
    newest = refresh(client, tokens["refresh_token"]).json()
    last = login(client, email).json()
    assert is_invalid_token(refresh(client, second["refresh_token"]))
    assert me(client, newest["access_token"]).status_code == 200
    assert me(client, last["access_token"]).status_code == 200
    assert len(stored_user(tokens)["refresh_tokens"]) == 20


# Failed computations


class FailingHasher(PasswordHasher):
    """A hasher that gets no memory."""

    def hash(self, password):
        raise HashingError("Memory allocation error")

    def verify(self, hash, password):
        raise VerificationError(self.message)


@pytest.mark.parametrize(
    "code", [lib.ARGON2_MEMORY_ALLOCATION_ERROR, lib.ARGON2_THREAD_FAIL], ids=["memory", "thread"]
)
def test_a_password_that_cannot_be_hashed_is_503_and_not_a_failed_login(
    client, tokens, email, events, monkeypatch, code
):
    hasher = FailingHasher()
    hasher.message = error_to_str(code)
    with monkeypatch.context() as patch:
        patch.setattr(auth, "hasher", hasher)
        responses = [login(client, email) for _ in range(6)]
        responses += [login(client, "unknown-" + email), register(client, "new-" + email)]
    for response in responses:
        assert (response.status_code, response.headers["Retry-After"]) == (503, "2")
    assert [level for level, _ in events()] == ["ERROR"] * 8
    assert "login_failures" not in stored_user(tokens)
    assert login(client, email).status_code == 200
    assert auth.hash_queue == []


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_a_request_without_a_thread_or_memory_is_503(client, tokens, events, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(anyio.to_thread, "run_sync", fail)
    response = me(client, tokens["access_token"])
    assert (response.status_code, response.headers["Retry-After"]) == (503, "2")
    assert events() == [("ERROR", f"The service is overloaded: {error!r}")]


def test_an_unexpected_error_keeps_its_traceback_and_cause(client, tokens, monkeypatch):
    def fail(*args):
        raise RuntimeError("unexpected") from KeyError("cause")

    monkeypatch.setattr(db, "find_user_by_session", fail)
    with pytest.raises(RuntimeError, match="unexpected") as raised:
        me(client, tokens["access_token"])
    assert raised.traceback[-1].name == "fail"
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize("field", [0, 1, 2, 3, 4, 5])
def test_a_truncated_password_hash_is_a_wrong_password(client, tokens, email, field):
    parts = stored_user(tokens)["password_hash"].split("$")
    broken = "$".join([*parts[:field], parts[field][:-2], *parts[field + 1 :]])
    db.users.update_one({"email": email}, {"$set": {"password_hash": broken or "$"}})
    response = login(client, email)
    assert response.status_code == (200 if field == 0 else 401)


# Limit on failed logins

HOUR = 60 * 60


def test_the_wait_of_a_network_doubles_from_its_fifth_wrong_password(
    client, tokens, email, set_clock
):
    for _ in range(4):
        assert login(client, email, "wrong").status_code == 401
    seconds, waits = 0, []
    for _ in range(11):
        assert login(client, email, "wrong").status_code == 401
        waits.append(int(login(client, email).headers["Retry-After"]))
        set_clock(seconds=seconds + waits[-1] - 1)
        assert login(client, email).status_code == 429
        seconds += waits[-1]
        set_clock(seconds=seconds)
    assert waits == [2**doublings for doublings in range(11)]


def guess_for(hours, client, email, set_clock, owner):
    """Guess as often as Retry-After allows; the owner logs in every ten minutes.

    Return the times of the checked guesses in seconds, and the owner's status codes.
    """
    seconds, guesses, owner_statuses = 0, [], []
    while seconds < hours * HOUR:
        set_clock(seconds=seconds)
        response = login(client, email, "wrong")
        if response.status_code == 401:
            guesses.append(seconds)
            next_guess = seconds
        else:
            next_guess = seconds + int(response.headers["Retry-After"])
        while len(owner_statuses) * 600 <= next_guess:
            set_clock(seconds=len(owner_statuses) * 600)
            owner_statuses.append(login(owner, email).status_code)
        seconds = next_guess
    return guesses, owner_statuses


def test_a_stranger_who_guesses_for_four_hours_does_not_lock_the_owner_out(
    client, tokens, email, set_clock
):
    owner = client_at(client, "198.51.100.7")
    guesses, owner_statuses = guess_for(4, client, email, set_clock, owner)
    assert set(owner_statuses) == {200}
    assert len(owner_statuses) >= 24
    in_an_hour = [sum(t <= u < t + HOUR for u in guesses) for t in guesses]
    assert 10 < max(in_an_hour) <= 60


def addresses(number):
    return [
        f"203.0.113.{host}" if host < 256 else f"198.51.100.{host - 256}" for host in range(number)
    ]


def test_many_networks_together_check_at_most_100_passwords_an_hour(
    client, tokens, email, set_clock
):
    owner = client_at(client, "192.0.2.1")
    assert login(owner, email).status_code == 200
    statuses = []
    for number, address in enumerate(addresses(260)):
        set_clock(seconds=number * 10)
        statuses.append(login(client_at(client, address), email, "wrong").status_code)
    assert statuses == [401] * 100 + [429] * 160
    assert login(owner, email).status_code == 200
    new_network = client_at(client, "192.0.2.2")
    wait = int(login(new_network, email).headers["Retry-After"])
    assert wait == HOUR - 2590
    set_clock(seconds=2590 + wait - 1)
    assert login(new_network, email).status_code == 429
    set_clock(seconds=2590 + wait)
    assert login(new_network, email).status_code == 200


def test_the_session_of_a_network_still_counts_after_a_refresh(client, tokens, email, set_clock):
    failures = [failure(address, 10) for address in addresses(100)]
    db.users.update_one({"email": email}, {"$set": {"login_failures": failures}})
    assert login(client_at(client, "192.0.2.2"), email).status_code == 429
    newest = refresh(client_at(client, "192.0.2.2"), tokens["refresh_token"]).json()
    assert login(client_at(client, "192.0.2.2"), email).status_code == 429
    assert login(client_at(client, ADDRESS), email).status_code == 200
    for session in (newest, login(client, email).json(), login(client, email).json()):
        logout(client, session["refresh_token"])
    db.users.update_one({"email": email}, {"$set": {"refresh_tokens": []}})
    assert login(client, email).status_code == 429


def failure(network, seconds_ago):
    """Return a failed login as it is stored."""
    return {"network": network, "failed_at": datetime.now(UTC) - timedelta(seconds=seconds_ago)}


@pytest.mark.parametrize(
    ("ages", "wait"),
    [
        ([0.0] * 4, None),
        ([HOUR] * 60, None),
        ([-HOUR] * 60, None),
        ([-1] * 60, None),
        ([0] * 5, 1),
        ([-60, *[0] * 5], 1),
        ([0] * 12, 128),
        ([0] * 17, HOUR),
        ([0] * 52, HOUR),
        ([0] * 100, HOUR),
        ([*[HOUR - 5] * 95, *[0] * 5], 5),
        ([*[HOUR - 5] * 95, *[0] * 12], 128),
        ([HOUR - 1.5, 0, 0, 0, 0], 1),
        ([HOUR - 0.5, 0, 0, 0, 0], 1),
    ],
)
def test_the_wait_is_at_most_an_hour_whatever_is_stored(client, tokens, email, ages, wait):
    stored = [failure(ADDRESS, age + 0.01 if age else 0) for age in ages]
    db.users.update_one({"email": email}, {"$set": {"login_failures": stored}})
    response = login(client, email)
    assert response.status_code == (429 if wait else 200)
    assert response.headers.get("Retry-After") == (str(wait) if wait else None)


def test_failures_of_one_network_do_not_delay_another(client, locked, email):
    assert login(client, email).status_code == 429
    assert login(client_at(client, "192.0.2.1"), email).status_code == 200
    assert login(client, email).status_code == 429


@pytest.mark.parametrize(
    ("address", "same_network", "other_network"),
    [
        ("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2"),
        ("::ffff:192.0.2.1", "192.0.2.1", "::ffff:192.0.2.2"),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::2", "fe81::1"),
        ("a\nforged line", "", "192.0.2.1"),
    ],
)
def test_the_addresses_of_a_network_share_its_failures(
    client, tokens, email, address, same_network, other_network
):
    for _ in range(5):
        login(client_at(client, address), email, "wrong")
    assert login(client_at(client, same_network), email).status_code == 429
    assert login(client_at(client, other_network), email).status_code == 200


@pytest.mark.parametrize(
    ("address", "logged"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:0:1::1", "2001:db8:0:1::"),
        ("fe80::1%\nforged", "fe80::"),
        ("192.0.2.1\nforged", "unknown"),
        ("host.example", "unknown"),
        ("", "unknown"),
    ],
)
def test_a_log_line_contains_a_valid_address_or_unknown(client, email, events, address, logged):
    login(client_at(client, address), email)
    assert events()[-1][1] == f"authn_login_fail user=unknown network={logged}"


@pytest.fixture
def locked(client, tokens, email):
    """The tokens of a user who has to wait after five wrong passwords."""
    for _ in range(5):
        login(client, email, "wrong")
    return tokens


def test_a_locked_account_responds_the_same_to_the_right_and_a_wrong_password(
    client, locked, email
):
    for password in (PASSWORD, "wrong"):
        response = login(client, email, password)
        assert (response.status_code, response.headers["Retry-After"]) == (429, "1")
        assert response.json() == {"detail": "Too many failed logins; try again later"}


def test_a_login_to_a_locked_account_hashes_nothing_and_does_not_prolong_the_wait(
    client, set_clock, locked, email, blocked_hasher
):
    for _ in range(3):
        assert login(client, email, "wrong").status_code == 429
    assert blocked_hasher.peak == 0
    assert len(stored_user(locked)["login_failures"]) == 5
    blocked_hasher.unblock.set()
    set_clock(seconds=1)
    assert login(client, email).status_code == 200


def test_a_locked_account_keeps_its_sessions(client, locked):
    assert me(client, locked["access_token"]).status_code == 200
    newer = refresh(client, locked["refresh_token"])
    assert newer.status_code == 200
    assert logout(client, newer.json()["refresh_token"]).status_code == 204


def test_a_locked_account_does_not_affect_other_accounts(client, locked, email):
    register(client, "other-" + email)
    assert login(client, "other-" + email).status_code == 200
    assert login(client, "unknown-" + email).status_code == 401


def test_the_right_password_removes_the_failures_of_its_network(client, tokens, email):
    login(client_at(client, "192.0.2.1"), email, "wrong")
    for _ in range(3):
        attempts = [login(client, email, "wrong") for _ in range(4)] + [login(client, email)]
        assert [response.status_code for response in attempts] == [401] * 4 + [200]
    networks = [failure["network"] for failure in stored_user(tokens)["login_failures"]]
    assert networks == ["192.0.2.1"]


def test_the_newest_100_failures_are_kept(client, tokens, email):
    old = [failure("192.0.2.1", 2 * HOUR) for _ in range(100)]
    db.users.update_one({"email": email}, {"$set": {"login_failures": old}})
    login(client, email, "wrong")
    networks = [failure["network"] for failure in stored_user(tokens)["login_failures"]]
    assert networks == ["192.0.2.1"] * 99 + [ADDRESS]


def test_a_document_with_the_failure_count_of_an_older_version_is_usable(client, tokens, email):
    old = {"failed_logins": {"count": 1000, "last": datetime.now(UTC)}}
    db.users.update_one({"email": email}, {"$set": old})
    assert [login(client, email, "wrong").status_code for _ in range(6)] == [401] * 5 + [429]
    assert login(client_at(client, "192.0.2.1"), email).status_code == 200


def test_wrong_passwords_for_an_unknown_email_are_never_limited(client, email):
    assert {login(client, email).status_code for _ in range(12)} == {401}
    assert register(client, email).status_code == 201
    assert login(client, email).status_code == 200


# Hash queue


def login_from(client, address, times, pool):
    """Start logins from an address, and wait until each has joined the queue or was rejected."""
    other_client = client_at(client, address)
    before = len(auth.hash_queue)
    logins = [
        pool.submit(login, other_client, f"{uuid.uuid4().hex}@example.com") for _ in range(times)
    ]
    deadline = datetime.now(UTC) + timedelta(seconds=10)
    while sum(login.done() for login in logins) + len(auth.hash_queue) - before < times:
        assert datetime.now(UTC) < deadline
    return logins


def accepted(logins):
    """Return how many of the logins were not rejected by the queue."""
    return [login.result().status_code for login in logins].count(401)


def test_a_client_gets_at_most_half_of_the_free_places_in_the_hash_queue(client, blocked_hasher):
    with ThreadPoolExecutor(40) as pool:
        addresses = ["192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4", "192.0.2.5"]
        logins = [login_from(client, address, 10, pool) for address in addresses[:3]]
        logins += [login_from(client, address, 1, pool) for address in addresses[3:]]
        logins.append(login_from(client, addresses[0], 1, pool))
        blocked_hasher.unblock.set()
        assert [accepted(each) for each in logins] == [8, 4, 2, 1, 1, 0]


def test_the_addresses_of_an_ipv6_network_share_their_places_in_the_hash_queue(
    client, blocked_hasher
):
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
            login_from(client, "::ffff:192.0.2.2", 1, pool),
        ]
        blocked_hasher.unblock.set()
        assert [accepted(each) for each in logins] == [8, 1]


@pytest.mark.parametrize("route", ["register", "login"])
def test_a_request_rejected_by_the_queue_gets_503_and_others_are_not_affected(
    client, tokens, email, route, monkeypatch
):
    monkeypatch.setattr(auth, "hash_queue", [ADDRESS] * 8)
    # The database is not used.
    with monkeypatch.context() as patch:
        patch.setattr(db, "users", None)
        response = client.post(f"/auth/{route}", json={"email": email, "password": PASSWORD})
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert response.json() == {"detail": "Too many requests at once; try again"}
    assert me(client, tokens["access_token"]).status_code == 200
    assert refresh(client, tokens["refresh_token"]).status_code == 200


def test_a_rejection_takes_half_a_second_and_does_not_delay_other_requests(
    client, tokens, monkeypatch
):
    monkeypatch.undo()
    monkeypatch.setattr(auth, "hash_queue", [ADDRESS] * 8)
    with ThreadPoolExecutor(1) as pool:
        rejected = pool.submit(login, client, "alice@example.com")
        while not rejected.done():
            assert me(client, tokens["access_token"]).status_code == 200
    assert rejected.result().elapsed > timedelta(seconds=0.5)


def test_a_request_without_a_client_address_is_accepted(client, tokens, email):
    anonymous_client = client_at(client, ADDRESS)
    anonymous_client._transport.client = None
    assert login(anonymous_client, email).status_code == 200


def test_a_place_in_the_hash_queue_is_always_released(client, tokens, email, monkeypatch):
    responses = [login(client, email), login(client, email, "wrong"), register(client, email)]
    responses.append(client.post("/auth/login", json={}))
    with monkeypatch.context() as patch:
        patch.setattr(db, "users", FailingCollection(ServerSelectionTimeoutError()))
        responses.append(login(client, email))
    assert [response.status_code for response in responses] == [200, 401, 409, 422, 503]
    assert auth.hash_queue == []


@pytest.mark.parametrize("route", ["register", "login"])
def test_at_most_two_passwords_are_hashed_at_the_same_time(
    client, tokens, email, route, blocked_hasher
):
    # A login also hashes, because the hash of this user has other parameters.
    old_hash = PasswordHasher(time_cost=2, memory_cost=8, parallelism=1).hash(PASSWORD)
    db.users.update_one({"email": email}, {"$set": {"password_hash": old_hash}})
    body = {"email": email, "password": PASSWORD}
    with ThreadPoolExecutor(8) as pool:
        requests = [pool.submit(client.post, f"/auth/{route}", json=body) for _ in range(8)]
        while len(auth.hash_queue) < 8 or blocked_hasher.running < 2:
            pass
        blocked_hasher.unblock.set()
        expected = {"login": 200, "register": 409}[route]
        assert {request.result().status_code for request in requests} == {expected}
    assert blocked_hasher.peak == 2


def set_threads(client, number):
    """Set the size of the thread pool in which FastAPI runs the routes."""

    async def set_total_tokens():
        anyio.to_thread.current_default_thread_limiter().total_tokens = number

    client.portal.call(set_total_tokens)


def test_a_login_that_waits_in_the_hash_queue_uses_no_thread(client, tokens, blocked_hasher):
    set_threads(client, 3)
    try:
        with ThreadPoolExecutor(8) as pool:
            login_from(client, "192.0.2.1", 8, pool)
            assert me(client, tokens["access_token"]).status_code == 200
            blocked_hasher.unblock.set()
    finally:
        set_threads(client, 40)


def test_a_login_rejected_by_the_queue_uses_no_thread(client, tokens, monkeypatch):
    monkeypatch.setattr(auth, "hash_queue", [ADDRESS] * 8)
    reached, unblock = Event(), Event()

    def find_user_by_session(*args):
        reached.set()
        unblock.wait(10)

    monkeypatch.setattr(db, "find_user_by_session", find_user_by_session)
    set_threads(client, 1)
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(me, client, tokens["access_token"])
            assert reached.wait(10)
            assert login(client, "alice@example.com").status_code == 503
            assert not unblock.is_set()
            unblock.set()
    finally:
        set_threads(client, 40)


# Me


def test_me_returns_the_current_user(client, tokens, email):
    response = me(client, tokens["access_token"])
    assert response.status_code == 200
    assert response.json().keys() == {"id", "email", "created_at"}
    assert (response.json()["id"], response.json()["email"]) == (tokens["user_id"], email)
    created_at = datetime.fromisoformat(response.json()["created_at"])
    assert created_at.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - created_at) < timedelta(minutes=1)


@pytest.mark.parametrize(
    "header", [{}, {"Authorization": "Bearer"}, {"Authorization": "Basic YTpi"}]
)
def test_a_request_without_a_token_gets_a_challenge_without_an_error(client, header):
    response = client.get("/auth/me", headers=header)
    assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")


def test_a_token_in_the_query_string_is_ignored(client, tokens):
    response = client.get("/auth/me", params={"access_token": tokens["access_token"]})
    assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")


def test_both_tokens_contain_the_same_claims_with_their_own_type_and_lifetime(client, tokens):
    access, refresh = claims_of(tokens["access_token"]), claims_of(tokens["refresh_token"])
    assert access.keys() == refresh.keys() == {"type", "sub", "sid", "generation", "exp"}
    assert (access["type"], refresh["type"]) == ("access", "refresh")
    assert access["sub"] == refresh["sub"] == tokens["user_id"]
    assert access["sid"] == refresh["sid"]
    assert access["generation"] == refresh["generation"] == 0
    now = datetime.now(UTC).timestamp()
    assert 0 <= now + 15 * 60 - access["exp"] < 60
    assert refresh["exp"] - access["exp"] == 7 * 24 * 60 * 60 - 15 * 60


def test_an_access_token_expires_after_15_minutes(client, tokens, set_clock):
    set_clock(minutes=14, seconds=58)
    assert me(client, tokens["access_token"]).status_code == 200
    set_clock(minutes=15)
    assert is_invalid_token(me(client, tokens["access_token"]))


def test_a_token_from_a_host_whose_clock_is_ahead_is_accepted(client, email, set_clock):
    set_clock(hours=1)
    tokens = register(client, email).json()
    set_clock(hours=0)
    assert me(client, tokens["access_token"]).status_code == 200
    assert refresh(client, tokens["refresh_token"]).status_code == 200


def test_the_tokens_of_a_deleted_user_are_invalid(client, tokens, email):
    db.users.delete_one({"email": email})
    assert is_invalid_token(me(client, tokens["access_token"]))
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))
    assert logout(client, tokens["refresh_token"]).status_code == 204


def test_a_token_of_the_wrong_type_is_invalid(client, tokens):
    assert is_invalid_token(me(client, tokens["refresh_token"]))
    assert is_invalid_token(refresh(client, tokens["access_token"]))
    assert is_invalid_token(logout(client, tokens["access_token"]))
    assert me(client, tokens["access_token"]).status_code == 200


# Forged tokens: each is made from the claims of a valid token


def encoded(part):
    part = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def signed(claims, key=None, algorithm="HS256", **header):
    return jwt.encode(claims, key or auth.SECRET_KEY, algorithm, header)


def with_header(claims, header):
    """Return a token with a header that PyJWT would not write, signed with the right key."""
    signing_input = f"{encoded(header)}.{encoded(claims)}"
    signature = jwt.get_algorithm_by_name("HS256").sign(signing_input.encode(), auth.SECRET_KEY)
    return f"{signing_input}.{encoded(signature)}"


def without(claims, name):
    return {key: value for key, value in claims.items() if key != name}


def tampered(claims, part):
    parts = signed(claims).split(".")
    parts[part] = ("A" if parts[part][0] != "A" else "B") + parts[part][1:]
    return ".".join(parts)


HS256 = {"alg": "HS256"}
NESTED = b"[" * 2000 + b"]" * 2000
FORGERIES = {
    "alg none": lambda c: f"{encoded({'alg': 'none'})}.{encoded(c)}.",
    "alg None": lambda c: f"{encoded({'alg': 'None'})}.{encoded(c)}.",
    "alg NONE": lambda c: f"{encoded({'alg': 'NONE'})}.{encoded(c)}.",
    "alg nOnE with a signature": lambda c: with_header(c, {"alg": "nOnE"}),
    "alg hs256": lambda c: with_header(c, {"alg": "hs256"}),
    "alg missing": lambda c: with_header(c, {"typ": "JWT"}),
    "alg a list": lambda c: with_header(c, {"alg": ["HS256"]}),
    "HS384": lambda c: signed(c, auth.SECRET_KEY * 2, "HS384"),
    "HS512": lambda c: signed(c, auth.SECRET_KEY * 2, "HS512"),
    "RS256 in the header": lambda c: with_header(c, {"alg": "RS256"}),
    "another key": lambda c: signed(c, "another key that is long enough to pass"),
    "the kid of another key": lambda c: signed(c, "\0" * 32, kid="../../../dev/null"),
    "a kid that is not a string": lambda c: with_header(c, {"alg": "HS256", "kid": 1}),
    "an embedded key": lambda c: signed(c, "k" * 32, jwk={"k": encoded(b"k" * 32)}),
    "a critical extension": lambda c: signed(c, crit=["exp"], exp=1),
    "an unencoded payload": lambda c: with_header(c, HS256 | {"b64": False, "crit": ["b64"]}),
    "header tampered": lambda c: tampered(c, 0),
    "payload tampered": lambda c: tampered(c, 1),
    "signature tampered": lambda c: tampered(c, 2),
    "signature missing": lambda c: signed(c).rsplit(".", 1)[0] + ".",
    "two parts": lambda c: signed(c).rsplit(".", 1)[0],
    "four parts": lambda c: signed(c) + ".x",
    "not a token": lambda c: "x",
    "header deeply nested": lambda c: with_header(c, b'{"alg":' + NESTED + b"}"),
    "payload deeply nested": lambda c: with_header(b'{"sub":' + NESTED + b"}", HS256),
    "payload not an object": lambda c: with_header([c], HS256),
    "payload not JSON": lambda c: with_header(b"{", HS256),
    "payload not UTF-8": lambda c: with_header(b'{"sub": "\xff"}', HS256),
    "a number of 5000 digits": lambda c: with_header(b'{"exp":' + b"9" * 5000 + b"}", HS256),
    "6000 characters": lambda c: "x" * 6000,
    "not UTF-8": lambda c: b"\xff\xfe\x00".decode("latin-1").strip("\0"),
    "exp infinite": lambda c: with_header(c | {"exp": float("inf")}, HS256),
    "exp a string": lambda c: signed(c | {"exp": str(c["exp"])}),
    "exp true": lambda c: signed(c | {"exp": True}),
    "exp a fraction": lambda c: signed(c | {"exp": c["exp"] + 0.5}),
    "not valid yet": lambda c: signed(c | {"nbf": c["exp"]}),
    "sub a number": lambda c: signed(c | {"sub": 1}),
    "sub no ObjectId": lambda c: signed(c | {"sub": "alice"}),
    "sub not hexadecimal": lambda c: signed(c | {"sub": "z" * 24}),
    "sub an operator": lambda c: signed(c | {"sub": {"$ne": None}}),
    "type unknown": lambda c: signed(c | {"type": "id"}),
    "type a list": lambda c: signed(c | {"type": [c["type"]]}),
    "sid an operator": lambda c: signed(c | {"sid": {"$ne": None}}),
    "sid a lone surrogate": lambda c: signed(c | {"sid": "\ud800"}),
    "sid of 33 characters": lambda c: signed(c | {"sid": c["sid"] + "0"}),
    "sub of 25 characters": lambda c: signed(c | {"sub": c["sub"] + "0"}),
    "short sid": lambda c: signed(c | {"sid": "x"}),
    "generation a string": lambda c: signed(c | {"generation": "0"}),
    "generation true": lambda c: signed(c | {"generation": True}),
    "generation negative": lambda c: signed(c | {"generation": -1}),
    "generation 2**31": lambda c: signed(c | {"generation": 2**31}),
    "generation of 100 digits": lambda c: signed(c | {"generation": 10**100}),
    "for another audience": lambda c: signed(c | {"aud": "someone else"}),
}
for name in ("type", "sub", "sid", "generation", "exp"):
    FORGERIES[f"{name} missing"] = lambda c, name=name: signed(without(c, name))


@pytest.mark.parametrize("sign", [signed, lambda claims: with_header(claims, {"alg": "HS256"})])
def test_a_token_with_the_same_claims_and_key_is_valid(client, tokens, sign):
    assert me(client, sign(claims_of(tokens["access_token"]))).status_code == 200
    assert refresh(client, sign(claims_of(tokens["refresh_token"]))).status_code == 200


@pytest.mark.parametrize("generation", [1, 2**31 - 1])
def test_an_access_token_is_valid_in_any_generation(client, other_user, generation):
    claims = claims_of(other_user["access_token"]) | {"generation": generation}
    assert me(client, signed(claims)).status_code == 200


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forged_access_token_is_invalid(client, other_user, forge):
    forged = forge(claims_of(other_user["access_token"]))
    header = {"Authorization": b"Bearer " + forged.encode("latin-1")}
    assert is_invalid_token(client.get("/auth/me", headers=header))


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forged_refresh_token_is_invalid(client, other_user, forge):
    forged = forge(claims_of(other_user["refresh_token"]))
    assert is_invalid_token(refresh(client, forged))
    assert is_invalid_token(logout(client, forged))
    assert me(client, other_user["access_token"]).status_code == 200


def test_a_token_of_an_unknown_user_is_invalid(client, other_user):
    unknown = {"sub": "0" * 24}
    assert is_invalid_token(me(client, signed(claims_of(other_user["access_token"]) | unknown)))
    forged = signed(claims_of(other_user["refresh_token"]) | unknown)
    assert is_invalid_token(refresh(client, forged))
    assert logout(client, forged).status_code == 204


# Refresh and logout


def test_refresh_returns_a_new_pair_of_tokens_of_the_same_session(client, tokens):
    response = refresh(client, tokens["refresh_token"])
    assert response.status_code == 200
    assert response.json().keys() == {"user_id", "access_token", "refresh_token"}
    assert response.json()["user_id"] == tokens["user_id"]
    assert me(client, response.json()["access_token"]).status_code == 200
    before = claims_of(tokens["refresh_token"])
    after = claims_of(response.json()["refresh_token"])
    assert (after["sid"], after["generation"]) == (before["sid"], before["generation"] + 1)


def test_each_refresh_advances_the_generation_by_one(client, tokens):
    for generation in range(1, 6):
        tokens = refresh(client, tokens["refresh_token"]).json()
        assert claims_of(tokens["refresh_token"])["generation"] == generation


def test_a_refresh_token_expires_7_days_after_the_last_refresh(client, tokens, set_clock):
    set_clock(days=6)
    second = refresh(client, tokens["refresh_token"]).json()
    set_clock(days=12, hours=23)
    third = refresh(client, second["refresh_token"])
    assert third.status_code == 200
    set_clock(days=20)
    assert is_invalid_token(refresh(client, third.json()["refresh_token"]))


def test_an_expired_refresh_token_ends_its_session(client, email, set_clock, events):
    for end_session in (refresh, logout):
        set_clock(days=0)
        tokens = register(client, end_session.__name__ + email).json()
        events().clear()
        set_clock(days=7)
        assert end_session(client, tokens["refresh_token"]).status_code in (401, 204)
        assert stored_user(tokens)["refresh_tokens"] == []
    assert [level for level, _ in events()] == ["WARNING", "INFO"] * 2


@pytest.mark.parametrize("end_session", [refresh, logout])
def test_an_expired_refresh_token_reveals_a_thief_who_has_used_it(
    client, tokens, set_clock, events, end_session
):
    stolen = tokens
    for day in (0, 3, 6):
        set_clock(days=day)
        stolen = refresh(client, stolen["refresh_token"]).json()
    set_clock(days=8)
    end_session(client, tokens["refresh_token"])
    assert is_invalid_token(refresh(client, stolen["refresh_token"]))
    assert [level for level, _ in events()][-1] == "CRITICAL"


def test_twelve_simultaneous_refreshes_rotate_the_session_once(client, tokens):
    responses = in_parallel(lambda: refresh(client, tokens["refresh_token"]), 12)
    assert [response.status_code for response in responses] == [200] * 12
    newer = [claims_of(response.json()["refresh_token"]) for response in responses]
    assert {claims["generation"] for claims in newer} == {1}
    assert [session["generation"] for session in stored_user(tokens)["refresh_tokens"]] == [1]
    assert refresh(client, responses[0].json()["refresh_token"]).status_code == 200


def test_the_previous_token_returns_the_current_generation_for_60_seconds(
    client, tokens, set_clock, events
):
    refresh(client, tokens["refresh_token"])
    set_clock(seconds=59)
    again = refresh(client, tokens["refresh_token"]).json()
    assert claims_of(again["refresh_token"])["generation"] == 1
    assert [session["generation"] for session in stored_user(tokens)["refresh_tokens"]] == [1]
    assert me(client, again["access_token"]).status_code == 200
    session = claims_of(again["access_token"])["sid"]
    message = f"authn_token_reuse_in_grace user={tokens['user_id']} session={session}"
    assert events() == [("INFO", message)]
    assert refresh(client, again["refresh_token"]).status_code == 200


@pytest.mark.parametrize("seconds", [60, -60])
def test_the_previous_token_ends_its_session_after_60_seconds_or_if_the_clock_was_set_back(
    client, tokens, email, set_clock, seconds
):
    other_session = login(client, email).json()
    other_user = register(client, "other-" + email).json()
    newest = refresh(client, tokens["refresh_token"]).json()
    set_clock(seconds=seconds)
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))
    assert is_invalid_token(me(client, newest["access_token"]))
    assert is_invalid_token(refresh(client, newest["refresh_token"]))
    for unaffected in (other_session, other_user):
        assert me(client, unaffected["access_token"]).status_code == 200
        assert refresh(client, unaffected["refresh_token"]).status_code == 200


@pytest.mark.parametrize(("seconds", "level"), [(59, "INFO"), (60, "CRITICAL")])
def test_logout_with_a_replaced_token_is_logged_as_reuse_after_the_grace(
    client, tokens, set_clock, events, seconds, level
):
    refresh(client, tokens["refresh_token"])
    set_clock(seconds=seconds)
    assert logout(client, tokens["refresh_token"]).status_code == 204
    assert events()[-1][0] == level


def test_a_token_that_was_replaced_twice_ends_its_session_at_any_time(client, tokens):
    second = refresh(client, tokens["refresh_token"]).json()
    third = refresh(client, second["refresh_token"]).json()
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))
    assert is_invalid_token(refresh(client, third["refresh_token"]))
    assert is_invalid_token(me(client, third["access_token"]))


def test_a_token_of_a_generation_that_was_never_issued_ends_its_session(client, tokens):
    unknown = signed(claims_of(tokens["refresh_token"]) | {"generation": 5})
    assert is_invalid_token(refresh(client, unknown))
    assert is_invalid_token(me(client, tokens["access_token"]))


def test_logout_returns_204_and_ends_only_its_session(client, tokens, email):
    other_session = login(client, email).json()
    response = logout(client, tokens["refresh_token"])
    assert (response.status_code, response.content) == (204, b"")
    assert "Content-Type" not in response.headers
    assert is_invalid_token(me(client, tokens["access_token"]))
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))
    assert me(client, other_session["access_token"]).status_code == 200


def test_logout_accepts_an_older_token_and_a_session_that_has_ended(client, tokens):
    newest = refresh(client, tokens["refresh_token"]).json()
    assert logout(client, tokens["refresh_token"]).status_code == 204
    assert logout(client, newest["refresh_token"]).status_code == 204
    assert is_invalid_token(me(client, newest["access_token"]))


# Request bodies

SECRET = "hunter2-hunter2"
BAD_BODIES = {
    "empty": b"",
    "not JSON": b'{"email": "' + SECRET.encode(),
    "another encoding": f'{{"email": "{SECRET}ü"}}'.encode("latin-1"),
    "a list": json.dumps([SECRET]).encode(),
    "a string": json.dumps(SECRET).encode(),
    "null": b"null",
    "no fields": b"{}",
    "numbers": b'{"email": 1, "password": 2, "refresh_token": 3}',
    "NaN": b'{"email": NaN, "password": NaN, "refresh_token": NaN}',
    "Infinity": b'{"email": Infinity, "password": -Infinity, "refresh_token": Infinity}',
    "null fields": b'{"email": null, "password": null, "refresh_token": null}',
    "operators": b'{"email": {"$ne": ""}, "password": {"$ne": ""}, "refresh_token": {"$ne": ""}}',
    "lone surrogates": rb'{"email": "\ud800@b.com", "password": "\ud800hunter2-Hunter2"}',
    "deeply nested": b'{"email": ' + b"[" * 4000 + b"]" * 4000 + b"}",
    "a number of 5000 digits": b'{"email": ' + b"9" * 5000 + b"}",
}
UNDECODABLE_BODIES = [
    BAD_BODIES[name] for name in ("another encoding", "deeply nested", "a number of 5000 digits")
]


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
@pytest.mark.parametrize("route", ["register", "login", "refresh", "logout"])
def test_the_response_to_a_malformed_body_does_not_quote_it(client, route, body):
    response = client.post(f"/auth/{route}", content=body, headers=AS_JSON)
    assert "unter2" not in response.text
    if body in UNDECODABLE_BODIES:
        expected = {"detail": "There was an error parsing the body"}
        assert (response.status_code, response.json()) == (400, expected)
    else:
        assert response.status_code == 422
        for error in response.json()["detail"]:
            assert error.keys() == {"loc", "msg", "type"}


@pytest.mark.parametrize("route", ["register", "login"])
@pytest.mark.parametrize("field", ["email", "password"])
@pytest.mark.parametrize("surrogate", ["\ud800", "\udfff"])
def test_a_field_with_a_lone_surrogate_is_rejected(client, email, route, field, surrogate):
    body = json.dumps({"email": email, "password": PASSWORD} | {field: surrogate + PASSWORD})
    response = client.post(f"/auth/{route}", content=body, headers=AS_JSON)
    assert response.status_code == 422
    assert [error["loc"] for error in response.json()["detail"]] == [["body", field]]


def test_a_nul_character_is_allowed_in_a_password_only(client, email):
    password = f"{PASSWORD}\0\0"
    assert register(client, email, password).status_code == 201
    assert login(client, email, password).status_code == 200
    assert login(client, email, PASSWORD).status_code == 401
    assert register(client, f"\0{email}").status_code == 422
    assert is_invalid_token(refresh(client, "\0"))


def test_a_lone_surrogate_is_an_invalid_token(client):
    body = rb'{"refresh_token": "\ud800"}'
    assert is_invalid_token(client.post("/auth/refresh", content=body, headers=AS_JSON))


@pytest.mark.parametrize("route", ["register", "login", "refresh", "logout"])
def test_a_body_over_8_kib_is_rejected_with_and_without_a_content_length(client, route):
    for size, expected in ((8 * 1024, 422), (8 * 1024 + 1, 413)):
        for content in (b" " * size, iter([b" " * size])):
            response = client.post(f"/auth/{route}", content=content, headers=AS_JSON)
            assert response.status_code == expected


def test_an_endless_body_is_not_read_to_its_end(client):
    chunks_read, sent = [], []

    async def receive():
        chunks_read.append(1)
        return {"type": "http.request", "body": b" " * 1024, "more_body": True}

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/auth/login", "query_string": b""}
    client.portal.call(app.app, scope | {"headers": headers}, receive, send)
    assert (sent[0]["status"], len(chunks_read)) == (413, 9)


# All responses


def test_no_successful_response_is_cached(client, email):
    tokens = register(client, email)
    responses = [tokens, login(client, email), me(client, tokens.json()["access_token"])]
    responses.append(refresh(client, tokens.json()["refresh_token"]))
    responses.append(logout(client, tokens.json()["refresh_token"]))
    assert [response.headers["Cache-Control"] for response in responses] == ["no-store"] * 5


def test_the_docs_page_has_an_authorize_button(client):
    assert client.get("/docs").status_code == 200
    document = client.get("/openapi.json").json()
    schemes = document["components"]["securitySchemes"]
    assert "access_token" in schemes["HTTPBearer"].pop("description")
    assert schemes == {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
    assert document["paths"]["/auth/me"]["get"]["security"] == [{"HTTPBearer": []}]


def test_the_openapi_document_lists_all_responses(client):
    paths = client.get("/openapi.json").json()["paths"]
    responses = {
        operation["operationId"]: set(operation["responses"])
        for path in paths.values()
        for operation in path.values()
    }
    assert responses == {
        "register": {"201", "400", "409", "413", "422", "503"},
        "login": {"200", "400", "401", "413", "422", "429", "503"},
        "me": {"200", "401", "413", "503"},
        "refresh": {"200", "400", "401", "413", "422", "503"},
        "logout": {"204", "400", "401", "413", "422", "503"},
    }


def test_the_openapi_document_has_a_schema_for_each_error(client):
    document = client.get("/openapi.json").json()
    for path in document["paths"].values():
        for operation in path.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400 and status not in ("413", "422"):
                    (content,) = response["content"].values()
                    assert content["schema"] == {"$ref": "#/components/schemas/Error"}
    assert document["components"]["schemas"]["Error"]["properties"]["detail"]["type"] == "string"


def test_the_repr_of_a_request_contains_no_secret():
    for body in (
        app.Credentials(email="a@example.com", password=PASSWORD),
        app.NewCredentials(email="a@example.com", password=PASSWORD),
        app.RefreshToken(refresh_token=PASSWORD),
    ):
        assert PASSWORD not in repr(body) + str(body)


def test_the_examples_in_the_openapi_document_are_valid(client):
    db.users.delete_one({"email": "alice@example.com"})
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    fields = schemas["NewCredentials"]["properties"]
    example = {name: field["examples"][0] for name, field in fields.items()}
    assert client.post("/auth/register", json=example).status_code == 201
    assert client.post("/auth/login", json=example).status_code == 200


# Security events


def test_each_security_event_is_logged_with_the_level_of_the_owasp_vocabulary(
    client, email, events
):
    tokens = register(client, email).json()
    user_id = tokens["user_id"]
    first = claims_of(tokens["access_token"])["sid"]
    newer = login(client, email).json()
    second = claims_of(newer["access_token"])["sid"]
    for _ in range(5):
        login(client, email, "wrong")
    login(client, email)
    login(client, "unknown-" + email)
    logout(client, tokens["refresh_token"])
    newest = refresh(client, refresh(client, newer["refresh_token"]).json()["refresh_token"])
    assert is_invalid_token(refresh(client, newer["refresh_token"]))
    failure = ("WARNING", f"authn_login_fail user={user_id} network={ADDRESS}")
    assert events() == [
        ("WARNING", f"user_created user={user_id} session={first} network={ADDRESS}"),
        ("INFO", f"authn_login_success user={user_id} session={second} network={ADDRESS}"),
        *[failure] * 5,
        ("WARNING", f"authn_login_lock user={user_id} network={ADDRESS}"),
        ("WARNING", f"authn_login_fail user=unknown network={ADDRESS}"),
        ("INFO", f"authn_token_revoked user={user_id} session={first}"),
        ("CRITICAL", f"authn_token_reuse user={user_id} session={second}"),
    ]
    for secret in (PASSWORD, email, *tokens.values(), *newest.json().values()):
        assert secret == user_id or secret not in str(events())


def test_an_event_is_not_logged_again_when_the_session_has_ended(client, tokens, events):
    logout(client, tokens["refresh_token"])
    logout(client, tokens["refresh_token"])
    refresh(client, tokens["refresh_token"])
    assert [message.split()[0] for _, message in events()] == ["authn_token_revoked"]


def test_two_simultaneous_replays_are_logged_once(client, tokens, events, monkeypatch):
    refresh(client, refresh(client, tokens["refresh_token"]).json()["refresh_token"])
    run_in_pairs(monkeypatch, "delete_session")
    responses = in_parallel(lambda: refresh(client, tokens["refresh_token"]), 2)
    assert all(is_invalid_token(response) for response in responses)
    assert [level for level, _ in events()] == ["CRITICAL"]


# Unavailable database


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

    find_one = insert_one = update_one = find_one_and_update = create_index = operate

    def with_options(self, **options):
        return self


def test_requests_that_need_the_database_get_503_without_it(client, tokens, email, database_down):
    responses = [register(client, "new-" + email), login(client, email)]
    responses.append(me(client, tokens["access_token"]))
    responses.append(refresh(client, tokens["refresh_token"]))
    responses.append(logout(client, tokens["refresh_token"]))
    for response in responses:
        assert (response.status_code, response.headers["Retry-After"]) == (503, "2")
        assert response.json() == {"detail": "The database is unavailable; try again"}


def test_requests_that_do_not_need_the_database_work_without_it(client, database_down):
    assert client.post("/auth/login", json={"email": "x"}).status_code == 422
    assert is_invalid_token(me(client, "x"))
    assert is_invalid_token(refresh(client, "x"))


def test_an_open_breaker_allows_one_attempt_per_second(client, tokens, events, monkeypatch):
    time = 1000.0
    monkeypatch.setattr(db, "monotonic", lambda: time)
    monkeypatch.setattr(db, "last_success", 0.0)
    collection = FailingCollection(ServerSelectionTimeoutError("127.0.0.1:27017: refused"))
    with monkeypatch.context() as patch:
        patch.setattr(db, "users", collection)
        attempts = []
        for _ in range(8):
            assert me(client, tokens["access_token"]).status_code == 503
            attempts.append(collection.operations)
            time += 0.5
        assert attempts == [1, 1, 2, 2, 3, 3, 4, 4]
    assert me(client, tokens["access_token"]).status_code == 200
    assert me(client, tokens["access_token"]).status_code == 200
    assert [level for level, _ in events()] == ["ERROR"]


@pytest.mark.parametrize(
    "query",
    [
        db.create_user,
        db.find_user_by_email,
        db.find_user_by_session,
        db.replace_password_hash,
        db.record_failed_login,
        db.add_session,
        db.advance_session,
        db.find_session,
        db.delete_session,
    ],
)
def test_no_query_runs_while_the_breaker_is_open(query, monkeypatch):
    monkeypatch.setattr(db, "next_attempt", db.monotonic() + 60)
    with pytest.raises(db.DatabaseUnavailable):
        query()


def test_a_query_from_before_the_last_response_does_not_open_the_breaker(
    client, tokens, monkeypatch
):
    monkeypatch.setattr(db, "memory_lock", nullcontext())
    reached, unblock = Event(), Event()

    def fail_late():
        reached.set()
        unblock.wait(10)
        raise ServerSelectionTimeoutError

    with ThreadPoolExecutor(1) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(db, "users", FailingCollection(fail_late))
            late = pool.submit(me, client, tokens["access_token"])
            assert reached.wait(10)
        assert me(client, tokens["access_token"]).status_code == 200
        unblock.set()
        assert late.result().status_code == 503
    assert me(client, tokens["access_token"]).status_code == 200


@pytest.mark.parametrize(("seconds", "operations"), [(1.0, 2), (1.1, 1)])
def test_failures_open_the_breaker_a_second_after_the_last_success(
    client, tokens, monkeypatch, seconds, operations
):
    monkeypatch.setattr(db, "monotonic", lambda: 100.0)
    assert me(client, tokens["access_token"]).status_code == 200
    monkeypatch.setattr(db, "monotonic", lambda: 100.0 + seconds)
    collection = FailingCollection(ServerSelectionTimeoutError())
    monkeypatch.setattr(db, "users", collection)
    for _ in range(2):
        assert me(client, tokens["access_token"]).status_code == 503
    assert collection.operations == operations


def test_only_503_and_200_are_returned_while_the_breaker_opens_and_closes(
    client, tokens, frequent_thread_switches, monkeypatch
):
    monkeypatch.setattr(db, "memory_lock", nullcontext())
    monkeypatch.setattr(db, "RETRY_INTERVAL", 0.001)
    users, failing = db.users, FailingCollection(ServerSelectionTimeoutError())
    statuses = []

    def request_often():
        for _ in range(40):
            monkeypatch.setattr(db, "users", failing if len(statuses) % 3 else users)
            statuses.append(me(client, tokens["access_token"]).status_code)

    in_parallel(request_often, 16)
    monkeypatch.setattr(db, "users", users)
    assert set(statuses) == {200, 503}


def test_a_permanent_server_error_is_500_and_does_not_open_the_breaker(
    client, tokens, events, monkeypatch
):
    details = {"codeName": "Unauthorized"}
    failing = FailingCollection(OperationFailure("secret document", 13, details))
    monkeypatch.setattr(db, "users", failing)
    for attempt in range(1, 4):
        response = me(client, tokens["access_token"])
        assert (response.status_code, response.json()) == (500, {"detail": "Internal server error"})
        assert "Retry-After" not in response.headers
        assert failing.operations == attempt
    assert refresh(client, tokens["refresh_token"]).status_code == 500
    assert events() == [("ERROR", "MongoDB returned an error: Unauthorized")] * 4


def test_an_error_of_the_server_closes_the_breaker(client, tokens, monkeypatch):
    monkeypatch.setattr(db, "monotonic", lambda: 100.0)
    monkeypatch.setattr(db, "next_attempt", 99.0)
    with monkeypatch.context() as patch:
        patch.setattr(db, "users", FailingCollection(OperationFailure("secret document", 13)))
        assert me(client, tokens["access_token"]).status_code == 500
    assert me(client, tokens["access_token"]).status_code == 200


@pytest.mark.parametrize(
    "error",
    [
        ExecutionTimeout("secret document", 50, {"codeName": "MaxTimeMSExpired"}),
        OperationFailure("secret document", 11602, {"errorLabels": ["RetryableWriteError"]}),
    ],
)
def test_a_temporary_server_error_is_503(client, tokens, monkeypatch, error):
    monkeypatch.setattr(db, "users", FailingCollection(error))
    response = me(client, tokens["access_token"])
    assert (response.status_code, response.headers["Retry-After"]) == (503, "2")
    assert response.json() == {"detail": "The database is unavailable; try again"}


def test_queries_run_one_at_a_time_in_memory_and_in_parallel_on_mongodb(
    client, tokens, monkeypatch
):
    both = Barrier(2)

    def find_none():
        try:
            both.wait(0.3 if not TEST_MONGO_URI else 10)
        except BrokenBarrierError:
            alone.append(True)

    alone = []
    monkeypatch.setattr(db, "users", FailingCollection(find_none))
    in_parallel(lambda: me(client, tokens["access_token"]), 2)
    assert bool(alone) == (not TEST_MONGO_URI)


# Documents from other programs

only_mongodb = pytest.mark.skipif(
    not TEST_MONGO_URI, reason="mongomock fails on sessions that are not objects"
)


@only_mongodb
def test_malformed_sessions_are_ignored_and_dropped(client, tokens, email):
    raw_tokens = [tokens["refresh_token"], None, 1, {}, {"sid": 1}, {"token": "x"}] + ["x"] * 13
    db.users.update_one({"email": email}, {"$push": {"refresh_tokens": {"$each": raw_tokens}}})
    newer = refresh(client, tokens["refresh_token"]).json()
    assert me(client, newer["access_token"]).status_code == 200
    assert refresh(client, tokens["refresh_token"]).status_code == 200
    sessions = [login(client, email).json() for _ in range(20)]
    assert all("sid" in session for session in stored_user(tokens)["refresh_tokens"])
    assert logout(client, sessions[0]["refresh_token"]).status_code == 204


RAW_TOKENS = pytest.param({"refresh_tokens": ["raw"]}, marks=only_mongodb)


@pytest.mark.parametrize("sessions", [{}, {"refresh_tokens": []}, RAW_TOKENS])
def test_a_document_without_sessions_is_usable(client, email, sessions):
    password_hash = CHEAP_HASHER.hash(PASSWORD)
    db.users.insert_one({"email": email, "password_hash": password_hash} | sessions)
    tokens = login(client, email).json()
    assert me(client, tokens["access_token"]).status_code == 200
    for _ in range(2):
        assert refresh(client, tokens["refresh_token"]).status_code == 200
    for token in ("raw", signed(claims_of(tokens["refresh_token"]) | {"sid": "0" * 32})):
        assert is_invalid_token(refresh(client, token))
    assert logout(client, tokens["refresh_token"]).status_code == 204
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))


def test_a_token_for_a_document_without_sessions_is_invalid(client, tokens, email):
    db.users.update_one({"email": email}, {"$unset": {"refresh_tokens": ""}})
    assert is_invalid_token(me(client, tokens["access_token"]))
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))
    assert logout(client, tokens["refresh_token"]).status_code == 204


@pytest.mark.parametrize("created_at", [None, "2020-01-01", 1])
def test_created_at_falls_back_to_the_time_in_the_object_id(client, tokens, email, created_at):
    db.users.update_one({"email": email}, {"$set": {"created_at": created_at}})
    response = me(client, tokens["access_token"]).json()
    expected = ObjectId(tokens["user_id"]).generation_time
    assert datetime.fromisoformat(response["created_at"]) == expected


def test_a_naive_created_at_is_in_utc(client, tokens, email):
    db.users.update_one({"email": email}, {"$set": {"created_at": datetime(2020, 1, 1)}})
    assert me(client, tokens["access_token"]).json()["created_at"] == "2020-01-01T00:00:00Z"


@pytest.mark.parametrize("change", [{"$unset": {"email": ""}}, {"$set": {"email": 1}}])
def test_the_tokens_of_a_document_without_an_email_are_invalid(client, email, change):
    tokens = register(client, email).json()
    db.users.update_one({"email": email}, change)
    assert is_invalid_token(me(client, tokens["access_token"]))
    db.users.delete_one({"_id": ObjectId(tokens["user_id"])})


# Embedding


def test_another_app_can_include_the_router_and_use_the_current_user(
    email, cheap_hasher, empty_collection, monkeypatch
):
    outer = FastAPI()
    outer.include_router(app.router)

    @outer.get("/mine")
    def mine(user: auth.CurrentUser):
        return {"owner": user.email}

    with TestClient(outer) as client:
        assert db.users.index_information()["email_1"]["unique"]
        bearer = {"Authorization": f"Bearer {register(client, email).json()['access_token']}"}
        assert client.get("/mine", headers=bearer).json() == {"owner": email}
        assert client.get("/mine").status_code == 401
        assert is_invalid_token(client.get("/mine", headers={"Authorization": "Bearer x"}))
        bad_body = {"email": SECRET, "password": [SECRET]}
        assert SECRET not in client.post("/auth/login", json=bad_body).text
        monkeypatch.setattr(db, "users", FailingCollection(ServerSelectionTimeoutError()))
        assert client.get("/mine", headers=bearer).status_code == 503
        assert login(client, email).status_code == 503


def test_the_error_handlers_of_another_app_apply(cheap_hasher):
    outer = FastAPI()
    outer.include_router(app.router)

    @outer.exception_handler(RequestValidationError)
    def handle(request, error):
        return JSONResponse({"errors": error.errors()}, 418)

    response = TestClient(outer).post("/auth/login", json={"email": "x", "password": [SECRET]})
    assert response.status_code == 418
    assert [error["loc"] for error in response.json()["errors"]] == [
        ["body", "email"],
        ["body", "password"],
    ]
    assert SECRET not in response.text


def test_a_400_of_a_dependency_of_another_app_stays_a_400(cheap_hasher):
    def reject():
        raise HTTPException(400, "Not today")

    outer = FastAPI()
    outer.include_router(app.router, dependencies=[Depends(reject)])
    response = TestClient(outer).post("/auth/login", json={})
    assert (response.status_code, response.json()) == (400, {"detail": "Not today"})


def test_the_operation_ids_stay_short_in_another_app():
    outer = FastAPI()
    outer.include_router(app.router, prefix="/api")
    paths = outer.openapi()["paths"].values()
    ids = [operation["operationId"] for path in paths for operation in path.values()]
    assert ids == ["register", "login", "me", "refresh", "logout"]


def test_the_hash_queue_works_on_two_event_loops(email, cheap_hasher, blocked_hasher):
    with TestClient(app.app) as one, TestClient(app.app) as two, ThreadPoolExecutor(8) as pool:
        clients = [client_at(loop, f"192.0.2.{i}") for i in range(4) for loop in (one, two)]
        logins = [pool.submit(login, client, f"{i}-{email}") for i, client in enumerate(clients)]
        # Two on each event loop.
        while len(auth.hash_queue) < 8 or blocked_hasher.running < 4:
            pass
        blocked_hasher.unblock.set()
        assert [login.result().status_code for login in logins] == [401] * 8
    assert blocked_hasher.peak == 4
    assert auth.hash_queue == []


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_emails_are_unique_without_a_lifespan(email, cheap_hasher, empty_collection, prefix):
    outer = FastAPI()
    outer.mount("/api", app.app)
    client = TestClient(outer if prefix else app.app, base_url=f"http://testserver{prefix}")
    assert [register(client, email).status_code for _ in range(2)] == [201, 409]


# mongomock 4.3 uses a deprecated signature when it finds a duplicate.
ignore_deprecated_throw = pytest.mark.filterwarnings("ignore:the .type, exc, tb. signature")


@ignore_deprecated_throw
def test_duplicate_emails_without_a_lifespan_are_500(email, cheap_hasher, empty_collection, events):
    empty_collection.insert_many([{"email": "twice"}, {"email": "twice"}])
    assert register(TestClient(app.app), email).status_code == 500
    assert len(events()) == 1


# CORS

ORIGIN = "http://localhost:5173"


def cors_client(monkeypatch, origins):
    """Return a client of an app that was started with this CORS_ORIGINS."""
    monkeypatch.setenv("CORS_ORIGINS", origins)
    own_app = runpy.run_path(str(HERE / "app.py"))["app"]
    return TestClient(own_app, headers={"Origin": ORIGIN}, client=(ADDRESS, 50000))


@pytest.fixture(params=[ORIGIN, f"https://example.com, {ORIGIN}"])
def browser(request, cheap_hasher, monkeypatch):
    return cors_client(monkeypatch, request.param)


PREFLIGHTS = [
    ("/auth/register", "POST", "content-type"),
    ("/auth/login", "POST", "content-type"),
    ("/auth/me", "GET", "authorization"),
    ("/auth/refresh", "POST", "content-type"),
    ("/auth/logout", "POST", "content-type"),
]


def preflight(client, path, method, header):
    request = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": header}
    return client.options(path, headers=request)


@pytest.mark.parametrize(("path", "method", "header"), PREFLIGHTS)
def test_a_preflight_from_an_allowed_origin_succeeds(browser, path, method, header):
    response = preflight(browser, path, method, header)
    assert response.status_code == 200
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert header in response.headers["Access-Control-Allow-Headers"].lower()


def test_an_allowed_origin_can_read_responses_and_their_headers(browser, email, monkeypatch):
    responses = [register(browser, email), register(browser, email), me(browser, "x")]
    responses.append(rejected_login(browser, monkeypatch))
    assert [response.status_code for response in responses] == [201, 409, 401, 503]
    for response in responses:
        assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
        exposed = response.headers["Access-Control-Expose-Headers"]
        assert exposed == "Retry-After, WWW-Authenticate"


def rejected_login(client, monkeypatch):
    """Return the response to a login that finds no place in the queue."""
    with monkeypatch.context() as patch:
        patch.setattr(auth, "hash_queue", [ADDRESS] * 8)
        return login(client, "alice@example.com")


def test_another_origin_is_not_allowed(cheap_hasher, monkeypatch):
    client = cors_client(monkeypatch, "https://example.com")
    assert preflight(client, *PREFLIGHTS[0]).status_code == 400
    assert "Access-Control-Allow-Origin" not in me(client, "x").headers


def test_no_origin_is_allowed_by_default(client):
    response = client.get("/auth/me", headers={"Origin": ORIGIN})
    assert not [name for name in response.headers if name.startswith("access-control")]


# Settings


def start_error(module, monkeypatch, capsys, **settings):
    """Return the line that the module prints when its start fails with these settings."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(module))
    assert stopped.value.code == 3
    printed = capsys.readouterr().err
    assert printed.startswith("auth-jwt cannot start: ")
    assert printed.count("\n") == 1
    assert "s3cret" not in printed
    return printed


@pytest.mark.parametrize(
    "uri",
    [
        "s3cret",
        "http://s3cret",
        "mongodb://alice:s3cret@@127.0.0.1",
        "mongodb://alice:s3cret@127.0.0.1:port",
        "mongodb://127.0.0.1/?maxPoolSize=s3cret",
        "mongodb://127.0.0.1/?maxPolSize=3&x=s3cret",
        "mongodb://127.0.0.1/?tls=true&tlsCAFile=s3cret",
        "mongodb://127.0.0.1/?datetime_conversion=s3cret",
    ],
)
def test_a_malformed_mongo_uri_prevents_startup(monkeypatch, capsys, uri):
    printed = start_error(HERE / "db.py", monkeypatch, capsys, MONGO_URI=uri)
    assert "MONGO_URI" in printed


def test_an_invalid_mongo_db_name_prevents_startup(monkeypatch, capsys):
    settings = {"MONGO_URI": "mongodb://127.0.0.1", "MONGO_DB_NAME": "two words"}
    assert "MONGO_DB_NAME" in start_error(HERE / "db.py", monkeypatch, capsys, **settings)


@pytest.mark.parametrize(
    ("uri", "key"),
    [
        ("mongodb://127.0.0.1", ""),
        ("", "s3cret" * 8),
        ("mongodb://127.0.0.1", "s3cret-key-of-31-bytes-is-short"),
        ("mongodb://127.0.0.1", "replace_with_a_strong_secret"),
        ("mongodb://127.0.0.1", "ssh-rsa s3cret-key-s3cret-key-s3cret-key"),
    ],
)
def test_a_missing_or_unsuitable_key_prevents_startup(monkeypatch, capsys, uri, key):
    monkeypatch.setattr(db, "MONGO_URI", uri)
    printed = start_error(HERE / "auth.py", monkeypatch, capsys, JWT_SECRET_KEY=key)
    assert "JWT_SECRET_KEY" in printed


@pytest.mark.parametrize("name", ["ACCESS_TOKEN_EXPIRE_MINUTES", "REFRESH_TOKEN_EXPIRE_DAYS"])
@pytest.mark.parametrize("value", ["soon", "0", "-1", "0.01", "1e3", "nan", "1000000", "١"])
def test_a_lifetime_that_is_not_a_positive_whole_number_prevents_startup(
    monkeypatch, capsys, name, value
):
    assert name in start_error(HERE / "auth.py", monkeypatch, capsys, **{name: value})


@pytest.mark.parametrize("value", ["1", "999999"])
def test_the_shortest_and_the_longest_lifetime_work(monkeypatch, value):
    monkeypatch.setenv("ACCESS_TOKEN_EXPIRE_MINUTES", value)
    monkeypatch.setenv("REFRESH_TOKEN_EXPIRE_DAYS", value)
    module = runpy.run_path(str(HERE / "auth.py"))
    tokens = module["create_tokens"]("0" * 24, module["create_session"]())
    assert module["read_token"]("access", tokens.access_token).type == "access"
    assert module["read_token"]("refresh", tokens.refresh_token).type == "refresh"


@pytest.mark.parametrize(
    "origins",
    [
        "*",
        "localhost:5173",
        "http://localhost:5173/",
        "http://localhost/x",
        "HTTP://A.COM",
        "a,,b",
        "http://a b",
    ],
)
def test_a_malformed_cors_origin_prevents_startup(monkeypatch, capsys, origins):
    printed = start_error(HERE / "app.py", monkeypatch, capsys, CORS_ORIGINS=origins)
    assert "CORS_ORIGINS" in printed


@pytest.fixture
def module_copy(tmp_path, monkeypatch):
    """A copy of db.py in a package, beside which the tests write their own .env."""
    copy = tmp_path / "accounts" / "db.py"
    copy.parent.mkdir()
    # python-dotenv searches from the working directory if a debugger or coverage is active.
    monkeypatch.chdir(copy.parent)
    copy.write_bytes((HERE / "db.py").read_bytes())
    return copy


@pytest.mark.parametrize(
    "content",
    [
        "MONGO_URI=mongodb://s3cret".encode("utf-16"),
        b"MONGO_URI: mongodb://s3cret",
        b'JWT_SECRET_KEY="s3cret\nMONGO_URI=mongodb://s3cret',
        b"# comment\n\nMONGO_DB_NAME=x\nMONGO_URI mongodb://s3cret\n",
    ],
    ids=["not UTF-8", "a colon", "an unclosed quote", "no sign"],
)
def test_a_malformed_env_file_prevents_startup(module_copy, monkeypatch, capsys, caplog, content):
    (module_copy.parent / ".env").write_bytes(content)
    assert str(module_copy.parent / ".env") in start_error(module_copy, monkeypatch, capsys)
    assert caplog.text == ""


@pytest.mark.parametrize("folder", ["accounts", "."])
def test_an_env_file_is_read_beside_the_module_or_in_a_folder_above(
    module_copy, tmp_path, monkeypatch, folder
):
    (tmp_path / folder / ".env").write_text(
        "# a comment\n\nexport MONGO_DB_NAME=from_file\nEMPTY=\n", encoding="utf-8-sig"
    )
    monkeypatch.delenv("MONGO_DB_NAME")
    assert runpy.run_path(str(module_copy))["MONGO_DB_NAME"] == "from_file"


def test_an_env_file_is_found_from_another_working_directory(module_copy, tmp_path):
    (tmp_path / ".env").write_text("MONGO_DB_NAME=from_file")
    hidden = {*SETTINGS, "COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    main = tmp_path / "main.py"
    main.write_text("from accounts.db import MONGO_DB_NAME; print(MONGO_DB_NAME)")
    printed = subprocess.check_output([sys.executable, main], cwd="/", env=environment)
    assert printed == b"from_file\n"


def test_options_in_the_uri_do_not_weaken_reads_and_writes(monkeypatch):
    uri = "mongodb://127.0.0.1:9/?w=0&journal=false&readPreference=secondary&timeoutMS=99999"
    monkeypatch.setenv("MONGO_URI", uri)
    collection = runpy.run_path(str(HERE / "db.py"))["users"]
    assert collection.write_concern.document == {"w": "majority", "j": True}
    assert collection.read_preference == ReadPreference.PRIMARY
    assert collection.database.client.options.timeout == 2.5
    collection.database.client.close()


# Start


def start(command, **settings):
    """Run the command with these settings. Return its exit code and its standard error."""
    environment = os.environ | dict.fromkeys(SETTINGS, "") | settings
    process = subprocess.run(
        [sys.executable, *command],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return process.returncode, process.stderr


@pytest.mark.parametrize(
    "command", [["app.py"], ["-m", "uvicorn", "app:app", "--port", "0"]], ids=["python", "uvicorn"]
)
def test_a_failed_start_prints_one_line_and_exits_with_3(command):
    code, printed = start(command, JWT_SECRET_KEY="s3cret" * 8)
    assert (code, printed.count("\n")) == (3, 1)
    assert printed.startswith("auth-jwt cannot start: ")


def test_the_service_starts_without_mongodb_and_creates_the_index_later(
    email, cheap_hasher, empty_collection, events, monkeypatch
):
    time = 1000.0
    monkeypatch.setattr(db, "monotonic", lambda: time)
    with monkeypatch.context() as patch:
        patch.setattr(db, "users", FailingCollection(ServerSelectionTimeoutError()))
        with TestClient(app.app) as client:
            assert register(client, email).status_code == 503
    time += 1
    client = TestClient(app.app)
    assert [register(client, email).status_code for _ in range(2)] == [201, 409]
    assert db.users.index_information()["email_1"]["unique"]
    errors = [message for level, message in events() if level == "ERROR"]
    assert errors == ["MongoDB does not respond. Is it running, and is MONGO_URI correct?"]


@ignore_deprecated_throw
def test_duplicate_emails_prevent_startup(empty_collection, capsys):
    empty_collection.insert_many([{"email": "twice"}, {"email": "twice"}])
    with pytest.raises(SystemExit) as stopped:
        db.prepare_collection()
    assert stopped.value.code == 3
    printed = capsys.readouterr().err
    assert printed.startswith("auth-jwt cannot start: MongoDB at MONGO_URI is not usable")
    assert "DuplicateKey" in printed


def test_a_warning_says_that_users_are_kept_in_memory(client, events):
    with TestClient(app.app):
        warnings = [message for _, message in events() if "in memory" in message]
    assert len(warnings) == (0 if TEST_MONGO_URI else 1)


def test_python_app_py_serves_on_port_5000_and_shows_security_events(monkeypatch, capsys):
    served, configured = [], []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: served.append(options))
    monkeypatch.setattr(logging, "basicConfig", lambda **options: configured.append(options))
    runpy.run_path(str(HERE / "app.py"), run_name="__main__")
    server = uvicorn.Config(app.app, **served[0], log_config=None)
    assert (server.host, server.port) == ("127.0.0.1", 5000)
    assert configured[0]["level"] == logging.INFO
    assert {"%(asctime)s", "%(levelname)s", "%(message)s"} == set(configured[0]["format"].split())
    assert capsys.readouterr().out == ""
