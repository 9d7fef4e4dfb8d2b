"""Tests over HTTP: what the service promises, in the order of auth.py.

They run in memory, or on the MongoDB server at TEST_MONGO_URI in a database with a random name,
which is dropped at the end. They do not use .env.
"""

import logging
import os
import runpy
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

TEST_MONGO_URI = os.getenv("TEST_MONGO_URI", "")
SETTINGS = {  # An empty variable takes precedence over .env, and stands for the default.
    "MONGO_URI": TEST_MONGO_URI,
    "MONGO_DB_NAME": f"auth_jwt_test_{uuid.uuid4().hex}",
    "JWT_SECRET_KEY": TEST_MONGO_URI and "a key for the tests, longer than 32 bytes",
    "ACCESS_TOKEN_EXPIRE_MINUTES": "",
    "REFRESH_TOKEN_EXPIRE_DAYS": "",
    "CORS_ORIGINS": "",
}
os.environ.update(SETTINGS)

import jwt
import pytest
from argon2 import PasswordHasher
from bson import ObjectId
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

import app
import auth
import db

HERE = Path(__file__).parent
PASSWORD = "MyS3cret@1"
ADDRESS = "192.0.2.100"  # of the fixture client
DEFAULT_HASHER, UNKNOWN_USER = auth.hasher, auth.UNKNOWN_USER
CHEAP_HASHER = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


# Fixtures and helpers


@pytest.fixture(scope="session", autouse=True)
def cheap_hasher():
    """Make hashes cheap, so that the tests are fast."""
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


@pytest.fixture
def email():
    return f"{uuid.uuid4().hex}@example.com"


@pytest.fixture
def tokens(client, email):
    """The tokens of a new user."""
    return register(client, email).json()


@pytest.fixture
def events(caplog):
    """A function that returns the log so far, as pairs of level and message."""
    caplog.set_level(logging.INFO, "auth_jwt")
    return lambda: [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "auth_jwt"]


validate_exp = jwt.PyJWT._validate_exp


def validate_exp_with_auth_clock(self, payload, now, leeway):
    """Replace PyJWT's clock with that of auth.py."""
    validate_exp(self, payload, auth.now().timestamp(), leeway)


@pytest.fixture
def set_clock(monkeypatch):
    """A function that stops the clocks of auth.py and PyJWT at an offset from the present."""
    start = datetime.now(UTC).replace(microsecond=0)
    monkeypatch.setattr(jwt.PyJWT, "_validate_exp", validate_exp_with_auth_clock)

    def set_clock(**ahead):
        monkeypatch.setattr(auth, "now", lambda: start + timedelta(**ahead))

    set_clock()
    return set_clock


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


def test_only_one_of_twelve_simultaneous_registrations_succeeds(client, email):
    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(lambda _: register(client, email), range(12)))
    statuses = [response.status_code for response in responses]
    assert statuses.count(201) == 1
    assert set(statuses) <= {201, 409, 503}
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
    "alice": "must have an @-sign",
    "alice@example": "should have a period",
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
    composed, decomposed = "Grüße@Zoë1", "Gru\u0308ße@Zoe\u03081"
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


def test_login_replaces_a_hash_with_older_parameters_once(client, tokens, email, default_hasher):
    assert stored_user(tokens)["password_hash"].startswith("$argon2id$v=19$m=8,t=1,p=1$")
    assert login(client, email).status_code == 200
    new_hash = stored_user(tokens)["password_hash"]
    assert new_hash.startswith("$argon2id$v=19$m=65536,t=3,p=4$")
    assert login(client, email).status_code == 200
    assert stored_user(tokens)["password_hash"] == new_hash


def test_a_login_with_the_old_password_fails_if_the_password_is_changed_meanwhile(
    client, tokens, email, monkeypatch
):
    new_session = auth.new_session

    def change_password_first():
        change = {"password_hash": CHEAP_HASHER.hash("N3w-Passw0rd"), "refresh_tokens": []}
        db.users.update_one({"email": email}, {"$set": change})
        return new_session()

    monkeypatch.setattr(auth, "new_session", change_password_first)
    assert login(client, email).status_code == 401
    assert stored_user(tokens)["refresh_tokens"] == []


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


