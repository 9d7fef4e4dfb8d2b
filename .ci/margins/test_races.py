"""Tests of many requests that change one user at the same time, in threads."""

import pytest
from argon2 import PasswordHasher
from conftest import in_parallel

import auth
import db
from test_app import (
    ADDRESS,
    PASSWORD,
    claims_of,
    is_invalid_token,
    login,
    logout,
    refresh,
    stored_user,
)

pytestmark = pytest.mark.usefixtures("frequent_thread_switches")

OLDER_HASH = PasswordHasher(time_cost=2, memory_cost=8, parallelism=1).hash(PASSWORD)


def test_twelve_simultaneous_refreshes_rotate_the_session_once(client, tokens):
    responses = in_parallel(lambda: refresh(client, tokens["refresh_token"]), 12)
    assert [response.status_code for response in responses] == [200] * 12
    newer = [claims_of(response.json()["refresh_token"]) for response in responses]
    assert {claims["generation"] for claims in newer} == {1}
    assert [session["generation"] for session in stored_user(tokens)["refresh_tokens"]] == [1]


def test_twelve_simultaneous_uses_of_a_stolen_token_are_logged_once(client, tokens, events):
    refresh(client, refresh(client, tokens["refresh_token"]).json()["refresh_token"])
    responses = in_parallel(lambda: refresh(client, tokens["refresh_token"]), 12)
    assert all(map(is_invalid_token, responses))
    assert [level for level, _ in events()].count("CRITICAL") == 1


def test_twelve_simultaneous_logouts_all_succeed(client, tokens):
    responses = in_parallel(lambda: logout(client, tokens["refresh_token"]), 12)
    assert [response.status_code for response in responses] == [204] * 12
    assert stored_user(tokens)["refresh_tokens"] == []


def test_eight_simultaneous_logins_with_an_older_hash_all_succeed(client, tokens, email):
    db.users.update_one({"email": email}, {"$set": {"password_hash": OLDER_HASH}})
    responses = in_parallel(lambda: login(client, email), 8)
    assert [response.status_code for response in responses] == [200] * 8
    assert len(stored_user(tokens)["refresh_tokens"]) == 9


def test_simultaneous_logins_never_leave_more_than_20_sessions(client, tokens):
    password_hash = stored_user(tokens)["password_hash"]

    def add_session():
        return db.add_session(
            tokens["user_id"],
            verified_hash=password_hash,
            new_hash=password_hash,
            session=auth.new_session(),
            network=ADDRESS,
        )

    assert all(in_parallel(add_session, 30))
    assert len(stored_user(tokens)["refresh_tokens"]) == 20


def test_each_of_eight_simultaneous_failed_logins_is_recorded(client, tokens, email):
    responses = in_parallel(lambda: login(client, email, "wrong"), 8)
    assert [response.status_code for response in responses] == [401] * 8
    assert len(stored_user(tokens)["login_failures"]) == 8
