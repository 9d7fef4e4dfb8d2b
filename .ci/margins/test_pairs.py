"""Tests of two operations on one user, one of which runs in the middle of the other."""

import itertools
import uuid
from functools import partial
from typing import NamedTuple

import pytest
from argon2 import PasswordHasher
from fastapi import HTTPException

import auth
import db
import test_app
from test_app import CHEAP_HASHER, PASSWORD, claims_of, me

HOME, ELSEWHERE = "192.0.2.1", "192.0.2.2"
NEW_HASH = CHEAP_HASHER.hash("N3w-Passw0rd")
# A login replaces this hash, because it has other parameters.
OLDER_HASH = PasswordHasher(time_cost=2, memory_cost=8, parallelism=1).hash(PASSWORD)


class User(NamedTuple):
    """A user with one session."""

    email: str
    tokens: auth.Tokens


# The operations. Both run in one thread, because in memory a query blocks all other threads.


def register(user):
    return auth.register(user.email, PASSWORD, HOME)


def log_in(user):
    return auth.log_in(user.email, PASSWORD, HOME)


def fail_to_log_in(user):
    return auth.log_in(user.email, "wrong", ELSEWHERE)


def refresh(user):
    return auth.refresh(user.tokens.refresh_token, HOME)


def log_out(user):
    auth.log_out(user.tokens.refresh_token, HOME)


def change_password(user):
    change = {"password_hash": NEW_HASH, "refresh_tokens": []}
    db.users.update_one({"email": user.email}, {"$set": change})


def delete_user(user):
    db.users.delete_one({"email": user.email})


OPERATIONS = [register, log_in, fail_to_log_in, refresh, log_out, change_password, delete_user]


class Outcome(NamedTuple):
    """The status code of an operation, and the tokens that it has returned."""

    status: int
    tokens: auth.Tokens | None


def run(operation, user):
    try:
        return Outcome(200, operation(user))
    except HTTPException as error:
        return Outcome(error.status_code, None)


class InterruptedCollection:
    """A collection that calls a function before its n-th call."""

    def __init__(self, collection, n, function):
        self.collection, self.calls_left, self.function = collection, n, function
        self.result = None  # of the function

    def __getattr__(self, name):
        method = getattr(self.collection, name)

        def call(*args, **kwargs):
            self.calls_left -= 1
            if self.calls_left == 0:
                self.result = self.function()
            return method(*args, **kwargs)

        return call

    def with_options(self, **options):
        return self


def run_pairs(monkeypatch, first, second):
    """Run the second operation before each database call of the first, each time for a new user.

    Yield the user and the outcomes of both operations.
    """
    for n in itertools.count(1):
        email = f"{uuid.uuid4().hex}@example.com"
        user = User(email, auth.register(email, PASSWORD, HOME))
        db.users.update_one({"email": email}, {"$set": {"password_hash": OLDER_HASH}})
        users = InterruptedCollection(db.users, n, partial(run, second, user))
        with monkeypatch.context() as patch:
            patch.setattr(db, "users", users)
            outcome = run(first, user)
        if users.result is None:
            # The first operation has only n - 1 calls.
            assert n > 1
            return
        yield user, outcome, users.result


# All pairs


@pytest.mark.parametrize("second", OPERATIONS)
@pytest.mark.parametrize("first", OPERATIONS)
def test_an_operation_in_the_middle_of_another_one_breaks_no_promise(
    client, monkeypatch, first, second
):
    for user, first_outcome, second_outcome in run_pairs(monkeypatch, first, second):
        stored = db.users.find_one({"email": user.email}) or {}
        sessions = [session["sid"] for session in stored.get("refresh_tokens", [])]

        # Neither response is a server error.
        assert max(first_outcome.status, second_outcome.status) < 500

        # A logout is not undone.
        if log_out in (first, second):
            assert claims_of(user.tokens.refresh_token)["sid"] not in sessions

        # A changed password is not overwritten, and the old one has no session.
        if change_password in (first, second):
            assert stored.get("password_hash", NEW_HASH) == NEW_HASH
            assert sessions == []

        # No failed login is lost.
        if delete_user not in (first, second):
            results = [(first, first_outcome.status), (second, second_outcome.status)]
            failures = results.count((log_in, 401)) + results.count((fail_to_log_in, 401))
            assert len(stored.get("login_failures", [])) == failures

        # The new tokens are valid, unless the first operation has ended the session of the second.
        new_tokens = [first_outcome.tokens]
        if first not in (log_out, change_password, delete_user):
            new_tokens.append(second_outcome.tokens)
        for tokens in filter(None, new_tokens):
            assert me(client, tokens.access_token).status_code == 200
            assert test_app.refresh(client, tokens.refresh_token).status_code == 200


# Single pairs


def test_a_registration_succeeds_if_the_user_with_its_email_is_deleted_meanwhile(
    client, monkeypatch
):
    for user, registration, _ in run_pairs(monkeypatch, register, delete_user):
        assert registration.status == 200
        assert db.users.count_documents({"email": user.email}) == 1


def test_one_of_two_registrations_of_a_new_email_succeeds(client, monkeypatch):
    def register_new(user):
        return auth.register("new-" + user.email, PASSWORD, HOME)

    for user, *outcomes in run_pairs(monkeypatch, register_new, register_new):
        assert sorted(outcome.status for outcome in outcomes) == [200, 409]
        assert db.users.count_documents({"email": "new-" + user.email}) == 1


def reach_login_limit(user):
    for _ in range(auth.MAX_FAILURES_PER_NETWORK):
        db.record_failed_login(user.email, HOME, auth.now())


@pytest.mark.parametrize(("password", "status"), [(PASSWORD, 200), ("wrong", 401)])
def test_a_guess_learns_nothing_if_others_reach_the_limit_while_it_waits_for_its_hash(
    client, monkeypatch, password, status
):
    def guess(user):
        return auth.log_in(user.email, password, HOME)

    # The calls are the look-ups before and after the hash, and the storage of the result.
    statuses = [guess.status for _, guess, _ in run_pairs(monkeypatch, guess, reach_login_limit)]
    assert statuses == [429, 429, status]


def test_two_logouts_of_a_session_are_logged_once(client, monkeypatch, events):
    for user, *_ in run_pairs(monkeypatch, log_out, log_out):
        sid = claims_of(user.tokens.refresh_token)["sid"]
        logged = [message.split()[0] for _, message in events() if sid in message]
        assert logged == ["user_created", "authn_token_revoked"]
