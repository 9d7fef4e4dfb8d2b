"""What the service promises, over HTTP: in memory, or on the MongoDB that TEST_MONGO_URI names.

The tests use a database of their own, dropped at the end, and never what .env names.
"""

import base64
import json
import os
import runpy
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier, Lock

TEST_MONGO_URI = os.getenv("TEST_MONGO_URI", "")
SETTINGS = {  # an empty variable counts as not set, and keeps .env from setting it
    "MONGO_URI": TEST_MONGO_URI,
    "MONGO_DB_NAME": f"auth_jwt_test_{uuid.uuid4().hex}",
    "JWT_SECRET_KEY": TEST_MONGO_URI and "a key of the tests, of more than 32 bytes",
    "ACCESS_TOKEN_EXPIRE_MINUTES": "",
    "REFRESH_TOKEN_EXPIRE_DAYS": "",
}
os.environ.update(SETTINGS)

import jwt
import pytest
import uvicorn
from argon2 import PasswordHasher
from bson import ObjectId
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pymongo import MongoClient

import app
import auth
import db

HERE = Path(__file__).parent
PASSWORD = "MyS3cret@1"
AS_JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="session")
def client():
    with TestClient(app.app) as client:
        yield client
    if TEST_MONGO_URI:
        with MongoClient(TEST_MONGO_URI) as server:
            server.drop_database(SETTINGS["MONGO_DB_NAME"])


@pytest.fixture
def email():
    return f"{uuid.uuid4().hex}@example.com"


@pytest.fixture
def tokens(client, email):
    """The tokens of a user who has just registered."""
    return register(client, email).json()


@pytest.fixture(scope="session")
def bystander(client):
    """The tokens of a user whom no test touches."""
    return register(client, "bystander@example.com").json()


@pytest.fixture
def set_clock(monkeypatch):
    """A function that sets the service's clock to so many seconds, minutes, … ago; PyJWT's own goes on."""
    return lambda **ago: monkeypatch.setattr(auth, "now", lambda: datetime.now(UTC) - timedelta(**ago))


