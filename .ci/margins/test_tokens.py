"""Tests of forged tokens. Each is made from the claims of a valid token."""

import base64
import json
import subprocess
import sys
from datetime import timedelta

import jwt
import pytest
from conftest import ROOT

import auth
from test_app import claims_of, is_invalid_token, logout, me, refresh


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


def test_a_token_in_the_query_string_is_ignored(client, tokens):
    response = client.get("/auth/me", params={"access_token": tokens["access_token"]})
    assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")


def test_a_token_of_a_generation_that_was_never_issued_ends_its_session(client, tokens):
    unknown = signed(claims_of(tokens["refresh_token"]) | {"generation": 5})
    assert is_invalid_token(refresh(client, unknown))
    assert is_invalid_token(me(client, tokens["access_token"]))


def test_the_longest_token_that_the_service_can_issue_is_accepted(client, other_user, monkeypatch):
    monkeypatch.setattr(auth, "ACCESS_TOKEN_LIFETIME", timedelta(minutes=999999))
    monkeypatch.setattr(auth, "REFRESH_TOKEN_LIFETIME", timedelta(days=999999))
    session = auth.create_session() | {"generation": 2**31 - 1}
    tokens = auth.create_tokens(other_user["user_id"], session)
    assert auth.read_token(tokens.access_token, "access").generation == 2**31 - 1
    assert auth.read_token(tokens.refresh_token, "refresh").generation == 2**31 - 1


def test_a_token_over_300_characters_is_rejected_before_it_is_parsed(
    client, other_user, monkeypatch
):
    parsed = []
    decode = jwt.decode
    monkeypatch.setattr(jwt, "decode", lambda *args, **options: parsed.append(1) or decode(*args))
    assert is_invalid_token(me(client, "x" * 301))
    assert is_invalid_token(refresh(client, "x" * 301))
    assert is_invalid_token(logout(client, "x" * 301))
    assert parsed == []
    assert is_invalid_token(me(client, "x" * 300))
    assert parsed == [1]


# The smallest stack of a thread on common systems is that of musl.
SMALL_STACK = """
import sys, threading
from fastapi import HTTPException
import auth

token, token_type = sys.argv[1:]
statuses = []


def read():
    try:
        auth.read_token(token, token_type)
    except HTTPException as error:
        statuses.append(error.status_code)


threading.stack_size(128 * 1024)
thread = threading.Thread(target=read)
thread.start()
thread.join(30)
assert statuses == [401], statuses
"""


@pytest.mark.parametrize("depth", [100, 5500])
@pytest.mark.parametrize("token_type", ["access", "refresh"])
def test_a_nested_header_does_not_overflow_the_stack_of_a_thread(token_type, depth):
    header = encoded(b'{"alg":' + b"[" * depth)
    token = f"{header}.e30.x"
    command = [sys.executable, "-c", SMALL_STACK, token, token_type]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