# Refresh


def test_refresh_returns_a_new_pair_of_tokens_of_the_same_session(client, tokens):
    response = refresh(client, tokens["refresh_token"])
    assert response.status_code == 200
    assert response.json().keys() == {"user_id", "access_token", "refresh_token"}
    assert response.json()["user_id"] == tokens["user_id"]
    assert me(client, response.json()["access_token"]).status_code == 200
    before = claims_of(tokens["refresh_token"])
    after = claims_of(response.json()["refresh_token"])
    assert (after["sid"], after["generation"]) == (before["sid"], before["generation"] + 1)


def test_a_refresh_token_expires_7_days_after_the_last_refresh(client, tokens, set_clock):
    set_clock(days=6)
    second = refresh(client, tokens["refresh_token"]).json()
    set_clock(days=12, hours=23)
    third = refresh(client, second["refresh_token"])
    assert third.status_code == 200
    set_clock(days=20)
    assert is_invalid_token(refresh(client, third.json()["refresh_token"]))


@pytest.mark.parametrize(("send", "status"), [(refresh, 401), (logout, 204)])
def test_an_expired_refresh_token_ends_its_session(client, tokens, set_clock, send, status):
    set_clock(days=7)
    assert send(client, tokens["refresh_token"]).status_code == status
    assert stored_user(tokens)["refresh_tokens"] == []


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
    message = (
        f"authn_token_reuse_in_grace user={tokens['user_id']} session={session} network={ADDRESS}"
    )
    assert events() == [("INFO", message)]
    assert refresh(client, again["refresh_token"]).status_code == 200


def test_the_previous_token_ends_its_session_after_60_seconds(client, tokens, email, set_clock):
    other_session = login(client, email).json()
    newest = refresh(client, tokens["refresh_token"]).json()
    set_clock(seconds=60)
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))
    assert is_invalid_token(me(client, newest["access_token"]))
    assert is_invalid_token(refresh(client, newest["refresh_token"]))
    assert me(client, other_session["access_token"]).status_code == 200


def test_a_thief_who_refreshes_first_is_logged_out_with_the_user(client, tokens, set_clock):
    stolen = refresh(client, tokens["refresh_token"]).json()
    set_clock(minutes=5)
    stolen = refresh(client, stolen["refresh_token"]).json()
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))
    assert is_invalid_token(refresh(client, stolen["refresh_token"]))
    assert is_invalid_token(me(client, stolen["access_token"]))


def test_a_token_that_was_replaced_twice_ends_its_session_at_any_time(client, tokens):
    second = refresh(client, tokens["refresh_token"]).json()
    third = refresh(client, second["refresh_token"]).json()
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))
    assert is_invalid_token(refresh(client, third["refresh_token"]))
    assert is_invalid_token(me(client, third["access_token"]))


# Logout


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


# Current user


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


def sign(claims):
    return jwt.encode(claims, auth.SECRET_KEY, algorithm="HS256")


