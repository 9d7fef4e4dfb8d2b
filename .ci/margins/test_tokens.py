"""Tests of the contents and the length of tokens."""

import base64
import json
import os
import subprocess
import sys
from datetime import timedelta

import jwt
import pytest
from helpers import ROOT

import auth
from test_app import claims_of, is_invalid_token, logout, me, refresh, sign

HS256 = {"alg": "HS256"}


def encode(part):
    part = part if isinstance(part, bytes) else json.dumps(part, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def forge(claims, header=HS256, key=auth.SECRET_KEY, algorithm="HS256"):
    """Return a token with any header and claims, which PyJWT would partly refuse to encode."""
    signing_input = f"{encode(header)}.{encode(claims)}"
    signature = jwt.get_algorithm_by_name(algorithm).sign(signing_input.encode(), key)
    return f"{signing_input}.{encode(signature)}"


def assert_is_invalid(client, tokens, forge_from):
    """Send a forged access token and a forged refresh token. The session must not end."""
    access_token, refresh_token = tokens["access_token"], tokens["refresh_token"]
    forged = forge_from(claims_of(access_token))
    assert len(forged) <= auth.MAX_TOKEN_LENGTH
    header = {"Authorization": b"Bearer " + forged.encode("latin-1")}
    assert is_invalid_token(client.get("/auth/me", headers=header))
    forged = forge_from(claims_of(refresh_token))
    assert is_invalid_token(refresh(client, forged))
    assert is_invalid_token(logout(client, forged))
    assert me(client, access_token).status_code == 200


# The signature

# PyJWT refuses these as long as it gets the algorithm and the key from the service.
CHOSEN_BY_THE_HEADER = {
    "no algorithm": lambda claims: forge(claims, {"alg": "nOnE"}),
    "HS384": lambda claims: forge(claims, {"alg": "HS384"}, algorithm="HS384"),
    "an embedded key": lambda claims: forge(
        claims, HS256 | {"jwk": {"kty": "oct", "k": encode(b"known")}}, key=b"known"
    ),
}


@pytest.mark.parametrize(
    "forge_from", CHOSEN_BY_THE_HEADER.values(), ids=CHOSEN_BY_THE_HEADER.keys()
)
def test_the_header_of_a_token_selects_neither_algorithm_nor_key(client, other_user, forge_from):
    assert_is_invalid(client, other_user, forge_from)


# A regression table: errors of three kinds in PyJWT's parser.
MALFORMED = {
    "not ASCII": lambda claims: "ÿþ",
    "four parts": lambda claims: forge(claims) + ".x",
    "claims not UTF-8": lambda claims: forge(b'{"sub": "\xff"}'),
}


@pytest.mark.parametrize("forge_from", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_token_is_invalid(client, other_user, forge_from):
    assert_is_invalid(client, other_user, forge_from)


# The claims


@pytest.mark.parametrize("header", [HS256, HS256 | {"typ": "JWT"}])
def test_a_token_with_the_same_claims_and_key_is_valid(client, tokens, header):
    assert me(client, forge(claims_of(tokens["access_token"]), header)).status_code == 200
    assert refresh(client, forge(claims_of(tokens["refresh_token"]), header)).status_code == 200


@pytest.mark.parametrize("name", auth.Claims.model_fields)
def test_a_token_without_one_of_the_claims_is_invalid(client, other_user, name):
    assert_is_invalid(
        client, other_user, lambda claims: sign({key: claims[key] for key in claims if key != name})
    )


IN_2100 = 4102444800


@pytest.mark.parametrize(
    "changed",
    [
        {"type": "id"},
        {"type": ["access", "refresh"]},
        {"sub": 1},
        {"sub": "z" * 24},
        {"sub": "0" * 25},
        {"sub": {"$ne": None}},
        {"sid": "z" * 32},
        {"sid": "0" * 31},
        {"sid": "0" * 33},
        {"sid": "\ud800"},
        {"sid": {"$ne": None}},
        {"generation": "0"},
        {"generation": True},
        {"generation": -1},
        {"generation": 2**31},
        {"exp": str(IN_2100)},
        {"exp": IN_2100 + 0.5},
        {"exp": float("inf")},
        {"exp": True},
    ],
    ids=repr,
)
def test_a_token_with_a_claim_of_another_type_or_form_is_invalid(client, other_user, changed):
    assert_is_invalid(client, other_user, lambda claims: forge(claims | changed))


@pytest.mark.parametrize("generation", [1, 2**31 - 1])
def test_an_access_token_is_valid_in_any_generation(client, other_user, generation):
    claims = claims_of(other_user["access_token"]) | {"generation": generation}
    assert me(client, sign(claims)).status_code == 200


def test_a_token_of_an_unknown_user_is_invalid(client, other_user):
    unknown = {"sub": "0" * 24}
    assert is_invalid_token(me(client, sign(claims_of(other_user["access_token"]) | unknown)))
    refresh_token = sign(claims_of(other_user["refresh_token"]) | unknown)
    assert is_invalid_token(refresh(client, refresh_token))
    assert logout(client, refresh_token).status_code == 204


def test_a_token_in_the_query_string_is_ignored(client, other_user):
    response = client.get("/auth/me", params={"access_token": other_user["access_token"]})
    assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")


# The length


def test_the_longest_token_that_the_service_can_issue_is_accepted(monkeypatch):
    monkeypatch.setattr(auth, "ACCESS_TOKEN_LIFETIME", timedelta(minutes=99_999))
    monkeypatch.setattr(auth, "REFRESH_TOKEN_LIFETIME", timedelta(days=99_999))
    session = auth.new_session() | {"generation": 2**31 - 1}
    tokens = auth.create_tokens("0" * 24, session)
    assert auth.read_token(tokens.access_token, "access").generation == 2**31 - 1
    assert auth.read_token(tokens.refresh_token, "refresh").generation == 2**31 - 1


@pytest.mark.parametrize(("length", "times"), [(300, 3), (301, 0)])
def test_a_token_over_300_characters_is_rejected_before_it_is_parsed(
    client, monkeypatch, length, times
):
    parsed = []

    def decode(token, *args, **options):
        parsed.append(token)
        raise jwt.InvalidTokenError

    monkeypatch.setattr(jwt, "decode", decode)
    token = "x" * length
    for response in (me(client, token), refresh(client, token), logout(client, token)):
        assert is_invalid_token(response)
    assert parsed == [token] * times


# 128 KiB is the size of a thread's stack in musl, the smallest one on common systems. The main
# thread has more.
SEND_WITH_SMALL_STACKS = """
import sys, threading
from fastapi.testclient import TestClient
from test_app import app, me, refresh

with TestClient(app.app) as client:
    threading.stack_size(128 * 1024)
    for token in sys.argv[1:]:
        print(me(client, token).status_code, refresh(client, token).status_code)
"""


def test_a_nested_header_does_not_overflow_the_stack_of_a_thread():
    # The deepest header that is parsed, and the deepest one in a body of 4 KiB.
    tokens = [encode(b'{"alg":' + b"[" * depth) + ".e30.x" for depth in (200, 3000)]
    process = subprocess.run(
        [sys.executable, "-c", SEND_WITH_SMALL_STACKS, *tokens],
        cwd=ROOT,
        env=os.environ | {"TEST_MONGO_URI": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (process.returncode, process.stdout) == (0, "401 401\n" * 2), process.stderr
