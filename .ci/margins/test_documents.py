"""Tests of users whose documents other programs have written, changed or damaged."""

import uuid
from datetime import datetime

import pytest
from argon2 import PasswordHasher, Type
from bson import ObjectId
from bson.datetime_ms import DatetimeMS
from conftest import only_mongodb

import db
from test_app import (
    CHEAP_HASHER,
    ORIGIN,
    PASSWORD,
    is_invalid_token,
    login,
    logout,
    me,
    refresh,
    register,
    stored_user,
)

ARGON2I_HASHER = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1, type=Type.I)
PASSWORD_HASH = CHEAP_HASHER.hash(PASSWORD)


def insert_user(email, **fields):
    """Insert a document as another program could have written it. Return its id."""
    document = {"email": email, "password_hash": PASSWORD_HASH} | fields
    return db.users.insert_one(document).inserted_id


def set_fields(tokens, **fields):
    db.users.update_one({"_id": ObjectId(tokens["user_id"])}, {"$set": fields})


def remove_field(tokens, name):
    db.users.update_one({"_id": ObjectId(tokens["user_id"])}, {"$unset": {name: ""}})


# Users who cannot log in

OTHER_HASHES = {
    "bcrypt": "$2b$12$KIXTRIlaZBE7XH7hJkEp0uC0yNkBqP0sQ3QmRZEJ5p0oJX7h0wUuK",
    "Argon2i": ARGON2I_HASHER.hash(PASSWORD),
    "a scheme before the hash": "argon2:" + PASSWORD_HASH,
    "null": None,
    "bytes": PASSWORD_HASH.encode(),
    "a list": [PASSWORD_HASH],
}


@pytest.mark.parametrize("stored", OTHER_HASHES.values(), ids=OTHER_HASHES.keys())
def test_a_user_without_an_argon2id_hash_cannot_log_in(client, tokens, email, stored):
    set_fields(tokens, password_hash=stored)
    assert login(client, email).status_code == 401


def test_a_user_without_a_password_hash_cannot_log_in(client, tokens, email):
    remove_field(tokens, "password_hash")
    assert login(client, email).status_code == 401


@pytest.mark.parametrize("user_id", [uuid.uuid4().hex, uuid.uuid4().int % 2**60])
def test_a_user_whose_id_is_no_object_id_cannot_log_in(client, email, user_id):
    insert_user(email, _id=user_id)
    assert login(client, email).status_code == 401


def test_a_user_with_a_list_of_emails_cannot_log_in(client, email):
    insert_user([email])
    assert login(client, email).status_code == 401
    assert register(client, email).status_code == 409


@pytest.mark.parametrize(
    "fields",
    [{"password_hash": None}, {"password_hash": [PASSWORD_HASH]}, {"_id": uuid.uuid4().hex}],
)
def test_a_failed_login_does_not_change_a_document_of_another_program(client, email, fields):
    user_id = insert_user(email, **fields)
    before = db.users.find_one({"_id": user_id})
    assert login(client, email, "wrong").status_code == 401
    assert db.users.find_one({"_id": user_id}) == before


def test_a_failed_login_does_not_change_a_document_with_a_list_of_emails(client, email):
    user_id = insert_user([email])
    assert login(client, email, "wrong").status_code == 401
    assert "login_failures" not in db.users.find_one({"_id": user_id})


def test_a_login_to_a_document_of_another_program_is_logged_as_one_to_an_unknown_email(
    client, email, events
):
    insert_user(email, password_hash=None)
    assert login(client, email).status_code == 401
    ((_, message),) = events()
    assert message.startswith("authn_login_fail user=unknown ")


# Damaged hashes

DAMAGED_HASHES = {
    "truncated": "$argon2id$v=19$m=8,t=1,p=1$",
    "too little memory": PASSWORD_HASH.replace("m=8", "m=1"),
    "a newline": PASSWORD_HASH + "\n",
}


@pytest.mark.parametrize("damaged", DAMAGED_HASHES.values(), ids=DAMAGED_HASHES.keys())
def test_a_login_with_a_damaged_hash_is_503_and_logged(client, tokens, email, events, damaged):
    set_fields(tokens, password_hash=damaged)
    response = login(client, email)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    level, message = events()[-1]
    assert level == "ERROR"
    assert message.startswith("The service is overloaded: VerificationError(")
    assert "login_failures" not in stored_user(tokens)


# Sessions


