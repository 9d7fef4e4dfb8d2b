"""Tests of request bodies, emails and passwords at their margins, and of the OpenAPI document."""

import json
import uuid

import pytest
from fastapi import Depends, FastAPI, HTTPException
from fastapi.testclient import TestClient

import app
from test_app import PASSWORD, is_invalid_token, login, refresh, register

AS_JSON = {"Content-Type": "application/json"}
ALL_ROUTES = pytest.mark.parametrize("route", ["register", "login", "refresh", "logout"])
SECRET = "hunter2-hunter2"

# The body, and the possible status codes of the response.
BAD_BODIES = {
    "empty": (b"", [422]),
    "not JSON": (b'{"email": "' + SECRET.encode(), [422]),
    "another encoding": (f'{{"email": "{SECRET}ü"}}'.encode("latin-1"), [400]),
    "a list": (json.dumps([SECRET]).encode(), [422]),
    "a string": (json.dumps(SECRET).encode(), [422]),
    "null": (b"null", [422]),
    "no fields": (b"{}", [422]),
    "numbers": (b'{"email": 1, "password": 2, "refresh_token": 3}', [422]),
    "null fields": (b'{"email": null, "password": null, "refresh_token": null}', [422]),
    "NaN": (b'{"email": NaN, "password": NaN, "refresh_token": NaN}', [422]),
    "Infinity": (b'{"email": Infinity, "password": Infinity, "refresh_token": -Infinity}', [422]),
    "operators": (
        b'{"email": {"$ne": ""}, "password": {"$ne": ""}, "refresh_token": {"$ne": ""}}',
        [422],
    ),
    "lone surrogates": (
        rb'{"email": "\ud800@b.com", "password": "\ud800hunter2-Hunter2"}',
        [422],
    ),
    # The parser of Python 3.13 or newer accepts more levels.
    "deeply nested": (
        b'{"password": "hunter2", "email": ' + b"[" * 4000 + b"]" * 4000 + b"}",
        [400, 422],
    ),
    "a number of 5000 digits": (b'{"email": ' + b"9" * 5000 + b"}", [400]),
}


@pytest.mark.parametrize(("body", "statuses"), BAD_BODIES.values(), ids=BAD_BODIES.keys())
@ALL_ROUTES
def test_the_response_to_a_malformed_body_does_not_quote_it(client, route, body, statuses):
    response = client.post(f"/auth/{route}", content=body, headers=AS_JSON)
    assert response.status_code in statuses
    assert "unter2" not in response.text
    assert "[[[" not in response.text
    if response.status_code == 400:
        assert response.json() == {"detail": "There was an error parsing the body"}
    else:
        for error in response.json()["detail"]:
            assert error.keys() == {"loc", "msg", "type"}


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain"])
@ALL_ROUTES
def test_a_body_of_another_content_type_is_rejected_and_not_quoted(client, route, content_type):
    body = json.dumps({"email": "a@example.com", "password": SECRET, "refresh_token": SECRET})
    response = client.post(f"/auth/{route}", content=body, headers={"Content-Type": content_type})
    assert response.status_code == 422
    assert SECRET not in response.text


@pytest.mark.parametrize("route", ["register", "login"])
@pytest.mark.parametrize("field", ["email", "password"])
@pytest.mark.parametrize("surrogate", ["\ud800", "\udfff"])
def test_a_field_with_a_lone_surrogate_is_rejected(client, email, route, field, surrogate):
    body = json.dumps({"email": email, "password": PASSWORD} | {field: surrogate + PASSWORD})
    response = client.post(f"/auth/{route}", content=body, headers=AS_JSON)
    assert response.status_code == 422
    assert [error["loc"] for error in response.json()["detail"]] == [["body", field]]


def test_a_nul_character_is_allowed_in_a_password_only(client, email):
    password = f"{PASSWORD}\0\0"
    assert register(client, email, password).status_code == 201
    assert login(client, email, password).status_code == 200
    assert login(client, email, PASSWORD).status_code == 401
    assert register(client, f"\0{email}").status_code == 422
    assert is_invalid_token(refresh(client, "\0"))


def test_a_lone_surrogate_is_an_invalid_token(client):
    body = rb'{"refresh_token": "\ud800"}'
    assert is_invalid_token(client.post("/auth/refresh", content=body, headers=AS_JSON))


@ALL_ROUTES
def test_a_body_over_8_kib_is_rejected_with_and_without_a_content_length(client, route):
    for size, expected in ((8 * 1024, 422), (8 * 1024 + 1, 413)):
        for content in (b" " * size, iter([b" " * size])):
            response = client.post(f"/auth/{route}", content=content, headers=AS_JSON)
            assert response.status_code == expected


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
    assert (sent[0]["status"], len(chunks_read)) == (413, 9)


@pytest.mark.parametrize("taken", ["H\u0331x", "h\u0331x", "\u1e96x"])
def test_register_rejects_a_taken_email_in_any_unicode_form(client, taken):
    domain = f"@{uuid.uuid4().hex}.example.com"
    assert register(client, "H\u0331x" + domain).status_code == 201
    assert register(client, taken + domain).status_code == 409
    assert login(client, taken + domain).status_code == 200


@pytest.mark.parametrize("address", ["", "@example.com", "a b@example.com", "a" * 255 + "@b.com"])
@pytest.mark.parametrize("route", ["register", "login"])
def test_an_invalid_email_is_rejected(client, route, address):
    response = client.post(f"/auth/{route}", json={"email": address, "password": PASSWORD})
    assert response.status_code == 422
    assert [error["loc"] for error in response.json()["detail"]] == [["body", "email"]]
    assert PASSWORD not in response.text


def test_the_repr_of_a_request_contains_no_secret():
    for body in (
        app.Credentials(email="a@example.com", password=PASSWORD),
        app.NewCredentials(email="a@example.com", password=PASSWORD),
        app.RefreshToken(refresh_token=PASSWORD),
    ):
        assert PASSWORD not in repr(body) + str(body)


def test_the_openapi_document_lists_all_responses(client):
    paths = client.get("/openapi.json").json()["paths"]
    responses = {
        operation["operationId"]: set(operation["responses"])
        for path in paths.values()
        for operation in path.values()
    }
    assert responses == {
        "register": {"201", "400", "409", "413", "422", "503"},
        "login": {"200", "400", "401", "413", "422", "429", "503"},
        "me": {"200", "401", "413", "503"},
        "refresh": {"200", "400", "401", "413", "422", "503"},
        "logout": {"204", "400", "401", "413", "422", "503"},
    }


def test_the_openapi_document_has_a_schema_for_each_error(client):
    document = client.get("/openapi.json").json()
    for path in document["paths"].values():
        for operation in path.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400 and status not in ("413", "422"):
                    (content,) = response["content"].values()
                    assert content["schema"] == {"$ref": "#/components/schemas/Error"}
    assert document["components"]["schemas"]["Error"]["properties"]["detail"]["type"] == "string"


def test_a_400_of_a_dependency_of_another_app_stays_a_400(cheap_hasher):
    def reject():
        raise HTTPException(400, "Not today")

    outer = FastAPI()
    outer.include_router(app.router, dependencies=[Depends(reject)])
    response = TestClient(outer).post("/auth/login", json={})
    assert (response.status_code, response.json()) == (400, {"detail": "Not today"})
