"""Tests of clients that are generated from the service's OpenAPI document, and of diagrams.

The npm packages come from the lock file in client/, Node from PyPI.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PASSWORD, ROOT, new_email

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def npm_folder(tmp_path_factory):
    """A copy of client/ with its packages."""
    folder = shutil.copytree(ROOT / ".ci/client", tmp_path_factory.mktemp("npm") / "client")
    npm = [
        BIN / "npm",
        "ci",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
        "--loglevel=error",
        "--prefer-offline",
    ]
    subprocess.run(npm, cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def python_client(memory_service, tmp_path_factory):
    """The name of an importable package that openapi-python-client has generated."""
    folder = tmp_path_factory.mktemp("python")
    package = folder / "generated_client"
    command = [BIN / "openapi-python-client", "generate", "--meta", "none"]
    command += ["--url", f"{memory_service}/openapi.json", "--output-path", package]
    # It formats the code with ruff.
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    output = subprocess.check_output(
        command, cwd=folder, env=environment, stderr=subprocess.STDOUT, text=True
    )
    assert "WARNING" not in output
    sys.path.insert(0, str(folder))
    yield package.name
    sys.path.remove(str(folder))


def test_a_typescript_client_compiles_and_uses_each_route(memory_service, npm_folder):
    def run_node(*command):
        subprocess.run([BIN / "node", *command], cwd=npm_folder, check=True, timeout=300)

    generator = "node_modules/openapi-typescript/bin/cli.js"
    run_node(generator, f"{memory_service}/openapi.json", "-o", "schema.d.ts")
    run_node("node_modules/typescript/bin/tsc", "--strict", "-p", ".")
    run_node("client.js", memory_service)


def test_a_python_client_has_a_module_for_each_route_and_parses_errors(
    memory_service, python_client
):
    package, models, api = (
        importlib.import_module(python_client + name) for name in ("", ".models", ".api.auth")
    )
    names = {path.stem for path in Path(api.__file__).parent.glob("[a-z]*.py")}
    assert names == {"register", "login", "me", "refresh", "logout"}
    register, login, me, refresh, logout = (
        importlib.import_module(f"{api.__name__}.{name}")
        for name in ("register", "login", "me", "refresh", "logout")
    )
    client = package.Client(base_url=memory_service)
    email, password = new_email(), PASSWORD

    credentials = models.NewCredentials(email, password)
    assert isinstance(register.sync(client=client, body=credentials), models.Tokens)
    conflict = register.sync(client=client, body=credentials)
    assert conflict == models.Error("This email is already registered")
    invalid = register.sync(client=client, body=models.NewCredentials(email, "short"))
    assert isinstance(invalid, models.HTTPValidationError)
    assert invalid.detail[0].loc == ["body", "password"]
    wrong = login.sync(client=client, body=models.Credentials(email, "wrong"))
    assert wrong == models.Error("Wrong email or password")

    tokens = login.sync(client=client, body=models.Credentials(email, password))
    authenticated = package.AuthenticatedClient(base_url=memory_service, token=tokens.access_token)
    user = me.sync(client=authenticated)
    assert (user.id, user.email) == (tokens.user_id, email)
    tokens = refresh.sync(client=client, body=models.RefreshToken(tokens.refresh_token))
    body = models.RefreshToken(tokens.refresh_token)
    assert logout.sync_detailed(client=client, body=body).status_code == 204
    ended = refresh.sync(client=client, body=body)
    assert ended == me.sync(client=authenticated)
    assert isinstance(ended.detail, str)


def test_the_diagrams_in_the_documents_are_valid_mermaid(npm_folder):
    readme, how_it_works = (
        re.findall(r"^```mermaid\n(.*?)^```", (ROOT / path).read_text(), re.DOTALL | re.MULTILINE)
        for path in ("README.md", ".github/docs/how-it-works.md")
    )
    assert readme
    for diagram in (*readme, *how_it_works):
        command = [BIN / "node", "diagram.js"]
        subprocess.run(command, cwd=npm_folder, input=diagram, text=True, check=True, timeout=60)