@pytest.fixture
def hurry():
    """Have the threads interrupt each other as often as they can, so that a race shows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def no_database(monkeypatch):
    """A context in which nobody answers for the database."""
    nobody = MongoClient("mongodb://127.0.0.1:9", connect=False, timeoutMS=100)

    @contextmanager
    def away():
        with monkeypatch.context() as patch:
            patch.setattr(db, "users", nobody["none"]["users"])
            yield

    yield away
    nobody.close()


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


def is_invalid_token(response):
    return (response.status_code, response.headers["WWW-Authenticate"]) == (401, 'Bearer error="invalid_token"')


def in_parallel(call, times):
    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(lambda _: call(), range(times)))


def claims_of(token):
    return jwt.decode(token, options={"verify_signature": False})


def stored_user(tokens):
    return db.users.find_one({"_id": ObjectId(tokens["user_id"])})


# Register


def test_register_answers_201_with_the_user_id_and_two_tokens(client, email):
    response = register(client, email)
    assert response.status_code == 201
    assert response.json().keys() == {"user_id", "access_token", "refresh_token"}
    assert ObjectId.is_valid(response.json()["user_id"])


def test_register_starts_a_session(client, tokens):
    assert me(client, tokens["access_token"]).status_code == 200
    assert refresh(client, tokens["refresh_token"]).status_code == 200


def test_register_refuses_a_taken_email_in_any_letter_case(client, tokens, email):
    for taken in (email, email.upper(), email.title()):
        response = register(client, taken)
        assert (response.status_code, response.json()) == (409, {"detail": "This email is registered"})


def test_of_simultaneous_registrations_of_one_email_one_succeeds(client, hurry, monkeypatch):
    meet = Barrier(8)  # so that all go to the database at the same instant
    monkeypatch.setattr(auth, "hash_password", lambda password: f"a hash {meet.wait(10)}")
    for _ in range(30):
        email = f"{uuid.uuid4().hex}@example.com"
        responses = in_parallel(lambda email=email: register(client, email), 8)
        assert sorted(response.status_code for response in responses) == [201] + [409] * 7
        assert db.users.count_documents({"email": email}) == 1


def test_register_stores_a_hash_with_the_second_recommended_option_of_rfc_9106(client, tokens):
    assert stored_user(tokens)["password_hash"].startswith("$argon2id$v=19$m=65536,t=3,p=4$")


def test_nothing_stored_is_a_password_or_a_token_or_a_field_that_nobody_asked_for(client, email):
    body = {"email": email, "password": PASSWORD, "role": "admin", "_id": "x", "created_at": "y"}
    tokens = client.post("/auth/register", json=body).json()
    user = stored_user(tokens)
    assert user.keys() == {"_id", "email", "password_hash", "created_at", "refresh_tokens"}
    assert user["refresh_tokens"][0].keys() == {"sid", "generation", "issued_at", "expires_at"}
    for secret in (PASSWORD, tokens["access_token"], tokens["refresh_token"]):
        assert secret not in str(user)


@pytest.mark.parametrize(
    "bad_email",
    ["", "alice", "alice@", "@example.com", "a b@example.com", "alice@example", "a@ex(ample.com", "a" * 255 + "@b.com"],
)
@pytest.mark.parametrize("route", ["register", "login"])
def test_a_bad_email_is_refused(client, route, bad_email):
    response = client.post(f"/auth/{route}", json={"email": bad_email, "password": PASSWORD})
    assert response.status_code == 422
    problem = {"loc": ["body", "email"], "msg": "This is not a valid email address", "type": "email_invalid"}
    assert response.json() == {"detail": [problem]}


@pytest.mark.parametrize(
    ("weak", "needs"),
    [
        ("", "at least 8 characters, a lower-case letter, an upper-case letter, a digit, a symbol"),
        ("aB3$567", "at least 8 characters"),
        ("STRONGP@SS1", "a lower-case letter"),
        ("strongp@ss1", "an upper-case letter"),
        ("StrongP@ss", "a digit"),
        ("StrongPass1", "a symbol"),
        ("strongpass", "an upper-case letter, a digit, a symbol"),
        ("Пароль②ß!", "a digit"),
    ],
)
def test_a_weak_password_is_told_everything_that_it_needs(client, email, weak, needs):
    response = register(client, email, weak)
    assert response.status_code == 422
    problem = {"loc": ["body", "password"], "msg": f"The password needs {needs}", "type": "weak_password"}
    assert response.json() == {"detail": [problem]}


@pytest.mark.parametrize("good", ["MyS3cret@1", "StrongP@ssw0rd", "aB3$5678", "aB3$" * 32, "Пароль٣ с пробелом"])
def test_a_good_password_is_accepted(client, email, good):
    assert register(client, email, good).status_code == 201
    assert login(client, email, good).status_code == 200


@pytest.mark.parametrize("route", ["register", "login"])
def test_a_password_of_129_characters_is_refused(client, email, route):
    response = client.post(f"/auth/{route}", json={"email": email, "password": "aB3$" * 32 + "x"})
    assert response.status_code == 422
    assert response.json()["detail"][0]["type"] == "password_too_long"


def test_a_password_is_the_same_composed_and_decomposed(client, email):
    composed, decomposed = "Grüße@Zoë1" * 12, "Gru\u0308ße@Zoe\u03081" * 12
    assert len(composed) <= 128 < len(decomposed)
    register(client, email, decomposed)
    assert login(client, email, composed).status_code == 200


# Login


def test_login_answers_200_with_the_user_id_and_two_tokens(client, tokens, email):
    response = login(client, email.upper())
    assert response.status_code == 200
    assert response.json().keys() == {"user_id", "access_token", "refresh_token"}
    assert response.json()["user_id"] == tokens["user_id"]
    assert me(client, response.json()["access_token"]).json()["email"] == email


def test_login_does_not_tell_an_unknown_email_from_a_wrong_password(client, tokens, email):
    answers = [login(client, "not-" + email), login(client, email, PASSWORD + "x"), login(client, email, "")]
    for response in answers:
        assert (response.status_code, response.json()) == (401, {"detail": "Wrong email or password"})
        assert response.headers["WWW-Authenticate"] == "Bearer"


def test_login_does_the_same_work_for_an_unknown_email(client, email, monkeypatch):
    verified = []

    class Hasher(PasswordHasher):
        def verify(self, hash, password):
            verified.append(hash)
            return super().verify(hash, password)

    monkeypatch.setattr(auth, "hasher", Hasher())
    login(client, email)
    assert [hash.split("$")[1:4] for hash in verified] == [["argon2id", "v=19", "m=65536,t=3,p=4"]]


def test_login_replaces_a_hash_with_older_parameters_once(client, tokens, email):
    old_hash = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(PASSWORD)
    db.users.update_one({"email": email}, {"$set": {"password_hash": old_hash}})
    assert login(client, email).status_code == 200
    new_hash = stored_user(tokens)["password_hash"]
    assert new_hash.startswith("$argon2id$v=19$m=65536,t=3,p=4$")
    assert login(client, email).status_code == 200
    assert stored_user(tokens)["password_hash"] == new_hash


@pytest.mark.parametrize("stored", ["$2b$12$no-argon2", "", None])
def test_login_of_a_user_whose_stored_hash_is_not_argon2_is_refused(client, tokens, email, stored):
    db.users.update_one({"email": email}, {"$set": {"password_hash": stored}})
    assert login(client, email).status_code == 401


def test_login_does_not_undo_a_password_changed_meanwhile(client, tokens, email, monkeypatch):
    class Hasher(PasswordHasher):
        def hash(self, password):
            db.users.update_one({"email": email}, {"$set": {"password_hash": "changed"}})
            return super().hash(password)

    old_hash = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(PASSWORD)
    db.users.update_one({"email": email}, {"$set": {"password_hash": old_hash}})
    monkeypatch.setattr(auth, "hasher", Hasher())
    login(client, email)
    assert stored_user(tokens)["password_hash"] == "changed"


def test_login_of_a_user_deleted_meanwhile_is_refused(client, email, monkeypatch):
    monkeypatch.setattr(auth, "authenticate", lambda email, password: str(ObjectId()))
    assert login(client, email).status_code == 401


# Me


def test_me_answers_who_the_bearer_is(client, tokens, email):
    response = me(client, tokens["access_token"])
    assert response.status_code == 200
    assert response.json().keys() == {"id", "email", "created_at"}
    assert (response.json()["id"], response.json()["email"]) == (tokens["user_id"], email)
    created_at = datetime.fromisoformat(response.json()["created_at"])
    assert created_at.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - created_at) < timedelta(minutes=1)


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer"}, {"Authorization": "Basic YTpi"}])
def test_without_a_token_the_challenge_names_no_error(client, header):
    response = client.get("/auth/me", headers=header)
    assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")


def test_a_token_in_the_query_string_is_not_looked_at(client, tokens):
    response = client.get("/auth/me", params={"access_token": tokens["access_token"]})
    assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")


def test_tokens_say_what_they_are_and_how_long_they_live(client, tokens):
    access, refresh = claims_of(tokens["access_token"]), claims_of(tokens["refresh_token"])
    assert access.keys() == {"sub", "type", "iat", "exp", "jti", "sid"}
    assert refresh.keys() == access.keys() | {"generation"}
    assert (access["type"], access["sub"], access["sid"]) == ("access", tokens["user_id"], refresh["sid"])
    assert (refresh["type"], refresh["sub"], refresh["generation"]) == ("refresh", tokens["user_id"], 0)
    assert access["jti"] != refresh["jti"]
    assert access["exp"] - access["iat"] == 15 * 60
    assert refresh["exp"] - refresh["iat"] == 7 * 24 * 60 * 60


def test_an_access_token_expires_after_15_minutes(client, email, set_clock):
    set_clock(minutes=15)
    expired = register(client, email).json()["access_token"]
    assert is_invalid_token(me(client, expired))
    set_clock(minutes=14)
    assert me(client, login(client, email).json()["access_token"]).status_code == 200


def test_the_token_of_a_deleted_user_is_refused_everywhere(client, tokens, email):
    db.users.delete_one({"email": email})
    assert is_invalid_token(me(client, tokens["access_token"]))
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))
    assert is_invalid_token(logout(client, tokens["refresh_token"]))


def test_a_token_is_refused_where_the_other_kind_is_asked_for(client, tokens):
    assert is_invalid_token(me(client, tokens["refresh_token"]))
    assert is_invalid_token(refresh(client, tokens["access_token"]))
    assert is_invalid_token(logout(client, tokens["access_token"]))
    assert me(client, tokens["access_token"]).status_code == 200


# Forged tokens, each made from the claims of a token that is good


def encoded(part):
    part = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def signed(claims, key=None, algorithm="HS256", **header):
    return jwt.encode(claims, key or auth.SECRET_KEY, algorithm, header)


def with_header(claims, header):
    """A token with a header that PyJWT would not write, signed with the right key."""
    signing_input = f"{encoded(header)}.{encoded(claims)}"
    signature = jwt.get_algorithm_by_name("HS256").sign(signing_input.encode(), auth.SECRET_KEY)
    return f"{signing_input}.{encoded(signature)}"


def tampered(claims, part):
    parts = signed(claims).split(".")
    parts[part] = ("A" if parts[part][0] != "A" else "B") + parts[part][1:]
    return ".".join(parts)


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
    "a kid that is no string": lambda c: with_header(c, {"alg": "HS256", "kid": 1}),
    "a key of its own": lambda c: signed(c, "k" * 32, jwk={"kty": "oct", "k": encoded(b"k" * 32)}),
    "a critical extension": lambda c: signed(c, crit=["exp"], exp=1),
    "an unencoded payload": lambda c: with_header(c, {"alg": "HS256", "b64": False, "crit": ["b64"]}),
    "header tampered": lambda c: tampered(c, 0),
    "payload tampered": lambda c: tampered(c, 1),
    "signature tampered": lambda c: tampered(c, 2),
    "signature missing": lambda c: signed(c).rsplit(".", 1)[0] + ".",
    "two parts": lambda c: signed(c).rsplit(".", 1)[0],
    "four parts": lambda c: signed(c) + ".x",
    "no token": lambda c: "x",
    "header deeply nested": lambda c: with_header(c, b'{"alg":' + b"[" * 2000 + b"]" * 2000 + b"}"),
    "payload deeply nested": lambda c: with_header(b'{"sub":' + b"[" * 2000 + b"]" * 2000 + b"}", {"alg": "HS256"}),
    "payload no object": lambda c: with_header([c], {"alg": "HS256"}),
    "payload no JSON": lambda c: with_header(b"{", {"alg": "HS256"}),
    "payload not UTF-8": lambda c: with_header(b'{"sub": "\xff"}', {"alg": "HS256"}),
    "a number of 5000 digits": lambda c: with_header(b'{"exp":' + b"9" * 5000 + b"}", {"alg": "HS256"}),
    "kilobytes": lambda c: "x" * 6000,
    "bytes of no encoding": lambda c: b"\xff\xfe\x00".decode("latin-1").strip("\0"),
    "in the future": lambda c: signed(c | {"iat": c["iat"] + 3600}),
    "expired": lambda c: signed(c | {"exp": c["iat"] - 1}),
    "exp infinite": lambda c: with_header(json.dumps(c | {"exp": float("inf")}).encode(), {"alg": "HS256"}),
    "exp a string": lambda c: signed(c | {"exp": str(c["exp"])}),
    "iat a string": lambda c: signed(c | {"iat": str(c["iat"])}),
    "iat true": lambda c: signed(c | {"iat": True}),
    "sub a number": lambda c: signed(c | {"sub": 1}),
    "sub no ObjectId": lambda c: signed(c | {"sub": "alice"}),
    "sub of 24 other letters": lambda c: signed(c | {"sub": "z" * 24}),
    "sub an operator": lambda c: signed(c | {"sub": {"$ne": None}}),
    "sub of nobody": lambda c: signed(c | {"sub": "0" * 24}),
    "type unknown": lambda c: signed(c | {"type": "id"}),
    "type a list": lambda c: signed(c | {"type": [c["type"]]}),
    "jti a number": lambda c: signed(c | {"jti": 1}),
    "sid an operator": lambda c: signed(c | {"sid": {"$ne": None}}),
    "sid a lone surrogate": lambda c: signed(c | {"sid": "\ud800"}),
    "sid of another form": lambda c: signed(c | {"sid": "x"}),
    "for another audience": lambda c: signed(c | {"aud": "someone else"}),
} | {f"{name} missing": lambda c, name=name: signed({k: v for k, v in c.items() if k != name}) for name in
     ("sub", "type", "iat", "exp", "jti", "sid")}  # fmt: skip

REFRESH_FORGERIES = FORGERIES | {
    "generation missing": lambda c: signed({k: v for k, v in c.items() if k != "generation"}),
    "generation a string": lambda c: signed(c | {"generation": "0"}),
    "generation true": lambda c: signed(c | {"generation": True}),
    "generation negative": lambda c: signed(c | {"generation": -1}),
    "generation of 100 digits": lambda c: signed(c | {"generation": 10**100}),
}


@pytest.mark.parametrize("sign", [signed, lambda claims: with_header(claims, {"alg": "HS256"})])
def test_a_token_with_the_same_claims_and_the_right_key_is_accepted(client, tokens, sign):
    assert me(client, sign(claims_of(tokens["access_token"]))).status_code == 200
    assert refresh(client, sign(claims_of(tokens["refresh_token"]))).status_code == 200


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forged_access_token_is_refused(client, bystander, forge):
    forged = forge(claims_of(bystander["access_token"]))
    response = client.get("/auth/me", headers={"Authorization": b"Bearer " + forged.encode("latin-1")})
    assert is_invalid_token(response)


@pytest.mark.parametrize("forge", REFRESH_FORGERIES.values(), ids=REFRESH_FORGERIES.keys())
def test_a_forged_refresh_token_is_refused(client, bystander, forge):
    forged = forge(claims_of(bystander["refresh_token"]))
    assert is_invalid_token(refresh(client, forged))
    assert is_invalid_token(logout(client, forged))
    assert me(client, bystander["access_token"]).status_code == 200


# Refresh and logout


def test_refresh_answers_a_new_pair_of_the_same_session(client, tokens):
    response = refresh(client, tokens["refresh_token"])
    assert response.status_code == 200
    assert response.json().keys() == {"user_id", "access_token", "refresh_token"}
    assert response.json()["user_id"] == tokens["user_id"]
    assert me(client, response.json()["access_token"]).status_code == 200
    before, after = claims_of(tokens["refresh_token"]), claims_of(response.json()["refresh_token"])
    assert (after["sid"], after["generation"]) == (before["sid"], before["generation"] + 1)
    assert after["jti"] != before["jti"]


def test_a_refresh_token_lives_7_days_from_the_last_exchange(client, email, set_clock):
    set_clock(days=8)
    first = register(client, email).json()["refresh_token"]
    set_clock(days=6)
    second = refresh(client, signed(claims_of(first) | {"exp": 2**40})).json()["refresh_token"]
    set_clock(days=0)
    assert is_invalid_token(refresh(client, first))
    assert refresh(client, second).status_code == 200


def test_of_twelve_simultaneous_exchanges_all_succeed_and_the_session_moves_by_one(client, tokens):
    responses = in_parallel(lambda: refresh(client, tokens["refresh_token"]), 12)
    assert [response.status_code for response in responses] == [200] * 12
    assert {claims_of(response.json()["refresh_token"])["generation"] for response in responses} == {1}
    assert [session["generation"] for session in stored_user(tokens)["refresh_tokens"]] == [1]
    assert refresh(client, responses[0].json()["refresh_token"]).status_code == 200


def test_the_token_just_replaced_answers_with_the_current_generation_for_10_seconds(client, email, set_clock):
    set_clock(seconds=9)
    tokens = register(client, email).json()
    refresh(client, tokens["refresh_token"])
    set_clock(seconds=0)
    again = refresh(client, tokens["refresh_token"]).json()
    assert claims_of(again["refresh_token"])["generation"] == 1
    assert [session["generation"] for session in stored_user(tokens)["refresh_tokens"]] == [1]
    assert me(client, again["access_token"]).status_code == 200
    assert refresh(client, again["refresh_token"]).status_code == 200


def test_the_token_replaced_10_seconds_ago_ends_its_session_and_no_other(client, email, set_clock):
    set_clock(seconds=10)
    tokens = register(client, email).json()
    other_device, other_user = login(client, email).json(), register(client, "other-" + email).json()
    newest = refresh(client, tokens["refresh_token"]).json()
    set_clock(seconds=0)
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))
    assert is_invalid_token(me(client, newest["access_token"]))
    assert is_invalid_token(refresh(client, newest["refresh_token"]))
    for alive in (other_device, other_user):
        assert me(client, alive["access_token"]).status_code == 200
        assert refresh(client, alive["refresh_token"]).status_code == 200


def test_a_token_replaced_twice_ends_its_session_at_any_time(client, tokens):
    second = refresh(client, tokens["refresh_token"]).json()
    third = refresh(client, second["refresh_token"]).json()
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))
    assert is_invalid_token(refresh(client, third["refresh_token"]))
    assert is_invalid_token(me(client, third["access_token"]))


def test_logout_answers_204_and_ends_the_session_at_once_and_no_other(client, tokens, email):
    other_device = login(client, email).json()
    response = logout(client, tokens["refresh_token"])
    assert (response.status_code, response.content) == (204, b"")
    assert "Content-Type" not in response.headers
    assert is_invalid_token(me(client, tokens["access_token"]))
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))
    assert me(client, other_device["access_token"]).status_code == 200


def test_logging_out_twice_or_with_an_older_token_is_harmless(client, tokens):
    newest = refresh(client, tokens["refresh_token"]).json()
    assert logout(client, tokens["refresh_token"]).status_code == 204
    assert logout(client, newest["refresh_token"]).status_code == 204
    assert is_invalid_token(me(client, newest["access_token"]))


def test_the_newest_20_sessions_stand(client, tokens, email):
    newer = [login(client, email).json() for _ in range(20)]
    assert is_invalid_token(me(client, tokens["access_token"]))
    assert is_invalid_token(refresh(client, tokens["refresh_token"]))
    assert [me(client, session["access_token"]).status_code for session in newer] == [200] * 20


# Bodies

SECRET = "hunter2-hunter2"
BAD_BODIES = {
    "empty": b"",
    "no JSON": b'{"email": "' + SECRET.encode(),
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


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
@pytest.mark.parametrize("route", ["register", "login", "refresh", "logout"])
def test_a_bad_body_is_refused_with_where_what_and_type_and_without_an_echo(client, route, body):
    response = client.post(f"/auth/{route}", content=body, headers=AS_JSON)
    assert response.status_code == 422
    for problem in response.json()["detail"]:
        assert problem.keys() == {"loc", "msg", "type"}
    assert "unter2" not in response.text


@pytest.mark.parametrize("field", ["email", "password"])
def test_a_lone_surrogate_is_refused_with_the_field_it_is_in(client, email, field):
    body = json.dumps({"email": email, "password": PASSWORD} | {field: "\ud800" + PASSWORD})
    response = client.post("/auth/register", content=body, headers=AS_JSON)
    assert [problem["loc"] for problem in response.json()["detail"]] == [["body", field]]


def test_a_nul_is_a_character_of_a_password_and_none_of_an_email_or_a_token(client, email):
    password = f"{PASSWORD}\0\0"
    assert register(client, email, password).status_code == 201
    assert login(client, email, password).status_code == 200
    assert login(client, email, PASSWORD).status_code == 401
    assert register(client, f"\0{email}").status_code == 422
    assert is_invalid_token(refresh(client, "\0"))


def test_a_lone_surrogate_is_no_token(client):
    response = client.post("/auth/refresh", content=rb'{"refresh_token": "\ud800"}', headers=AS_JSON)
    assert is_invalid_token(response)


@pytest.mark.parametrize("route", ["register", "login", "refresh", "logout"])
def test_a_body_over_8_kib_is_refused_whether_its_length_is_announced_or_not(client, route):
    body = b" " * (8 * 1024 + 1)
    for content in (body, iter([body])):
        response = client.post(f"/auth/{route}", content=content, headers=AS_JSON)
        assert response.status_code == 413


def test_an_endless_body_is_not_read_to_its_end(client):
    read = []

    def endless():
        while True:
            read.append(1)
            yield b" " * 1024

    async def receive_from(chunks=endless()):  # noqa: B008
        return {"type": "http.request", "body": next(chunks), "more_body": True}

    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/auth/login", "query_string": b"", "headers": headers}
    client.portal.call(app.app, scope, receive_from, send)
    assert (sent[0]["status"], len(read)) == (413, 9)


# Every answer


def test_no_success_is_cached(client, email):
    tokens = register(client, email)
    answers = [tokens, login(client, email), me(client, tokens.json()["access_token"])]
    answers += [refresh(client, tokens.json()["refresh_token"]), logout(client, tokens.json()["refresh_token"])]
    assert [response.headers["Cache-Control"] for response in answers] == ["no-store"] * 5


def test_the_docs_page_and_its_authorize_button_are_there(client):
    assert client.get("/docs").status_code == 200
    document = client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
    assert document["paths"]["/auth/me"]["get"]["security"] == [{"HTTPBearer": []}]


def test_the_openapi_document_names_every_answer(client):
    paths = client.get("/openapi.json").json()["paths"]
    answers = {path: set(next(iter(operations.values()))["responses"]) for path, operations in paths.items()}
    assert answers == {
        "/auth/register": {"201", "409", "413", "422", "503"},
        "/auth/login": {"200", "401", "413", "422", "503"},
        "/auth/me": {"200", "401", "503"},
        "/auth/refresh": {"200", "401", "413", "422", "503"},
        "/auth/logout": {"204", "401", "413", "422", "503"},
    }


def test_the_examples_of_the_openapi_document_pass(client):
    db.users.delete_one({"email": "alice@example.com"})
    fields = client.get("/openapi.json").json()["components"]["schemas"]["NewCredentials"]["properties"]
    example = {name: field["examples"][0] for name, field in fields.items()}
    assert client.post("/auth/register", json=example).status_code == 201
    assert client.post("/auth/login", json=example).status_code == 200


# Floods


def test_a_full_queue_refuses_hashes_at_once_and_nothing_else(client, tokens, email, no_database):
    places = auth.HASHES_AT_ONCE + auth.HASHES_WAITING
    assert all(auth.places.acquire(blocking=False) for _ in range(places))
    try:
        with no_database():  # which is not asked
            for response in (register(client, "new-" + email), login(client, email)):
                assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
                assert response.json() == {"detail": "Too many logins at once; try again"}
        assert me(client, tokens["access_token"]).status_code == 200
        assert refresh(client, tokens["refresh_token"]).status_code == 200
    finally:
        auth.places.release(places)
    assert login(client, email).status_code == 200


def test_a_place_in_the_queue_is_given_back_whatever_happens(client, tokens, email, no_database, monkeypatch):
    monkeypatch.setattr(auth, "places", auth.threading.Semaphore(1))
    answers = [login(client, email), login(client, email, "wrong"), register(client, email)]
    with no_database():
        answers.append(login(client, email))
    answers.append(login(client, email))
    assert [response.status_code for response in answers] == [200, 401, 409, 503, 200]


@pytest.mark.parametrize("route", ["register", "login"])
def test_no_more_hashes_are_made_at_once_than_allowed(client, tokens, email, route, monkeypatch):
    lock, now, most = Lock(), [], []

    @contextmanager
    def counted():
        with lock:
            now.append(1)
            most.append(len(now))
        yield
        with lock:
            now.pop()

    class Hasher(PasswordHasher):
        def hash(self, password):
            with counted():
                return super().hash(password)

        def verify(self, hash, password):
            with counted():
                return super().verify(hash, password)

    monkeypatch.setattr(auth, "hasher", Hasher())
    monkeypatch.setattr(auth, "hashing", auth.threading.Semaphore(2))
    body = {"email": email, "password": PASSWORD}
    answers = in_parallel(lambda: client.post(f"/auth/{route}", json=body), 8)
    assert {response.status_code for response in answers} == {200 if route == "login" else 409}
    assert max(most) == 2


# A database that is away


def test_without_a_database_what_needs_it_is_503_and_says_nothing_of_it(client, tokens, email, no_database, caplog):
    with no_database():
        answers = [register(client, "new-" + email), login(client, email), me(client, tokens["access_token"])]
        answers += [refresh(client, tokens["refresh_token"]), logout(client, tokens["refresh_token"])]
    for response in answers:
        assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
        assert response.json() == {"detail": "The database is unavailable; try again"}
    assert {record.message for record in caplog.records if record.name == "auth"} == {
        "MongoDB is unavailable: ServerSelectionTimeoutError"
    }


def test_without_a_database_what_does_not_need_it_is_answered_as_always(client, no_database):
    with no_database():
        assert client.post("/auth/login", json={"email": "x"}).status_code == 422
        assert is_invalid_token(me(client, "x"))
        assert is_invalid_token(refresh(client, "x"))


# Embedding


def test_another_app_includes_the_router_and_protects_its_own_routes(email, no_database, monkeypatch):
    monkeypatch.setattr(db, "users", db.users.database["embedded"])
    outer = FastAPI()
    outer.include_router(app.router)

    @outer.get("/mine")
    def mine(user: auth.CurrentUser):
        return {"of": user.email}

    with TestClient(outer) as client:
        assert db.users.index_information()["email_1"]["unique"]
        bearer = {"Authorization": f"Bearer {register(client, email).json()['access_token']}"}
        assert client.get("/mine", headers=bearer).json() == {"of": email}
        assert client.get("/mine").status_code == 401
        assert is_invalid_token(client.get("/mine", headers={"Authorization": "Bearer x"}))
        assert SECRET not in client.post("/auth/login", json={"email": SECRET, "password": [SECRET]}).text
        with no_database():
            assert client.get("/mine", headers=bearer).status_code == 503
            assert login(client, email).status_code == 503


# Starting


def start(command, folder=HERE, **settings):
    """Run the command with only these settings, and return what it was: its exit code and standard error."""
    environment = os.environ | dict.fromkeys(SETTINGS, "") | settings
    process = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    return process.returncode, process.stderr


UVICORN = ["-m", "uvicorn", "app:app", "--port", "0"]
GOOD = {"MONGO_URI": "mongodb://alice:s3cret-uri@127.0.0.1:9", "JWT_SECRET_KEY": "s3cret-key-" * 4}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("JWT_SECRET_KEY", ""),
        ("JWT_SECRET_KEY", "s3cret-key-of-31-bytes-is-short"),
        ("JWT_SECRET_KEY", "replace_with_a_strong_secret"),
        ("JWT_SECRET_KEY", "ssh-rsa s3cret-key-s3cret-key-s3cret-key"),
        ("MONGO_URI", ""),
        ("MONGO_URI", "s3cret-uri"),
        ("MONGO_URI", "http://s3cret-uri"),
        ("MONGO_URI", "mongodb://alice:s3cret-uri@@127.0.0.1"),
        ("MONGO_URI", "mongodb://alice:s3cret-uri@127.0.0.1:port"),
        ("MONGO_URI", "mongodb://127.0.0.1/?maxPoolSize=s3cret-uri"),
        ("MONGO_URI", "mongodb://127.0.0.1/?tls=true&tlsCAFile=s3cret-uri"),
        ("MONGO_URI", "mongodb://alice:s3cret-uri\udcff@127.0.0.1"),
        ("MONGO_DB_NAME", "no name"),
        ("MONGO_DB_NAME", "long" * 16),
        ("ACCESS_TOKEN_EXPIRE_MINUTES", "soon"),
        ("ACCESS_TOKEN_EXPIRE_MINUTES", "0"),
        ("ACCESS_TOKEN_EXPIRE_MINUTES", "-1"),
        ("ACCESS_TOKEN_EXPIRE_MINUTES", "nan"),
        ("REFRESH_TOKEN_EXPIRE_DAYS", "inf"),
        ("REFRESH_TOKEN_EXPIRE_DAYS", "1e9"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_one_line_that_names_it(setting, value):
    code, printed = start(["app.py"], **GOOD | {setting: value})
    assert code == 3
    assert printed.startswith("auth-jwt cannot start: ") and printed.count("\n") == 1
    assert setting in printed
    assert "s3cret" not in printed


def test_an_env_file_that_is_no_utf_8_stops_the_start_with_one_line(tmp_path):
    for module in ("app.py", "auth.py", "db.py"):
        (tmp_path / module).write_bytes((HERE / module).read_bytes())
    (tmp_path / ".env").write_text("MONGO_URI=mongodb://127.0.0.1", encoding="utf-16")
    code, printed = start(["app.py"], folder=tmp_path)
    assert (code, printed) == (3, "auth-jwt cannot start: .env cannot be read; save it as plain text in UTF-8.\n")


@pytest.mark.parametrize("setting", ["JWT_SECRET_KEY", "MONGO_URI"])
def test_a_half_configured_service_does_not_start_under_uvicorn_either(setting):
    code, printed = start(UVICORN, **GOOD | {setting: ""})
    assert (code, printed.count("\n")) == (3, 1)
    assert printed.startswith(f"auth-jwt cannot start: {setting}")


def test_a_mongodb_that_does_not_answer_stops_the_start():
    code, printed = start(UVICORN, **GOOD)
    assert code == 3
    assert "auth-jwt cannot start: no usable MongoDB at MONGO_URI (ServerSelectionTimeoutError)" in printed
    assert "s3cret" not in printed


def test_users_in_memory_are_announced_as_such(client, caplog):
    with TestClient(app.app):
        announced = [record.message for record in caplog.records if "in memory" in record.message]
    assert len(announced) == (0 if TEST_MONGO_URI else 1)


def test_python_app_py_serves_on_port_5000_and_says_where_the_docs_are(monkeypatch, capsys):
    served = []
    monkeypatch.setattr(uvicorn, "run", lambda served_app, **options: served.append(options))
    runpy.run_path(str(HERE / "app.py"), run_name="__main__")
    assert served == [{"host": "127.0.0.1", "port": 5000}]
    assert "http://127.0.0.1:5000/docs" in capsys.readouterr().out
