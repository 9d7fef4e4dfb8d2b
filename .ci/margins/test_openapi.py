"""Tests of the OpenAPI document, also in another application."""

import pytest
from fastapi import Depends
from fastapi.security import HTTPBearer


@pytest.fixture
def document(client):
    return client.get("/openapi.json").json()


def operations_of(document):
    """Return the operations by their ids."""
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    return {operation["operationId"]: operation for operation in operations}


def test_the_document_lists_all_responses(document):
    operations = operations_of(document)
    responses = {name: set(operation["responses"]) for name, operation in operations.items()}
    assert responses == {
        "register": {"201", "400", "409", "413", "422", "503"},
        "login": {"200", "400", "401", "413", "422", "429", "503"},
        "me": {"200", "401", "413", "503"},
        "refresh": {"200", "400", "401", "413", "422", "503"},
        "logout": {"204", "400", "401", "413", "422", "503"},
    }


@pytest.mark.parametrize("status", ["400", "401", "409", "429", "503"])
def test_each_error_response_has_a_schema(document, status):
    responses = [operation["responses"] for operation in operations_of(document).values()]
    contents = [response[status]["content"] for response in responses if status in response]
    assert contents
    for content in contents:
        assert content == {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    error = document["components"]["schemas"]["Error"]
    assert (error["properties"]["detail"]["type"], error["required"]) == ("string", ["detail"])


def test_the_schema_of_credentials_states_the_longest_email_and_password(document):
    for name in ("Credentials", "NewCredentials"):
        fields = document["components"]["schemas"][name]["properties"]
        assert (fields["email"]["format"], fields["email"]["maxLength"]) == ("email", 254)
        assert fields["password"]["maxLength"] == 128


def test_the_http_bearer_scheme_of_another_app_keeps_its_description(host):
    own_scheme = HTTPBearer(description="The token of a machine.")
    host.get("/machines", dependencies=[Depends(own_scheme)])(lambda: None)
    schemes = host.openapi()["components"]["securitySchemes"]
    assert schemes["HTTPBearer"]["description"] == "The token of a machine."
    assert "access_token" in schemes["AccessToken"]["description"]
