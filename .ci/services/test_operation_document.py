"""Tests that execute the blocks of operation.md and the unit for systemd, and check its facts."""

import ast
import configparser
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import pymongo
import pymongo.common
import pytest
from helpers import (
    PASSWORD,
    ROOT,
    SETTINGS,
    Service,
    new_email,
    wait_until,
)

DOCS = ROOT / ".github/docs"
TEXT = (DOCS / "operation.md").read_text()
MODULES = ("app.py", "auth.py", "db.py")
ALICE = "alice@example.com"


def find_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


# A block that is added to the document has to be executed here, too. INSTALL, CERTIFICATE and LOG
# need systemd, root or a public name, and are only parsed.
BASH_BLOCKS = find_blocks("bash")
CONVERT, INSTALL, CHECK, CERTIFICATE, TASKS, PACKAGE, PROBE, LOG, DUMP, RESTORE, FLOOD = BASH_BLOCKS
[PROXIED] = find_blocks("python")


@pytest.fixture
def folder(tmp_path, mongod):
    """A clone of the service with a virtual environment and .env."""
    folder = tmp_path / "auth-jwt"
    shutil.copytree(DOCS, folder / ".github/docs")
    for name in MODULES:
        shutil.copy(ROOT / name, folder)
    (folder / ".venv").symlink_to(Path(sys.executable).parents[1])
    key = "a key for the tests, longer than 32 bytes"
    settings = f"MONGO_URI={mongod.uri}\nMONGO_DB_NAME=faults\nJWT_SECRET_KEY={key}\n"
    (folder / ".env").write_text(settings)
    return folder


def run_block(block, folder, status=0):
    """Run the block with bash, and return what it prints."""
    environment = {name: os.environ[name] for name in os.environ if name not in SETTINGS}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    process = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert process.returncode == status
    return process.stdout


@pytest.mark.parametrize("block", BASH_BLOCKS)
def test_bash_can_parse_each_block(block):
    subprocess.run(["bash", "-n", "-c", block], check=True)


# Deployment


def test_the_document_names_the_oldest_mongodb_that_pymongo_supports():
    version = pymongo.common.MIN_SUPPORTED_SERVER_VERSION
    pymongo_version = ".".join(pymongo.version.split(".")[:2])
    assert f"MongoDB {version} or newer" in TEXT
    assert f"PyMongo {pymongo_version} supports" in TEXT
    assert f"MongoDB is older than {version}" in TEXT


def test_read_write_is_a_sufficient_role(restricted_mongod, folder):
    server, admin = restricted_mongod
    admin.faults.command("createUser", "service", pwd="s3cret", roles=["readWrite"])
    uri = f"mongodb://service:s3cret@127.0.0.1:{server.port}/faults"
    service = Service(uri)
    tokens = service.register(ALICE).body
    assert service.login(ALICE).status == 200
    assert service.logout(tokens["refresh_token"]).status == 204
    env_file = folder / ".env"
    env_file.write_text(re.sub("MONGO_URI=.*", f"MONGO_URI={uri}", env_file.read_text()))
    run_block(CONVERT + TASKS.replace("list-logged-in", f"disable {ALICE}"), folder)
    run_block(DUMP, folder)
    run_block(RESTORE, folder)
    service.stop()


def test_the_command_converts_emails(folder, users):
    users.insert_one({"_id": 1, "email": "Alice@example.com"})
    run_block(CONVERT, folder)
    assert users.find_one() == {"_id": 1, "email": ALICE}


def test_the_check_of_the_settings_needs_no_mongodb(folder, mongod):
    mongod.kill()
    run_block(CHECK, folder)


def test_the_check_finds_an_invalid_setting(folder):
    with (folder / ".env").open("a") as file:
        file.write("ACCESS_TOKEN_EXPIRE_MINUTES=never\n")
    run_block(CHECK, folder, status=3)


# Forwarded addresses


def register_with_forwarded_addresses(service, addresses):
    body = f'{{"email": "{new_email()}", "password": "{PASSWORD}"}}'.encode()
    headers = {"Content-Type": "application/json", "X-Forwarded-For": addresses}
    url = f"http://127.0.0.1:{service.port}/auth/register"
    urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30).close()
    wait_until(lambda: "user_created" in service.log, 10)
    return re.search(r"network=(\S+)", service.log)[1]


@pytest.mark.parametrize(
    ("options", "network"),
    [
        ([], "10.0.0.5"),
        (["--forwarded-allow-ips", "127.0.0.1,10.0.0.0/8"], "198.51.100.9"),
        (["--forwarded-allow-ips", "10.0.0.0/8"], "127.0.0.1"),
        (["--forwarded-allow-ips", "*"], "203.0.113.66"),
    ],
)
def test_the_network_is_the_last_forwarded_address_that_is_no_trusted_proxy(options, network):
    service = Service("", *options)
    forwarded = "203.0.113.66, 198.51.100.9, 10.0.0.5"
    assert register_with_forwarded_addresses(service, forwarded) == network
    service.stop()


@pytest.mark.parametrize(("app", "network"), [("app", "127.0.0.1"), ("proxied", "198.51.100.9")])
def test_the_middleware_uses_the_forwarded_address_with_another_server(folder, app, network):
    (folder / "proxied.py").write_text(PROXIED)
    # Other servers ignore the header, as uvicorn does with this option.
    service = Service("", "--no-proxy-headers", app=f"{app}:app", folder=folder)
    assert register_with_forwarded_addresses(service, "198.51.100.9") == network
    service.stop()


