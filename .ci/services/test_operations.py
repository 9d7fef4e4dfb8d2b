"""Tests of what the README says about operating the service.

The variable MONGOD contains the path of MongoDB's binary.
"""

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import jwt
import pymongo
import pytest
from helpers import PASSWORD, ROOT, UVICORN, Service, free_port, start_command, wait_until
from test_readme import CONVERT, OPERATE_FIRST, OPERATIONS

ALICE = "alice@example.com"
BOB = "bob@example.com"


@pytest.fixture
def users(mongod):
    """The collection of the service."""
    with pymongo.MongoClient(mongod.uri, tz_aware=True) as client:
        yield client.faults.users


@pytest.fixture
def run_python(mongod):
    """A function that runs code beside the service, with its database, and returns the output."""
    settings = {
        "MONGO_URI": mongod.uri,
        "MONGO_DB_NAME": "faults",
        "JWT_SECRET_KEY": uuid.uuid4().hex,
    }

    def run(code):
        command = [sys.executable, "-c", code]
        return subprocess.check_output(
            command, cwd=ROOT, env=os.environ | settings, text=True, timeout=60
        )

    return run


@pytest.fixture
def run_command(run_python):
    """A function that runs the README's only command whose comment begins with this text."""

    def run(beginning):
        [command] = [OPERATIONS[text] for text in OPERATIONS if text.startswith(beginning)]
        return run_python(OPERATE_FIRST + command)

    return run


# Commands


@pytest.mark.parametrize(
    "beginning",
    [
        "Set a new password",
        "End all sessions of the user",
        "Disable the user",
        "Enable the user",
        "Allow logins again",
        "Delete the user",
    ],
)
def test_a_command_does_not_change_another_user(service, users, run_command, beginning):
    service.register(BOB)
    service.register(ALICE)
    service.login(BOB, "wrong")
    before = users.find_one({"email": BOB})
    run_command(beginning)
    assert users.find_one({"email": BOB}) == before


def test_a_command_ends_the_sessions_of_every_user(service, run_command):
    tokens = [service.register(email).body for email in (ALICE, BOB)]
    run_command("End all sessions of all users")
    assert [service.me(each["access_token"]).status for each in tokens] == [401, 401]


def test_the_refresh_token_of_a_disabled_user_is_rejected(service, run_command):
    tokens = service.register(ALICE).body
    run_command("Disable the user")
    assert service.refresh(tokens["refresh_token"]).status == 401


def test_a_user_who_is_disabled_twice_can_be_enabled(service, run_command):
    service.register(ALICE)
    run_command("Disable the user")
    run_command("Disable the user")
    run_command("Enable the user")
    assert service.login(ALICE).status == 200


def test_the_list_of_who_is_logged_in_omits_ended_and_expired_sessions(service, users, run_command):
    for email in (ALICE, BOB):
        service.register(email)
    carol = service.register("carol@example.com").body
    assert service.logout(carol["refresh_token"]).status == 204
    # A refresh token is valid for seven days.
    expired = {"refresh_tokens.0.issued_at": datetime.now(UTC) - timedelta(days=8)}
    users.update_one({"email": BOB}, {"$set": expired})
    assert run_command("List who is logged in") == f"['{ALICE}']\n"


def test_the_conversion_of_emails_does_not_change_documents_without_one(run_python, users):
    documents = [{"_id": 1, "name": "a document of a host"}, {"_id": 2, "email": 5}]
    users.insert_many(documents)
    run_python(CONVERT)
    assert list(users.find()) == documents


# Settings


@pytest.mark.parametrize(
    ("options", "status"), [([], 3), (["--workers", "2"], 0)], ids=["one worker", "two workers"]
)
def test_the_status_of_uvicorn_after_an_invalid_setting(options, status):
    command = [*UVICORN, "--port", "0", *options]
    process = start_command("mongodb://127.0.0.1:1", *command, JWT_SECRET_KEY="short")
    log = process.communicate(timeout=60)[1]
    assert process.returncode == status
    assert "auth-jwt cannot start: JWT_SECRET_KEY " in log


def test_a_new_key_logs_everybody_out(mongod, service):
    tokens = service.register(ALICE).body
    restarted = Service(mongod.uri, JWT_SECRET_KEY=uuid.uuid4().hex)
    assert restarted.me(tokens["access_token"]).status == 401
    assert restarted.refresh(tokens["refresh_token"]).status == 401
    assert restarted.login(ALICE).status == 200
    restarted.stop()


# Liveness and backup


