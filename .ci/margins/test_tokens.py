"""Tests of forged tokens and of the limit on the length of a token."""

import base64
import json
import os
import subprocess
import sys
from datetime import timedelta

import jwt
import pytest
from conftest import ROOT

import auth
from test_app import claims_of, is_invalid_token, logout, me, refresh

HS256 = {"alg": "HS256"}


def encoded(part):
    part = part if isinstance(part, bytes) else json.dumps(part, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def signed(claims, header=HS256, key=None, algorithm="HS256"):
    """Return a token with any header and payload, which PyJWT would partly refuse to encode."""
    signing_input = f"{encoded(header)}.{encoded(claims)}"
    key = auth.SECRET_KEY if key is None else key
    signature = jwt.get_algorithm_by_name(algorithm).sign(signing_input.encode(), key)
    return f"{signing_input}.{encoded(signature)}"


def without(claims, name):
    return {key: value for key, value in claims.items() if key != name}


def tampered(claims, part):
    """Return a token in which the first character of a part is another one."""
    parts = signed(claims).split(".")
    parts[part] = ("A" if parts[part][0] != "A" else "B") + parts[part][1:]
    return ".".join(parts)


# Each function makes a token from the claims of a valid one.
NESTED = b"[" * 80 + b"]" * 80
EMBEDDED = {"kty": "oct", "k": encoded(b"known")}
FORGERIES = {
    # The header selects the algorithm or the key.
    "alg none": lambda c: f"{encoded({'alg': 'none'})}.{encoded(c)}.",
    "alg nOnE with a signature": lambda c: signed(c, {"alg": "nOnE"}),
    "alg missing": lambda c: signed(c, {"typ": "JWT"}),
    "alg a list": lambda c: signed(c, {"alg": ["HS256"]}),
    "HS384": lambda c: signed(c, {"alg": "HS384"}, algorithm="HS384"),
    "HS512": lambda c: signed(c, {"alg": "HS512"}, algorithm="HS512"),
    "RS256 in the header": lambda c: signed(c, {"alg": "RS256"}),
    "another key": lambda c: signed(c, key=b"k" * 32),
    "the kid of an empty file": lambda c: signed(c, HS256 | {"kid": "../dev/null"}, key=b""),
    "a kid that is not a string": lambda c: signed(c, HS256 | {"kid": 1}),
    "an embedded key": lambda c: signed(c, HS256 | {"jwk": EMBEDDED}, key=b"known"),
    "a critical extension": lambda c: signed(c, HS256 | {"crit": ["exp"], "exp": 1}),
    "an unencoded payload": lambda c: signed(c, HS256 | {"b64": False, "crit": ["b64"]}),
    # The signature belongs to another token, or a part is missing.
    "header tampered": lambda c: tampered(c, 0),
    "payload tampered": lambda c: tampered(c, 1),
    "signature tampered": lambda c: tampered(c, 2),
    "signature missing": lambda c: signed(c).rsplit(".", 1)[0] + ".",
    "two parts": lambda c: signed(c).rsplit(".", 1)[0],
    "four parts": lambda c: signed(c) + ".x",
    "one part": lambda c: "x",
    "not ASCII": lambda c: "ÿþ",
    # The header or the payload is not an object of JSON.
    "header a list": lambda c: signed(c, [HS256]),
    "header nested": lambda c: signed({}, b'{"alg":' + NESTED + b"}"),
    "payload a list": lambda c: signed([c]),
    "payload nested": lambda c: signed(b'{"sub":' + NESTED + b"}"),
    "payload not JSON": lambda c: signed(b"{"),
    "payload not UTF-8": lambda c: signed(b'{"sub": "\xff"}'),
    # The right key has signed other claims.
    "exp infinite": lambda c: signed(c | {"exp": float("inf")}),
    "exp a string": lambda c: signed(c | {"exp": str(c["exp"])}),
    "exp true": lambda c: signed(c | {"exp": True}),
    "exp a fraction": lambda c: signed(c | {"exp": c["exp"] + 0.5}),
    "not valid yet": lambda c: signed(c | {"nbf": c["exp"]}),
    "for another audience": lambda c: signed(c | {"aud": "someone else"}),
    "type unknown": lambda c: signed(c | {"type": "id"}),
    "type a list": lambda c: signed(c | {"type": [c["type"]]}),
    "sub a number": lambda c: signed(c | {"sub": 1}),
    "sub no ObjectId": lambda c: signed(c | {"sub": "alice"}),
    "sub not hexadecimal": lambda c: signed(c | {"sub": "z" * 24}),
    "sub of 25 characters": lambda c: signed(c | {"sub": c["sub"] + "0"}),
    "sub an operator": lambda c: signed(c | {"sub": {"$ne": None}}),
    "sid of 31 characters": lambda c: signed(c | {"sid": c["sid"][1:]}),
    "sid of 33 characters": lambda c: signed(c | {"sid": c["sid"] + "0"}),
    "sid an operator": lambda c: signed(c | {"sid": {"$ne": None}}),
    "sid a lone surrogate": lambda c: signed(c | {"sid": "\ud800"}),
    "generation a string": lambda c: signed(c | {"generation": "0"}),
    "generation true": lambda c: signed(c | {"generation": True}),
    "generation negative": lambda c: signed(c | {"generation": -1}),
    "generation 2**31": lambda c: signed(c | {"generation": 2**31}),
    "generation 2**63": lambda c: signed(c | {"generation": 2**63}),
}
for name in ("type", "sub", "sid", "generation", "exp"):
    FORGERIES[f"{name} missing"] = lambda c, name=name: signed(without(c, name))


@pytest.mark.parametrize("header", [HS256, {"alg": "HS256", "typ": "JWT"}])
def test_a_token_with_the_same_claims_and_key_is_valid(client, tokens, header):
    assert me(client, signed(claims_of(tokens["access_token"]), header)).status_code == 200
    assert refresh(client, signed(claims_of(tokens["refresh_token"]), header)).status_code == 200


@pytest.mark.parametrize("generation", [1, 2**31 - 1])
def test_an_access_token_is_valid_in_any_generation(client, other_user, generation):
    claims = claims_of(other_user["access_token"]) | {"generation": generation}
    assert me(client, signed(claims)).status_code == 200


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forged_access_token_is_invalid(client, other_user, forge):
    forged = forge(claims_of(other_user["access_token"]))
    assert len(forged) <= auth.MAX_TOKEN_LENGTH
    header = {"Authorization": b"Bearer " + forged.encode("latin-1")}
    assert is_invalid_token(client.get("/auth/me", headers=header))


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forged_refresh_token_is_invalid(client, other_user, forge):
    forged = forge(claims_of(other_user["refresh_token"]))
    assert len(forged) <= auth.MAX_TOKEN_LENGTH
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


# The limit on the length


def test_the_longest_token_that_the_service_can_issue_is_accepted(monkeypatch):
    monkeypatch.setattr(auth, "ACCESS_TOKEN_LIFETIME", timedelta(minutes=999999))
    monkeypatch.setattr(auth, "REFRESH_TOKEN_LIFETIME", timedelta(days=999999))
    session = auth.create_session() | {"generation": 2**31 - 1}
    tokens = auth.create_tokens("0" * 24, session)
    assert auth.read_token(tokens.access_token, "access").generation == 2**31 - 1
    assert auth.read_token(tokens.refresh_token, "refresh").generation == 2**31 - 1


@pytest.mark.parametrize(("length", "calls"), [(auth.MAX_TOKEN_LENGTH, 3), (301, 0), (7000, 0)])
def test_a_token_over_300_characters_is_rejected_before_it_is_parsed(
    client, monkeypatch, length, calls
):
    parsed = []

    def decode(token, *args, **options):
        parsed.append(token)
        raise jwt.InvalidTokenError

    monkeypatch.setattr(jwt, "decode", decode)
    token = "x" * length
    for response in (me(client, token), refresh(client, token), logout(client, token)):
        assert is_invalid_token(response)
    assert parsed == [token] * calls


# 128 KiB is the size of a thread's stack in musl, the smallest one on common systems. The main
# thread has more.
SEND_WITH_SMALL_STACKS = """
import sys, threading
from fastapi.testclient import TestClient
from test_app import app, logout, me, refresh

with TestClient(app.app) as client:
    threading.stack_size(128 * 1024)
    print(*[send(client, sys.argv[1]).status_code for send in (me, refresh, logout)])
"""


# The deepest header that is parsed, and the deepest one in a body of 8 KiB.
@pytest.mark.parametrize("depth", [200, 5500])
def test_a_nested_header_does_not_overflow_the_stack_of_a_thread(depth):
    header = encoded(b'{"alg":' + b"[" * depth)
    process = subprocess.run(
        [sys.executable, "-c", SEND_WITH_SMALL_STACKS, f"{header}.e30.x"],
        cwd=ROOT,
        env=os.environ | {"TEST_MONGO_URI": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (process.returncode, process.stdout) == (0, "401 401 401\n"), process.stderr