FORGERIES = {
    "not a token": lambda claims: "x",
    "signed with another key": lambda claims: jwt.encode(claims, "k" * 32, algorithm="HS256"),
    "not signed": lambda claims: jwt.encode(claims, None, algorithm="none"),
    "without a type": lambda claims: sign({key: claims[key] for key in claims if key != "type"}),
    "of another session": lambda claims: sign(claims | {"sid": "0" * 32}),
    "too long": lambda claims: sign(claims | {"padding": "x" * 100}),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forged_access_token_is_invalid(client, tokens, forge):
    assert is_invalid_token(me(client, forge(claims_of(tokens["access_token"]))))


# Login limit


def test_a_network_may_fail_twenty_times_in_an_hour(client, tokens, email, set_clock):
    for minute in range(20):
        set_clock(minutes=minute)
        assert login(client, email, "wrong").status_code == 401
    set_clock(minutes=59)
    for password in (PASSWORD, "wrong"):
        response = login(client, email, password)
        assert (response.status_code, response.headers["Retry-After"]) == (429, "60")
        assert response.json() == {"detail": "Too many failed logins; try again later"}
    set_clock(minutes=60)
    assert login(client, email).status_code == 200


def test_all_networks_together_may_fail_a_hundred_times_in_an_hour(
    client, tokens, email, set_clock
):
    for number in range(100):
        stranger = client_at(client, f"203.0.113.{number}")
        assert login(stranger, email, "wrong").status_code == 401
    stranger = client_at(client, "198.51.100.1")
    response = login(stranger, email)
    assert (response.status_code, response.headers["Retry-After"]) == (429, "3600")
    # The user has a session in this network.
    assert login(client, email).status_code == 200


def test_failures_of_one_network_do_not_delay_another(client, tokens, email):
    for _ in range(21):
        login(client_at(client, "203.0.113.1"), email, "wrong")
    assert login(client, email).status_code == 200


def test_a_user_who_is_locked_out_keeps_the_sessions(client, tokens, email):
    for _ in range(21):
        login(client, email, "wrong")
    assert me(client, tokens["access_token"]).status_code == 200
    newer = refresh(client, tokens["refresh_token"])
    assert newer.status_code == 200
    assert logout(client, newer.json()["refresh_token"]).status_code == 204


def test_the_right_password_removes_the_failures_of_its_network(client, tokens, email):
    login(client_at(client, "203.0.113.1"), email, "wrong")
    login(client, email, "wrong")
    login(client, email)
    networks = [failure["network"] for failure in stored_user(tokens)["login_failures"]]
    assert networks == ["203.0.113.1"]


# Overload and outages


def test_a_login_without_a_place_for_its_hash_is_503(client, email, monkeypatch):
    monkeypatch.setattr(auth, "hash_slots", dict.fromkeys(range(8), ADDRESS))
    response = login(client, email)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert response.json() == {"detail": "The service is overloaded; try again"}


def test_a_request_during_an_outage_of_mongodb_is_503(client, tokens, monkeypatch):
    monkeypatch.setattr(db, "next_attempt", db.monotonic() + 60)
    response = me(client, tokens["access_token"])
    assert (response.status_code, response.headers["Retry-After"]) == (503, "2")
    assert response.json() == {"detail": "The database is unavailable; try again"}


# Security events


def test_each_security_event_is_logged_with_the_level_of_the_owasp_vocabulary(
    client, email, events
):
    tokens = register(client, email).json()
    user_id = tokens["user_id"]
    first = claims_of(tokens["access_token"])["sid"]
    newer = login(client, email).json()
    second = claims_of(newer["access_token"])["sid"]
    for _ in range(20):
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
        *[failure] * 20,
        ("WARNING", f"authn_login_lock user={user_id} network={ADDRESS}"),
        ("WARNING", f"authn_login_fail user=unknown network={ADDRESS}"),
        ("INFO", f"authn_token_revoked user={user_id} session={first} network={ADDRESS}"),
        ("CRITICAL", f"authn_token_reuse user={user_id} session={second} network={ADDRESS}"),
    ]
    for secret in (PASSWORD, email, *tokens.values(), *newest.json().values()):
        assert secret == user_id or secret not in str(events())


# Request bodies

