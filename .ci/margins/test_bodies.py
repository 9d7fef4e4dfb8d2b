"""Tests of request bodies, emails and passwords at their margins."""

import json
import unicodedata
import uuid

import pytest

import app
from test_app import PASSWORD, is_invalid_token, login, refresh, register

AS_JSON = {"Content-Type": "application/json"}
all_routes = pytest.mark.parametrize("route", ["register", "login", "refresh", "logout"])
routes_with_password = pytest.mark.parametrize("route", ["register", "login"])
SECRET = "hunter2-hunter2"


def invalid_fields(response):
    """Return the names of the fields that a 422 reports."""
    assert response.status_code == 422
    return [error["loc"][1] for error in response.json()["detail"]]


# JSON

UNUSUAL_VALUES = {
    "numbers": '{"email": 1, "password": 2, "refresh_token": 3}',
    "null": '{"email": null, "password": null, "refresh_token": null}',
    "NaN and Infinity": '{"email": NaN, "password": Infinity, "refresh_token": -Infinity}',
    "lone surrogates": r'{"email": "\ud800@b.com", "password": "\udfffhunter2-hunter2"}',
}


@pytest.mark.parametrize("body", UNUSUAL_VALUES.values(), ids=UNUSUAL_VALUES.keys())
@all_routes
def test_an_unusual_json_value_is_rejected_and_not_quoted(client, route, body):
    response = client.post(f"/auth/{route}", content=body, headers=AS_JSON)
    fields = ["email", "password"] if route in ("register", "login") else ["refresh_token"]
    assert invalid_fields(response) == fields
    assert "hunter2" not in response.text
    for error in response.json()["detail"]:
        assert error.keys() == {"loc", "msg", "type"}


@all_routes
def test_a_body_in_another_encoding_than_utf_8_is_400(client, route):
    body = f'{{"email": "{SECRET}ü"}}'.encode("latin-1")
    response = client.post(f"/auth/{route}", content=body, headers=AS_JSON)
    assert response.status_code == 400
    assert response.json() == {"detail": "There was an error parsing the body"}


@all_routes
def test_a_deeply_nested_body_is_rejected_and_not_quoted(client, route):
    body = f'{{"password": "{SECRET}", "email": {"[" * 2000}{"]" * 2000}}}'
    response = client.post(f"/auth/{route}", content=body, headers=AS_JSON)
    # The parser of some Python versions accepts fewer levels.
    assert response.status_code in (400, 422)
    assert SECRET not in response.text
    assert "[[" not in response.text


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain"])
@all_routes
def test_a_body_of_another_content_type_is_rejected_and_not_quoted(client, route, content_type):
    body = json.dumps({"email": "a@example.com", "password": SECRET, "refresh_token": SECRET})
    response = client.post(f"/auth/{route}", content=body, headers={"Content-Type": content_type})
    assert response.status_code == 422
    assert SECRET not in response.text


# Size


@pytest.mark.parametrize("is_chunked", [False, True])
@all_routes
def test_a_body_may_have_4_kib(client, route, is_chunked):
    for size, status in ((4 * 1024, 422), (4 * 1024 + 1, 413)):
        body = b" " * size
        # A body in chunks has no Content-Length.
        content = iter([body]) if is_chunked else body
        response = client.post(f"/auth/{route}", content=content, headers=AS_JSON)
        assert response.status_code == status


def test_an_endless_body_is_not_read_to_its_end(client):
    chunks_read, sent = [], []

    async def receive():
        chunks_read.append(1)
        # An end, so that the test fails instead of running forever.
        more_body = len(chunks_read) < 1000
        return {"type": "http.request", "body": b" " * 1024, "more_body": more_body}

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/auth/login", "query_string": b""}
    client.portal.call(app.app, scope | {"headers": headers}, receive, send)
    assert (sent[0]["status"], len(chunks_read)) == (413, 5)


def escape(text):
    """Return the text as JSON in which each character is escaped, if necessary as two."""
    units = text.encode("utf-16-be").hex()
    return "".join(rf"\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def test_the_longest_email_and_password_fit_if_all_characters_are_escaped(client):
    domain = f"{uuid.uuid4().hex}.{'b' * 63}.{'c' * 63}.{'d' * 24}.com"
    email = f"{'a' * 64}@{domain}"
    # An upper-case letter, a lower-case letter, a digit and a symbol, each outside the BMP.
    password = "\U0001d400\U0001d41a\U0001d7ce\U0001f600" * 32
    assert (len(email), len(password)) == (254, 128)
    body = f'{{"email": "{escape(email)}", "password": "{escape(password)}"}}'
    response = client.post("/auth/register", content=body, headers=AS_JSON)
    assert response.status_code == 201
    assert login(client, email, password).status_code == 200


# The cost of Unicode normalization and of the validation of an email can grow with the square of
# the length.


@pytest.fixture
def normalized(monkeypatch):
    """The lengths of the texts that were normalized or validated as an email."""
    lengths = []

    def record(function):
        def call(*args):
            lengths.append(len(args[-1]))
            return function(*args)

        return call

    monkeypatch.setattr(unicodedata, "normalize", record(unicodedata.normalize))
    monkeypatch.setattr(app, "validate_email", record(app.validate_email))
    return lengths


@routes_with_password
def test_a_password_above_128_characters_is_not_normalized(client, email, normalized, route):
    for length in (128, 129, 500):
        password = PASSWORD.ljust(length, "\u0315")
        client.post(f"/auth/{route}", json={"email": email, "password": password})
    assert max(normalized) == 128


@routes_with_password
def test_an_email_above_254_characters_is_not_validated(client, email, normalized, route):
    for length in (254, 255, 500):
        address = email.rjust(length, "a")
        response = client.post(f"/auth/{route}", json={"email": address, "password": PASSWORD})
    assert max(normalized) == 254
    messages = [error["msg"] for error in response.json()["detail"]]
    assert messages == ["String should have at most 254 characters"]


# Characters


@pytest.mark.parametrize("taken", ["H\u0331x", "h\u0331x", "\u1e96x"])
def test_register_rejects_a_taken_email_in_any_unicode_form(client, taken):
    domain = f"@{uuid.uuid4().hex}.example.com"
    assert register(client, "H\u0331x" + domain).status_code == 201
    assert register(client, taken + domain).status_code == 409
    assert login(client, taken + domain).status_code == 200


def test_a_password_can_contain_a_nul_character(client, email):
    password = f"{PASSWORD}\0\0"
    assert register(client, email, password).status_code == 201
    assert login(client, email, password).status_code == 200
    assert login(client, email, PASSWORD).status_code == 401


def test_an_email_or_token_with_a_nul_character_is_invalid(client, email):
    assert invalid_fields(register(client, f"\0{email}")) == ["email"]
    assert is_invalid_token(refresh(client, "\0"))


def test_a_token_with_a_lone_surrogate_is_invalid(client):
    body = rb'{"refresh_token": "\ud800"}'
    assert is_invalid_token(client.post("/auth/refresh", content=body, headers=AS_JSON))


def test_the_repr_of_a_body_contains_no_secret():
    for body in (
        app.Credentials(email="a@example.com", password=PASSWORD),
        app.NewCredentials(email="a@example.com", password=PASSWORD),
        app.RefreshToken(refresh_token=PASSWORD),
    ):
        assert PASSWORD not in repr(body) + str(body)
