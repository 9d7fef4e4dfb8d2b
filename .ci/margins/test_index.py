"""Tests of the unique index on email."""

import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from conftest import in_parallel, only_mongodb
from fastapi import FastAPI
from fastapi.testclient import TestClient
from helpers import wait_until
from pymongo import MongoClient
from pymongo.errors import OperationFailure

import app
import auth
import db
from test_app import TEST_MONGO_URI, login, register

SPARSE = {"unique": True, "sparse": True}
PARTIAL = {"unique": True, "partialFilterExpression": {"email": {"$exists": True}}}
CASELESS = {"unique": True, "collation": {"locale": "en", "strength": 2}}


def start_error(capsys):
    """Return the line that is printed when the start fails."""
    with pytest.raises(SystemExit) as stopped:
        db.prepare_collection()
    assert stopped.value.code == 3
    return capsys.readouterr().err


ABORTED = "auth-jwt cannot start: MongoDB returned the error above.\n"

# mongomock 4.3 uses a deprecated signature when it finds a duplicate.
ignore_deprecated_throw = pytest.mark.filterwarnings("ignore:the .type, exc, tb. signature")


# Creation


def test_the_start_creates_the_index(cheap_hasher, empty_collection):
    with TestClient(app.app):
        assert empty_collection.index_information()["email_1"]["unique"]


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_a_registration_creates_the_index_without_a_lifespan(
    email, cheap_hasher, empty_collection, prefix
):
    host = FastAPI()
    host.mount("/api", app.app)
    client = TestClient(host if prefix else app.app, base_url=f"http://testserver{prefix}")
    assert [register(client, email).status_code for _ in range(2)] == [201, 409]


def test_a_registration_creates_the_index_after_the_collection_was_dropped(
    client, email, empty_collection, monkeypatch
):
    # All twelve may hash at the same time.
    monkeypatch.setattr(auth, "MAX_HASH_SLOTS", 24)
    for number in range(3):
        db.prepare_collection()
        empty_collection.drop()
        numbered_email = f"{number}-{email}"
        responses = in_parallel(lambda email=numbered_email: register(client, email), 12)
        assert sorted(response.status_code for response in responses) == [201] + [409] * 11
        assert empty_collection.count_documents({}) == 1
        assert empty_collection.index_information()["email_1"]["unique"]


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ([("email", 1), ("tenant", 1)], {"unique": True}),
        ("email", PARTIAL | {"name": "partial"}),
        pytest.param("email", CASELESS | {"name": "caseless"}, marks=only_mongodb),
    ],
)
def test_the_index_is_created_beside_an_index_of_another_kind(
    email, cheap_hasher, empty_collection, keys, options
):
    empty_collection.create_index(keys, **options)
    with TestClient(app.app) as client:
        assert empty_collection.index_information()["email_1"]["unique"]
        assert [register(client, email).status_code for _ in range(2)] == [201, 409]


# Equivalent indexes of other programs


@only_mongodb
@pytest.mark.parametrize(
    ("name", "options"), [("users_email_key", {"unique": True}), ("email_1", SPARSE)]
)
def test_an_equivalent_index_is_used(email, cheap_hasher, empty_collection, name, options):
    empty_collection.create_index("email", name=name, **options)
    indexes = empty_collection.index_information()
    with TestClient(app.app) as client:
        assert [register(client, email).status_code for _ in range(2)] == [201, 409]
    assert empty_collection.index_information() == indexes


@contextmanager
def unfinished_index(collection, name):
    """Let another program create a unique index, which is in progress until the context ends."""
    collection.insert_one({"email": "first"})
    # The server stops at this document.
    fail_point = {
        "configureFailPoint": "hangIndexBuildDuringCollectionScanPhaseBeforeInsertion",
        "data": {"fieldsToMatch": {"email": "first"}},
    }
    with MongoClient(TEST_MONGO_URI) as program, ThreadPoolExecutor(1) as pool:
        users = program[collection.database.name][collection.name]
        program.admin.command(fail_point | {"mode": "alwaysOn"})
        try:
            creation = pool.submit(users.create_index, "email", unique=True, name=name)
            wait_until(lambda: name in users.index_information(), 10)
            yield
            assert not creation.done()
        finally:
            program.admin.command(fail_point | {"mode": "off"})
        creation.result(10)