@only_mongodb  # mongomock fails on sessions that are not objects.
def test_malformed_sessions_are_ignored_and_dropped(client, tokens, email):
    malformed = [tokens["refresh_token"], None, 1, {}, {"sid": 1}, {"token": "x"}] + ["x"] * 13
    db.users.update_one({"email": email}, {"$push": {"refresh_tokens": {"$each": malformed}}})
    newer = refresh(client, tokens["refresh_token"]).json()
    assert me(client, newer["access_token"]).status_code == 200
    assert refresh(client, tokens["refresh_token"]).status_code == 200
    sessions = [login(client, email).json() for _ in range(20)]
    assert all("sid" in session for session in stored_user(tokens)["refresh_tokens"])
    assert logout(client, sessions[0]["refresh_token"]).status_code == 204


@only_mongodb
@pytest.mark.parametrize("session", ["raw", None, {"sid": "x"}])
def test_more_than_20_sessions_of_another_program_are_dropped(client, email, session):
    insert_user(email, refresh_tokens=[session] * 30)
    tokens = login(client, email).json()
    assert me(client, tokens["access_token"]).status_code == 200
    assert len(stored_user(tokens)["refresh_tokens"]) == 20


RAW_TOKENS = pytest.param({"refresh_tokens": ["raw"]}, marks=only_mongodb)


@pytest.mark.parametrize("sessions", [{}, {"refresh_tokens": []}, RAW_TOKENS])
def test_a_user_without_sessions_can_log_in(client, email, sessions):
    insert_user(email, **sessions)
    tokens = login(client, email).json()
    assert me(client, tokens["access_token"]).status_code == 200
    assert refresh(client, tokens["refresh_token"]).status_code == 200
    assert is_invalid_token(refresh(client, "raw"))
    assert logout(client, tokens["refresh_token"]).status_code == 204
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))


def test_a_token_of_a_user_without_sessions_is_invalid(client, tokens):
    remove_field(tokens, "refresh_tokens")
    assert is_invalid_token(me(client, tokens["access_token"]))
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))
    assert logout(client, tokens["refresh_token"]).status_code == 204


# Other fields


def test_created_at_is_the_time_in_the_object_id_if_it_is_missing(client, tokens):
    remove_field(tokens, "created_at")
    created_at = me(client, tokens["access_token"]).json()["created_at"]
    expected = ObjectId(tokens["user_id"]).generation_time
    assert datetime.fromisoformat(created_at) == expected


@pytest.mark.parametrize("stored", [None, "2020-01-01", []])
def test_created_at_is_the_time_in_the_object_id_if_it_is_no_date(client, tokens, stored):
    set_fields(tokens, created_at=stored)
    created_at = me(client, tokens["access_token"]).json()["created_at"]
    expected = ObjectId(tokens["user_id"]).generation_time
    assert datetime.fromisoformat(created_at) == expected


def test_a_naive_created_at_is_in_utc(client, tokens):
    set_fields(tokens, created_at=datetime(2020, 1, 1))
    assert me(client, tokens["access_token"]).json()["created_at"] == "2020-01-01T00:00:00Z"


@pytest.fixture
def undecodable(tokens):
    """The tokens of a user with a date after the year 9999, which PyMongo cannot decode."""
    set_fields(tokens, created_at=DatetimeMS(253402300800000))
    return tokens


@only_mongodb  # mongomock returns the date unchanged.
def test_a_document_that_cannot_be_decoded_is_500_with_cors_headers(undecodable, browser):
    response = me(browser, undecodable["access_token"])
    assert (response.status_code, response.json()) == (500, {"detail": "Internal server error"})
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN


@only_mongodb
def test_a_document_that_cannot_be_decoded_is_no_outage(client, undecodable, events):
    assert me(client, undecodable["access_token"]).status_code == 500
    assert refresh(client, undecodable["refresh_token"]).status_code == 200
    assert events() == [("ERROR", "MongoDB returned an error: InvalidBSON")]


@pytest.mark.parametrize("stored", [1, None, [], ["a@example.com"]])
def test_a_token_of_a_user_whose_email_is_no_text_is_invalid(client, tokens, stored):
    set_fields(tokens, email=stored)
    assert is_invalid_token(me(client, tokens["access_token"]))
    db.users.delete_one({"_id": ObjectId(tokens["user_id"])})


def test_a_token_of_a_user_without_an_email_is_invalid(client, tokens):
    remove_field(tokens, "email")
    assert is_invalid_token(me(client, tokens["access_token"]))
    db.users.delete_one({"_id": ObjectId(tokens["user_id"])})
