"""Tests of documents and indexes of other programs."""

import runpy
import uuid
from datetime import datetime

import pytest
from argon2 import PasswordHasher
from bson import ObjectId
from bson.datetime_ms import DatetimeMS
from conftest import ROOT, in_parallel, only_mongodb
from fastapi import FastAPI
from fastapi.testclient import TestClient

import app
import auth
import db
from test_app import (
    CHEAP_HASHER,
    PASSWORD,
    is_invalid_token,
    login,
    logout,
    me,
    refresh,
    register,
    stored_user,
)


def insert_user(email, **fields):
    """Insert a document as another program could have written it."""
    document = {"email": email, "password_hash": CHEAP_HASHER.hash(PASSWORD)}
    db.users.insert_one(document | fields)


def set_fields(email, **fields):
    db.users.update_one({"email": email}, {"$set": fields})


# Sessions


@only_mongodb  # mongomock fails on sessions that are not objects.
def test_malformed_sessions_are_ignored_and_dropped(client, tokens, email):
    raw_tokens = [tokens["refresh_token"], None, 1, {}, {"sid": 1}, {"token": "x"}] + ["x"] * 13
    db.users.update_one({"email": email}, {"$push": {"refresh_tokens": {"$each": raw_tokens}}})
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
def test_a_document_without_sessions_is_usable(client, email, sessions):
    insert_user(email, **sessions)
    tokens = login(client, email).json()
    assert me(client, tokens["access_token"]).status_code == 200
    for _ in range(2):
        assert refresh(client, tokens["refresh_token"]).status_code == 200
    assert is_invalid_token(refresh(client, "raw"))
    assert logout(client, tokens["refresh_token"]).status_code == 204
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))


def test_a_token_of_a_document_without_sessions_is_invalid(client, tokens, email):
    db.users.update_one({"email": email}, {"$unset": {"refresh_tokens": ""}})
    assert is_invalid_token(me(client, tokens["access_token"]))
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))
    assert logout(client, tokens["refresh_token"]).status_code == 204


def test_a_token_of_another_session_of_a_document_is_invalid(client, email):
    insert_user(email)
    tokens = login(client, email).json()
    db.users.update_one({"email": email}, {"$set": {"refresh_tokens.0.sid": "0" * 32}})
    assert is_invalid_token(me(client, tokens["access_token"]))
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))


# Other fields


def test_a_document_without_created_at_uses_the_time_in_the_object_id(client, email):
    insert_user(email)
    tokens = login(client, email).json()
    created_at = me(client, tokens["access_token"]).json()["created_at"]
    expected = ObjectId(tokens["user_id"]).generation_time
    assert datetime.fromisoformat(created_at) == expected


@pytest.mark.parametrize("created_at", [None, "2020-01-01", 1, [], {}])
def test_another_type_of_created_at_falls_back_to_the_time_in_the_object_id(
    client, tokens, email, created_at
):
    set_fields(email, created_at=created_at)
    response = me(client, tokens["access_token"]).json()
    expected = ObjectId(tokens["user_id"]).generation_time
    assert datetime.fromisoformat(response["created_at"]) == expected


def test_a_naive_created_at_is_in_utc(client, tokens, email):
    set_fields(email, created_at=datetime(2020, 1, 1))
    assert me(client, tokens["access_token"]).json()["created_at"] == "2020-01-01T00:00:00Z"


@only_mongodb  # mongomock returns the date unchanged.
def test_a_date_after_the_year_9999_is_500_with_cors_headers(client, tokens, email, monkeypatch):
    set_fields(email, created_at=DatetimeMS(253402300800000))
    origin = "http://localhost:5173"
    monkeypatch.setenv("CORS_ORIGINS", origin)
    standalone_app = runpy.run_path(str(ROOT / "app.py"))["app"]
    browser = TestClient(standalone_app, headers={"Origin": origin})
    response = me(browser, tokens["access_token"])
    assert (response.status_code, response.json()) == (500, {"detail": "Internal server error"})
    assert response.headers["Access-Control-Allow-Origin"] == origin