# Operation


def test_the_tasks_run_with_the_settings_of_the_service(folder, service):
    tokens = service.register(ALICE).body
    printed = run_block(TASKS, folder)
    assert printed.endswith(f"\n{ALICE}\n1 users in faults.users\n1 users in faults.users\n")
    assert service.me(tokens["access_token"]).status == 401


def test_the_tasks_run_in_a_package(folder, service):
    service.register(ALICE)
    package = folder.parent / "host/accounts"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in (*MODULES, ".env"):
        shutil.copy(folder / name, package)
    printed = run_block(PACKAGE + "python -m accounts.tasks list-logged-in", package.parent)
    assert printed == f"{ALICE}\n1 users in faults.users\n"


def test_the_probe_distinguishes_an_outage(mongod, service):
    probe = PROBE.replace("127.0.0.1:5000", f"127.0.0.1:{service.port}")
    assert run_block(probe, ROOT) == "401\n"
    mongod.kill()
    assert run_block(probe, ROOT) == "503\n"


def test_a_dump_can_be_restored(folder, service, users):
    tokens = service.register(ALICE).body
    service.login(ALICE, "wrong")
    before = list(users.find())
    run_block(DUMP, folder)
    assert (folder / "users.bson").stat().st_mode & 0o777 == 0o600
    users.update_one({}, {"$set": {"email": "changed@example.com"}})
    run_block(RESTORE, folder)
    # The sessions of the dump are ended.
    assert list(users.find()) == [before[0] | {"refresh_tokens": []}]
    assert service.me(tokens["access_token"]).status == 401
    assert users.database.users_before.find_one()["email"] == "changed@example.com"
    users.drop()
    run_block(RESTORE.replace("users_before", "users_again"), folder)
    assert service.login(ALICE).status == 200


def test_the_registrations_of_a_flood_can_be_deleted(folder, service, users):
    for email in (ALICE, new_email(), new_email()):
        service.register(email)
    flood = {"created_at": datetime(2026, 11, 26, 10, 30, tzinfo=UTC)}
    users.update_many({"email": {"$ne": ALICE}}, {"$set": flood})
    users.update_one(flood, {"$set": {"refresh_tokens.0.network": "192.0.2.1"}})
    assert run_block(FLOOD, folder) == "1\n"
    assert run_block(FLOOD.replace("# print", "print"), folder) == "1\n1\n"
    assert users.count_documents({}) == 2


# The log


def find_messages(module):
    """Return the texts that the module logs, with their levels, and why a start fails."""
    messages, reasons = [], []
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        match node:
            case ast.Call(ast.Attribute(ast.Name("logger"), level), [ast.Constant(text), *_]):
                messages.append((text, level.upper()))
            case ast.Tuple([ast.Attribute(ast.Name("logging"), level), ast.Constant(text)]):
                messages.append((text, level))
            case ast.Call(ast.Name("abort_startup") | ast.Attribute(_, "abort_startup"), [reason]):
                texts = [each.value for each in ast.walk(reason) if isinstance(each, ast.Constant)]
                reasons.append(max(texts, key=len))
    return messages, reasons


@pytest.mark.parametrize("module", MODULES)
def test_the_document_contains_each_message_of_the_log_with_its_level(module):
    messages, _ = find_messages(module)
    for text, level in messages:
        beginning = re.split(" user=|[%(]", text)[0].strip()
        pattern = rf"^.*`{re.escape(beginning)}(?!\w).*\| {level} \|"
        assert re.search(pattern, TEXT, re.MULTILINE), text


@pytest.mark.parametrize("module", ["auth.py", "db.py"])
def test_the_document_contains_each_reason_why_a_start_fails(module):
    _, reasons = find_messages(module)
    assert reasons
    for reason in reasons:
        assert reason.strip(" (") in TEXT


# The unit for systemd


@pytest.fixture
def unit():
    """The section Service of the unit."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str
    parser.read(DOCS / "auth-jwt.service")
    return parser["Service"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_is_valid(tmp_path):
    text = (DOCS / "auth-jwt.service").read_text()
    copy = tmp_path / "auth-jwt.service"
    copy.write_text(text.replace("/opt/auth-jwt/.venv/bin/uvicorn", shutil.which("true")))
    command = ["systemd-analyze", "verify", copy]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stderr == ""


@pytest.fixture
def unit_service(unit, mongod):
    """A service that is started with the options of the unit."""
    program, app, port_option, port, *options = shlex.split(unit["ExecStart"])
    assert program == "/opt/auth-jwt/.venv/bin/uvicorn"
    assert (app, port_option, port) == ("app:app", "--port", "5000")
    service = Service(mongod.uri, *options)
    service.wait_for_log("startup complete", int(options[options.index("--workers") + 1]))
    return service


def test_the_unit_ends_the_service_before_systemd_kills_it(unit, unit_service):
    half_a_request = b"POST /auth/login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", unit_service.port), 5) as client:
        client.sendall(half_a_request)
        unit_service.process.terminate()
        unit_service.process.wait(int(unit["TimeoutStopSec"]))


def test_the_unit_reloads_the_workers(unit, unit_service):
    command = unit["ExecReload"].replace("$MAINPID", str(unit_service.process.pid))
    number = len(unit_service.workers())
    subprocess.run(shlex.split(command), check=True)
    unit_service.wait_for_log("startup complete", 2 * number)
    unit_service.stop()
