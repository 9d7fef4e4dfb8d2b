"""Tests of two requests, or a request and another program, that change a user at the same time."""

import uuid

import pytest
from argon2 import PasswordHasher
from conftest import in_parallel, run_in_pairs

import auth
import db
from test_app import (
    ADDRESS,
    CHEAP_HASHER,
    PASSWORD,
    claims_of,
    is_invalid_token,
    login,
    logout,
    me,
    refresh,
    register,
    stored_user,
)

OLDER_HASHER = PasswordHasher(time_cost=2, memory_cost=8, parallelism=1)
NEW_PASSWORD = "N3w-Passw0rd"


def test_only_one_of_two_simultaneous_registrations_succeeds(
    client, frequent_thread_switches, monkeypatch
):
    run_in_pairs(monkeypatch, "create_user")
    for _ in range(30):
        email = f"{uuid.uuid4().hex}@example.com"
        responses = in_parallel(lambda email=email: register(client, email), 2)
        assert sorted(response.status_code for response in responses) == [201, 409]
        assert db.users.count_documents({"email": email}) == 1


@pytest.fixture
def older_hash(client, tokens, email):
    """The hash of the user's password with older parameters."""
    password_hash = OLDER_HASHER.hash(PASSWORD)
    db.users.update_one({"email": email}, {"$set": {"password_hash": password_hash}})
    return password_hash


def change_password(email):
    change = {"password_hash": CHEAP_HASHER.hash(NEW_PASSWORD), "refresh_tokens": []}
    db.users.update_one({"email": email}, {"$set": change})


def change_password_before(monkeypatch, module, name, email):
    """Change the password once, before the function is called."""
    function, changes = getattr(module, name), [change_password]

    def change_and_call(*args):
        while changes:
            changes.pop()(email)
        return function(*args)

    monkeypatch.setattr(module, name, change_and_call)


@pytest.mark.parametrize(
    ("module", "name"),
    [(auth, "verify_password"), (auth, "create_session"), (db, "add_session")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_old_password_gets_no_session_if_it_is_changed_during_a_login(
    client, tokens, email, monkeypatch, module, name
):
    change_password_before(monkeypatch, module, name, email)
    assert login(client, email).status_code == 401
    assert stored_user(tokens)["refresh_tokens"] == []
    assert login(client, email, NEW_PASSWORD).status_code == 200


@pytest.mark.parametrize("name", ["hash_password", "create_session"])
def test_a_password_that_is_changed_during_a_rehash_is_not_overwritten(
    client, tokens, email, older_hash, monkeypatch, name
):
    change_password_before(monkeypatch, auth, name, email)
    assert login(client, email).status_code == 401
    assert stored_user(tokens)["refresh_tokens"] == []
    assert login(client, email, NEW_PASSWORD).status_code == 200


def test_two_simultaneous_logins_with_an_older_hash_both_succeed(
    client, tokens, email, older_hash, monkeypatch
):
    replaced = []
    run_in_pairs(monkeypatch, "replace_password_hash")
    replace_in_pairs = db.replace_password_hash

    def record(*args):
        replaced.append(replace_in_pairs(*args))
        return replaced[-1]

    monkeypatch.setattr(db, "replace_password_hash", record)
    responses = in_parallel(lambda: login(client, email), 2)
    assert [response.status_code for response in responses] == [200, 200]
    assert sorted(replaced) == [False, True]
    for response in responses:
        assert me(client, response.json()["access_token"]).status_code == 200
    assert stored_user(tokens)["password_hash"] != older_hash


def test_eight_simultaneous_logins_with_an_older_hash_all_succeed(client, email, older_hash):
    responses = in_parallel(lambda: login(client, email), 8)
    assert [response.status_code for response in responses] == [200] * 8


def test_login_of_a_user_that_was_just_deleted_is_rejected(client, tokens, email, monkeypatch):
    create_session = auth.create_session

    def delete_and_create():
        db.users.delete_one({"email": email})
        return create_session()

    monkeypatch.setattr(auth, "create_session", delete_and_create)
    assert login(client, email).status_code == 401


def test_twelve_simultaneous_refreshes_rotate_the_session_once(client, tokens):
    responses = in_parallel(lambda: refresh(client, tokens["refresh_token"]), 12)
    assert [response.status_code for response in responses] == [200] * 12
    newer = [claims_of(response.json()["refresh_token"]) for response in responses]
    assert {claims["generation"] for claims in newer} == {1}
    assert [session["generation"] for session in stored_user(tokens)["refresh_tokens"]] == [1]
    assert refresh(client, responses[0].json()["refresh_token"]).status_code == 200


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


def test_a_logout_during_a_refresh_ends_the_session(client, tokens, monkeypatch):
    advance_session = db.advance_session

    def log_out_and_advance(user_id, next_session):
        assert logout(client, tokens["refresh_token"]).status_code == 204
        return advance_session(user_id, next_session)

    monkeypatch.setattr(db, "advance_session", log_out_and_advance)
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))
    assert is_invalid_token(me(client, tokens["access_token"]))
    assert stored_user(tokens)["refresh_tokens"] == []


def test_each_refresh_advances_the_generation_by_one(client, tokens):
    for generation in range(1, 6):
        tokens = refresh(client, tokens["refresh_token"]).json()
        assert claims_of(tokens["refresh_token"])["generation"] == generation


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


def test_the_previous_token_ends_its_session_if_the_clock_was_set_back(client, tokens, set_clock):
    newest = refresh(client, tokens["refresh_token"]).json()
    set_clock(seconds=-60)
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))
    assert is_invalid_token(me(client, newest["access_token"]))


@pytest.mark.parametrize(("seconds", "level"), [(59, "INFO"), (60, "CRITICAL")])
def test_logout_with_a_replaced_token_is_logged_as_reuse_after_the_grace(
    client, tokens, set_clock, events, seconds, level
):
    refresh(client, tokens["refresh_token"])
    set_clock(seconds=seconds)
    assert logout(client, tokens["refresh_token"]).status_code == 204
    assert events()[-1][0] == level


def test_a_token_from_a_host_whose_clock_is_ahead_is_accepted(client, email, set_clock):
    set_clock(hours=1)
    tokens = register(client, email).json()
    set_clock(hours=0)
    assert me(client, tokens["access_token"]).status_code == 200
    assert refresh(client, tokens["refresh_token"]).status_code == 200


def test_a_guess_is_rejected_if_others_reach_the_limit_meanwhile(
    client, tokens, email, monkeypatch
):
    verify_password = auth.verify_password

    def verify_after_five_failures(*args):
        for _ in range(5):
            db.record_failed_login(email, ADDRESS, auth.now())
        return verify_password(*args)

    monkeypatch.setattr(auth, "verify_password", verify_after_five_failures)
    for password in (PASSWORD, "wrong"):
        assert login(client, email, password).status_code == 429