@only_mongodb
def test_a_date_after_the_year_9999_does_not_open_the_breaker(client, tokens, email, events):
    set_fields(email, created_at=DatetimeMS(253402300800000))
    assert me(client, tokens["access_token"]).status_code == 500
    assert refresh(client, tokens["refresh_token"]).status_code == 200
    assert events() == [("ERROR", "MongoDB returned an error: InvalidBSON")]


@pytest.mark.parametrize("stored", [1, None, [], ["a@example.com"]])
def test_the_tokens_of_a_document_with_another_type_of_email_are_invalid(client, email, stored):
    tokens = register(client, email).json()
    db.users.update_one({"email": email}, {"$set": {"email": stored}})
    assert is_invalid_token(me(client, tokens["access_token"]))
    db.users.delete_one({"_id": ObjectId(tokens["user_id"])})


def test_the_tokens_of_a_document_without_an_email_are_invalid(client, email):
    tokens = register(client, email).json()
    db.users.update_one({"email": email}, {"$unset": {"email": ""}})
    assert is_invalid_token(me(client, tokens["access_token"]))
    db.users.delete_one({"_id": ObjectId(tokens["user_id"])})


@pytest.mark.parametrize("make_id", [lambda: uuid.uuid4().hex, lambda: uuid.uuid4().int % 2**60])
def test_login_to_a_document_with_another_type_of_id_is_rejected(client, email, make_id):
    insert_user(email, _id=make_id())
    assert login(client, email).status_code == 401


BCRYPT = "$2b$12$KIXTRIlaZBE7XH7hJkEp0uC0yNkBqP0sQ3QmRZEJ5p0oJX7h0wUuK"


@pytest.mark.parametrize("stored", [BCRYPT, "", "plain", "ü", "\0", None, 1, b"x", [], {}])
def test_login_with_an_unusable_password_hash_is_rejected(client, tokens, email, stored):
    set_fields(email, password_hash=stored)
    assert login(client, email).status_code == 401


def test_login_with_a_list_of_hashes_is_rejected(client, tokens, email):
    set_fields(email, password_hash=[stored_user(tokens)["password_hash"]])
    assert login(client, email).status_code == 401


def test_login_to_a_document_with_a_list_of_emails_is_rejected(client, email):
    insert_user([email])
    assert login(client, email).status_code == 401
    assert register(client, email).status_code == 409


@pytest.mark.parametrize("stored", [BCRYPT, "plain", "$argon2id$v=19$m=8,t=1,p=1$!!!!$!!!!"])
def test_login_with_an_unusable_hash_takes_as_long_as_one_to_an_unknown_email(
    client, tokens, email, monkeypatch, stored
):
    hashed = []

    class Hasher(PasswordHasher):
        def hash(self, password):
            hashed.append(password)
            return super().hash(password)

    monkeypatch.setattr(auth, "hasher", Hasher(time_cost=1, memory_cost=8, parallelism=1))
    set_fields(email, password_hash=stored)
    assert login(client, email).status_code == 401
    assert hashed == [PASSWORD]


def test_login_without_a_password_hash_is_rejected(client, tokens, email):
    db.users.update_one({"email": email}, {"$unset": {"password_hash": ""}})
    assert login(client, email).status_code == 401


# Unique index


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ("email", {"name": "users_email_key"}),
        ("email", {"name": "email"}),
        ("email", {"sparse": True}),
        ("email", {"sparse": True, "name": "users_email_key"}),
        ([("email", -1)], {}),
    ],
)
def test_a_unique_index_on_email_suffices_under_any_name(
    email, cheap_hasher, empty_collection, keys, options
):
    empty_collection.create_index(keys, unique=True, **options)
    indexes = empty_collection.index_information()
    with TestClient(app.app) as client:
        assert [register(client, email).status_code for _ in range(2)] == [201, 409]
    assert empty_collection.index_information() == indexes