def test_the_liveness_probe_needs_no_database(mongod, service):
    refresh_token = service.register(ALICE).body["refresh_token"]
    mongod.freeze()
    try:
        # More than there are threads, and each waits for MongoDB.
        with ThreadPoolExecutor(50) as clients:
            refreshes = [clients.submit(service.refresh, refresh_token) for _ in range(50)]
            time.sleep(0.5)
            probes = [service.request("GET", "/openapi.json") for _ in range(20)]
            assert not any(refresh.done() for refresh in refreshes)
            assert {refresh.result().status for refresh in refreshes} == {503}
    finally:
        mongod.resume()
    print(f"The slowest response to the probe took {max(p.seconds for p in probes):.2f} s")
    assert {probe.status for probe in probes} == {200}


def test_a_restored_backup_contains_sessions_that_were_ended(service, users, run_command):
    tokens = service.register(ALICE).body
    backup = list(users.find())
    assert service.logout(tokens["refresh_token"]).status == 204
    assert service.me(tokens["access_token"]).status == 401
    users.drop()
    users.insert_many(backup)
    assert service.me(tokens["access_token"]).status == 200
    run_command("End all sessions of all users")
    assert service.me(tokens["access_token"]).status == 401


def test_a_registration_creates_the_index_of_a_restored_collection(mongod, service, users):
    service.register(ALICE)
    backup = list(users.find())
    users.drop()
    users.insert_many(backup)
    assert service.register(ALICE).status == 409
    assert mongod.has_unique_index()


# Restart


class Workers:
    """A copy of the service, in memory, with two workers that read the copy's .env."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("app.py", "auth.py", "db.py"):
            shutil.copy(ROOT / name, folder)
        self.set_lifetime("15")
        self.port = free_port()
        self.log_file = folder / "log"
        settings = ("MONGO_URI", "JWT_SECRET_KEY", "ACCESS_TOKEN_EXPIRE_MINUTES")
        environment = {name: os.environ[name] for name in os.environ if name not in settings}
        command = [sys.executable, *UVICORN, "--port", str(self.port), "--workers", "2"]
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stderr=log)

    @property
    def log(self):
        return self.log_file.read_text()

    def set_lifetime(self, minutes):
        (self.folder / ".env").write_text(f"ACCESS_TOKEN_EXPIRE_MINUTES={minutes}\n")

    def wait_for(self, text, count=1):
        wait_until(lambda: self.log.count(text) == count, 30)

    def restart(self):
        self.process.send_signal(signal.SIGHUP)

    def request(self, method, path, body=None):
        """Return the status and the body of a response."""
        headers = {"Content-Type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, response.read()

    def get_status(self):
        """Return the status of a response, or the error if there is none."""
        try:
            return self.request("GET", "/auth/me")[0]
        except OSError as error:
            return error

    def stop(self):
        self.process.terminate()
        self.process.wait(15)


@pytest.fixture
def workers(tmp_path):
    workers = Workers(tmp_path)
    try:
        workers.wait_for("startup complete", 2)
        yield workers
    finally:
        workers.stop()


def test_sighup_replaces_the_workers_without_downtime(workers):
    statuses, failures = [], []
    is_restarted = threading.Event()

    def send_requests():
        while not is_restarted.is_set():
            status = workers.get_status()
            (failures if isinstance(status, OSError) else statuses).append(status)
            time.sleep(0.01)

    client = threading.Thread(target=send_requests)
    client.start()
    try:
        workers.restart()
        workers.wait_for("Finished server process", 2)
    finally:
        is_restarted.set()
        client.join(15)
    print(f"{len(statuses)} requests during a restart, {failures=}")
    assert set(statuses) == {401}
    assert len(statuses) > 20
    # A worker that stops closes a connection on which it has not received a request yet.
    number_of_workers = 2
    assert len(failures) <= number_of_workers


def test_new_workers_have_the_code_and_the_settings_of_the_files(workers):
    app = workers.folder / "app.py"
    app.write_text(app.read_text() + '\nlogger.critical("new code")\n')
    workers.set_lifetime("120")
    workers.restart()
    workers.wait_for("Finished server process", 2)
    assert workers.log.count("new code") == 2
    credentials = {"email": ALICE, "password": PASSWORD}
    status, body = workers.request("POST", "/auth/register", credentials)
    claims = jwt.decode(json.loads(body)["access_token"], options={"verify_signature": False})
    assert (status, round((claims["exp"] - time.time()) / 60)) == (201, 120)


def test_the_workers_continue_if_the_new_settings_are_invalid(workers):
    workers.set_lifetime("never")
    workers.restart()
    workers.wait_for("auth-jwt cannot start: ACCESS_TOKEN_EXPIRE_MINUTES ")
    workers.wait_for("aborting the restart")
    assert "Finished server process" not in workers.log
    assert {workers.get_status() for _ in range(10)} == {401}