@only_mongodb
@pytest.mark.parametrize("name", ["email_1", "users_email_key"])
def test_an_email_is_registered_once_although_another_program_is_creating_the_index(
    client, email, empty_collection, monkeypatch, name
):
    with unfinished_index(empty_collection, name):
        responses = in_parallel(lambda: register(client, email), 3)
        assert [response.status_code for response in responses] == [503] * 3
    # Queries are tried again at once.
    monkeypatch.setattr(db, "next_attempt", None)
    assert [register(client, email).status_code for _ in range(2)] == [201, 409]
    assert login(client, email).status_code == 200


# Errors


@only_mongodb
@pytest.mark.parametrize("options", [{}, PARTIAL, CASELESS])
def test_an_index_of_another_kind_with_the_same_name_prevents_the_start(
    empty_collection, capsys, events, options
):
    empty_collection.create_index("email", **options)
    assert start_error(capsys) == ABORTED
    assert events() == [("ERROR", "MongoDB returned an error: IndexKeySpecsConflict")]


@only_mongodb
def test_a_unique_index_on_other_fields_is_not_used(empty_collection, capsys):
    empty_collection.create_index("email")
    empty_collection.create_index("username", unique=True)
    empty_collection.create_index([("email", 1), ("tenant", 1)], unique=True)
    assert start_error(capsys) == ABORTED


@pytest.mark.parametrize("code", [13, 11000, 11001])
def test_another_error_prevents_the_start_although_the_index_is_listed(
    monkeypatch, capsys, events, code
):
    def fail(*args, **options):
        raise OperationFailure("s3cret", code)

    # MongoDB also lists an index that is being created, and that then fails.
    indexes = {"email_1": {"key": [("email", 1)], "unique": True}}
    collection = SimpleNamespace(create_index=fail, index_information=lambda: indexes)
    monkeypatch.setattr(db, "users", collection)
    assert start_error(capsys) == ABORTED
    assert events() == [("ERROR", "MongoDB returned an error: OperationFailure")]


@ignore_deprecated_throw
def test_duplicate_emails_prevent_the_start(empty_collection, capsys, events):
    empty_collection.insert_many([{"email": "twice@example.com"}, {"email": "twice@example.com"}])
    assert start_error(capsys) == ABORTED
    ((level, message),) = events()
    assert level == "ERROR"
    assert message.startswith("MongoDB returned an error: DuplicateKey")


@ignore_deprecated_throw
def test_the_traceback_of_a_failed_start_contains_no_email(empty_collection):
    empty_collection.insert_many([{"email": "twice@example.com"}, {"email": "twice@example.com"}])
    with pytest.raises(SystemExit) as stopped:
        db.prepare_collection()
    assert "twice" not in "".join(traceback.format_exception(stopped.value))


@ignore_deprecated_throw
def test_a_registration_beside_duplicate_emails_is_500(
    email, cheap_hasher, empty_collection, events
):
    empty_collection.insert_many([{"email": "twice"}, {"email": "twice"}])
    assert register(TestClient(app.app), email).status_code == 500
    ((level, message),) = events()
    assert level == "ERROR"
    assert message.startswith("MongoDB returned an error: DuplicateKey")


def test_a_duplicate_in_another_unique_index_is_500_and_not_409(
    email, cheap_hasher, empty_collection, events
):
    empty_collection.create_index("username", unique=True)
    client = TestClient(app.app)
    assert register(client, email).status_code == 201
    response = register(client, "other-" + email)
    assert (response.status_code, response.json()) == (500, {"detail": "Internal server error"})
    level, message = events()[-1]
    assert level == "ERROR"
    assert message.startswith("MongoDB returned an error: DuplicateKey")