PARTIAL = {"partialFilterExpression": {"email": {"$exists": True}}}
COLLATION = {"collation": {"locale": "en", "strength": 2}}


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ([("email", 1), ("tenant", 1)], {"unique": True}),
        ([("tenant", 1), ("email", 1)], {"unique": True}),
        ("username", {"unique": True, "sparse": True}),
        ([("email", -1)], {}),
        ([("email", "hashed")], {}),
        ("email", {"unique": True, "name": "partial"} | PARTIAL),
        pytest.param("email", {"unique": True, "name": "folded"} | COLLATION, marks=only_mongodb),
    ],
)
def test_the_index_is_created_beside_an_index_that_does_not_suffice(
    email, cheap_hasher, empty_collection, keys, options
):
    empty_collection.create_index(keys, **options)
    with TestClient(app.app) as client:
        assert empty_collection.index_information()["email_1"]["unique"]
        assert [register(client, email).status_code for _ in range(2)] == [201, 409]


def start_error(capsys):
    """Return the line that is printed when the start fails."""
    with pytest.raises(SystemExit) as stopped:
        db.prepare_collection()
    assert stopped.value.code == 3
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed


@only_mongodb
@pytest.mark.parametrize(
    "options", [{}, COLLATION, {"unique": True} | PARTIAL, {"unique": True} | COLLATION]
)
def test_an_index_email_1_of_another_kind_prevents_the_start(empty_collection, capsys, options):
    empty_collection.create_index("email", **options)
    expected = "MongoDB at MONGO_URI is not usable (IndexKeySpecsConflict); see README.md."
    assert start_error(capsys) == f"auth-jwt cannot start: {expected}\n"


def test_an_index_email_1_that_is_not_unique_prevents_the_start(empty_collection, capsys):
    empty_collection.create_index("email")
    printed = start_error(capsys)
    assert printed.startswith("auth-jwt cannot start: MongoDB at MONGO_URI is not usable (")


# mongomock 4.3 uses a deprecated signature when it finds a duplicate.
ignore_deprecated_throw = pytest.mark.filterwarnings("ignore:the .type, exc, tb. signature")


@ignore_deprecated_throw
def test_duplicate_emails_prevent_the_start(empty_collection, capsys):
    empty_collection.insert_many([{"email": "twice@example.com"}, {"email": "twice@example.com"}])
    expected = "MongoDB at MONGO_URI is not usable (DuplicateKey"
    printed = start_error(capsys)
    assert printed.startswith(f"auth-jwt cannot start: {expected}")
    assert "twice" not in printed


@ignore_deprecated_throw
def test_duplicate_emails_without_a_lifespan_are_500(email, cheap_hasher, empty_collection, events):
    empty_collection.insert_many([{"email": "twice"}, {"email": "twice"}])
    assert register(TestClient(app.app), email).status_code == 500
    ((level, message),) = events()
    assert level == "ERROR"
    assert message.startswith("MongoDB returned an error: DuplicateKey")


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_emails_are_unique_without_a_lifespan(email, cheap_hasher, empty_collection, prefix):
    outer = FastAPI()
    outer.mount("/api", app.app)
    client = TestClient(outer if prefix else app.app, base_url=f"http://testserver{prefix}")
    assert [register(client, email).status_code for _ in range(2)] == [201, 409]


def test_emails_stay_unique_after_the_collection_was_dropped(
    client, email, empty_collection, monkeypatch
):
    # All twelve hash their passwords at the same time.
    monkeypatch.setattr(auth, "HASH_QUEUE_SIZE", 24)
    for number in range(3):
        db.prepare_collection()
        empty_collection.drop()
        numbered_email = f"{number}-{email}"
        responses = in_parallel(lambda email=numbered_email: register(client, email), 12)
        assert sorted(response.status_code for response in responses) == [201] + [409] * 11
        assert empty_collection.count_documents({}) == 1
        assert empty_collection.index_information()["email_1"]["unique"]


def test_a_unique_index_of_another_program_is_500_and_not_409(
    cheap_hasher, email, empty_collection, events
):
    empty_collection.create_index("username", unique=True)
    client = TestClient(app.app)
    assert register(client, email).status_code == 201
    response = register(client, "other-" + email)
    assert (response.status_code, response.json()) == (500, {"detail": "Internal server error"})
    level, message = events()[-1]
    assert level == "ERROR"
    assert message.startswith("MongoDB returned an error: DuplicateKey")
    assert register(client, email).status_code == 409