BAD_BODIES = {
    "empty": "",
    "not JSON": '{"password": "hunter2',
    "a list": '["hunter2"]',
    "a string": '"hunter2"',
    "no fields": "{}",
    "a list as password": '{"email": "alice@example.com", "password": ["hunter2"]}',
    "operators": '{"email": {"$ne": "hunter2"}, "password": {"$ne": "hunter2"}}',
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
@pytest.mark.parametrize("route", ["register", "login", "refresh", "logout"])
def test_the_response_to_a_malformed_body_does_not_quote_it(client, route, body):
    headers = {"Content-Type": "application/json"}
    response = client.post(f"/auth/{route}", content=body, headers=headers)
    assert response.status_code == 422
    assert "hunter2" not in response.text
    for error in response.json()["detail"]:
        assert error.keys() == {"loc", "msg", "type"}


def test_a_body_over_4_kib_is_rejected(client, email):
    response = register(client, email, "x" * 4 * 1024)
    assert response.status_code == 413


# Documentation


def test_the_docs_page_has_an_authorize_button(client):
    assert client.get("/docs").status_code == 200
    document = client.get("/openapi.json").json()
    schemes = document["components"]["securitySchemes"]
    assert "access_token" in schemes["AccessToken"].pop("description")
    assert schemes == {"AccessToken": {"type": "http", "scheme": "bearer"}}
    assert document["paths"]["/auth/me"]["get"]["security"] == [{"AccessToken": []}]


def test_the_examples_in_the_openapi_document_are_valid(client):
    db.users.delete_one({"email": "alice@example.com"})
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    fields = schemas["NewCredentials"]["properties"]
    example = {name: field["examples"][0] for name, field in fields.items()}
    assert client.post("/auth/register", json=example).status_code == 201
    assert client.post("/auth/login", json=example).status_code == 200


def test_no_successful_response_is_cached(client, email):
    tokens = register(client, email)
    responses = [tokens, login(client, email), me(client, tokens.json()["access_token"])]
    responses.append(refresh(client, tokens.json()["refresh_token"]))
    responses.append(logout(client, tokens.json()["refresh_token"]))
    assert [response.headers["Cache-Control"] for response in responses] == ["no-store"] * 5


# CORS

ORIGIN = "http://localhost:5173"


@pytest.fixture
def browser(cheap_hasher, monkeypatch):
    """A client of an application that was started with CORS_ORIGINS."""
    monkeypatch.setenv("CORS_ORIGINS", f"https://example.com, {ORIGIN}/")
    own_app = runpy.run_path(str(HERE / "app.py"))["app"]
    return TestClient(own_app, headers={"Origin": ORIGIN}, client=(ADDRESS, 50000))


@pytest.mark.parametrize(
    ("method", "path", "header"),
    [
        ("POST", "/auth/login", "content-type"),
        ("GET", "/auth/me", "authorization"),
        ("GET", "/auth/me", "authorization,sentry-trace,baggage"),
        ("POST", "/auth/refresh", "content-type,x-requested-with"),
    ],
)
def test_a_preflight_may_announce_any_request_header(browser, method, path, header):
    headers = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": header}
    response = browser.options(path, headers=headers)
    assert response.status_code == 200
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert response.headers["Access-Control-Allow-Headers"] == header


def test_an_allowed_origin_can_read_responses_and_their_headers(browser, email):
    responses = [register(browser, email), register(browser, email), me(browser, "x")]
    assert [response.status_code for response in responses] == [201, 409, 401]
    for response in responses:
        assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
        exposed = response.headers["Access-Control-Expose-Headers"]
        assert exposed == "Retry-After, WWW-Authenticate"


def test_another_origin_is_not_allowed(browser):
    response = browser.get("/auth/me", headers={"Origin": "http://localhost:8080"})
    assert "Access-Control-Allow-Origin" not in response.headers


def test_no_origin_is_allowed_by_default(client):
    response = client.get("/auth/me", headers={"Origin": ORIGIN})
    assert not [name for name in response.headers if name.startswith("access-control")]


# Settings


def start(**settings):
    """Start the service with these settings. Return its exit code and its standard error."""
    environment = os.environ | dict.fromkeys(SETTINGS, "") | settings
    process = subprocess.run(
        [sys.executable, "app.py"],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return process.returncode, process.stderr


MONGODB = {"MONGO_URI": "mongodb://127.0.0.1", "JWT_SECRET_KEY": "s3cret" * 8}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"MONGO_URI": "mongodb://127.0.0.1"}, "JWT_SECRET_KEY"),
        ({"JWT_SECRET_KEY": "s3cret" * 8}, "MONGO_URI"),
        (MONGODB | {"JWT_SECRET_KEY": "too-short-s3cret"}, "JWT_SECRET_KEY"),
        (MONGODB | {"MONGO_URI": "mongodb://alice:s3cret@@127.0.0.1"}, "MONGO_URI"),
        (MONGODB | {"MONGO_URI": "mongodb://127.0.0.1/?tlss=true"}, "MONGO_URI"),
        (MONGODB | {"MONGO_DB_NAME": "two words"}, "MONGO_DB_NAME"),
        ({"ACCESS_TOKEN_EXPIRE_MINUTES": "soon"}, "ACCESS_TOKEN_EXPIRE_MINUTES"),
        ({"REFRESH_TOKEN_EXPIRE_DAYS": "0"}, "REFRESH_TOKEN_EXPIRE_DAYS"),
    ],
)
def test_an_invalid_setting_prevents_the_start_with_one_line(settings, named):
    code, printed = start(**settings)
    assert (code, printed.count("\n")) == (3, 1)
    assert printed.startswith("auth-jwt cannot start: ")
    assert named in printed
    assert "s3cret" not in printed


def test_white_space_around_a_setting_is_ignored(monkeypatch):
    monkeypatch.setenv("MONGO_DB_NAME", " auth_db\n")
    assert runpy.run_path(str(HERE / "db.py"))["MONGO_DB_NAME"] == "auth_db"


@pytest.mark.parametrize("folder", ["accounts", "."])
def test_an_env_file_is_read_beside_the_module_or_in_a_folder_above(tmp_path, monkeypatch, folder):
    copy = tmp_path / "accounts" / "db.py"
    copy.parent.mkdir()
    copy.write_bytes((HERE / "db.py").read_bytes())
    env_file = tmp_path / folder / ".env"
    env_file.write_text("MONGO_DB_NAME=from_file")
    monkeypatch.delenv("MONGO_DB_NAME")
    module = runpy.run_path(str(copy))
    assert module["MONGO_DB_NAME"] == "from_file"
    assert module["ENV_FILE"] == env_file


def test_a_warning_says_that_users_are_kept_in_memory(client, events):
    with TestClient(app.app):
        warnings = [message for _, message in events() if "in memory" in message]
    assert len(warnings) == (0 if TEST_MONGO_URI else 1)


# Embedding


@pytest.fixture
def host(cheap_hasher):
    """Another application, which includes the router."""
    host = FastAPI()
    host.include_router(app.router)
    return host


def test_another_app_can_include_the_router_and_use_the_current_user(host, email):
    @host.get("/mine")
    def mine(user: auth.CurrentUser):
        return {"owner": user.email}

    with TestClient(host) as client:
        bearer = {"Authorization": f"Bearer {register(client, email).json()['access_token']}"}
        assert client.get("/mine", headers=bearer).json() == {"owner": email}
        assert client.get("/mine").status_code == 401
        assert is_invalid_token(client.get("/mine", headers={"Authorization": "Bearer x"}))


def test_the_error_handlers_of_another_app_apply_and_get_no_input(host):
    @host.exception_handler(RequestValidationError)
    def handle(request, error):
        return JSONResponse({"errors": error.errors()}, 418)

    response = login(TestClient(host), "x", ["hunter2"])
    assert response.status_code == 418
    assert [error["loc"] for error in response.json()["errors"]] == [
        ["body", "email"],
        ["body", "password"],
    ]
    assert "hunter2" not in response.text


def test_the_operation_ids_stay_short_in_another_app(host):
    paths = host.openapi()["paths"].values()
    ids = [operation["operationId"] for path in paths for operation in path.values()]
    assert ids == ["register", "login", "me", "refresh", "logout"]


def test_a_database_error_is_an_error_response_in_a_route_of_another_app(host, monkeypatch):
    @host.get("/users")
    def list_users(email: str):
        return db.find_user_by_email(email)

    monkeypatch.setattr(db, "next_attempt", db.monotonic() + 60)
    response = TestClient(host).get("/users", params={"email": "x"})
    assert (response.status_code, response.headers["Retry-After"]) == (503, "2")
