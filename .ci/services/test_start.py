"""Tests of the start of a service: without MongoDB, with an error of MongoDB, and its log."""

import os
import re
import signal

import pytest
from helpers import (
    TWO_WORKERS,
    UVICORN,
    Service,
    copy_modules,
    free_port,
    new_email,
    start_command,
    wait_until,
)


@pytest.fixture
def copy(tmp_path):
    """A folder with a copy of the service, whose app.py takes its port from its arguments."""
    copy_modules(tmp_path)
    return tmp_path


# Without MongoDB


def test_workers_start_without_mongodb_and_create_the_index_later(mongod):
    mongod.kill()
    service = Service(mongod.uri, *TWO_WORKERS)
    service.wait_for_log("startup complete", 2)
    service.wait_for_log("MongoDB is not responding", 2)
    assert service.register(new_email()).status == 503
    mongod.start()
    wait_until(lambda: service.register(new_email()).status == 201, 60)
    assert mongod.has_unique_index()
    service.stop()


def test_workers_are_replaced_without_mongodb(mongod, workers):
    mongod.kill()
    # uvicorn replaces all workers that end, unless a replacement cannot start.
    for worker in workers.workers():
        os.kill(worker, signal.SIGKILL)
    workers.wait_for_log("startup complete", 4)
    assert workers.process.poll() is None
    assert workers.register(new_email()).status == 503
    mongod.start()
    wait_until(lambda: workers.register(new_email()).status == 201, 60)


def test_app_py_logs_an_unreachable_mongodb_once(copy):
    service = Service(f"mongodb://127.0.0.1:{free_port()}", script="app.py", folder=copy)
    service.stop()
    assert "startup complete" in service.log
    assert service.log.count("MongoDB is not responding") == service.log.count("MONGO_URI") == 1


# Settings


@pytest.mark.parametrize("is_in_file", [False, True], ids=["environment", ".env"])
def test_app_py_serves_where_web_concurrency_is_set(copy, is_in_file):
    variables = {"WEB_CONCURRENCY": "2"}
    if is_in_file:
        (copy / ".env").write_text("WEB_CONCURRENCY=2\n")
        variables = {}
    service = Service("", script="app.py", folder=copy, **variables)
    assert service.register(new_email()).status == 201
    service.stop()


@pytest.mark.parametrize(
    ("options", "status"), [((), 3), (("--workers", "2"), 0)], ids=["one worker", "two workers"]
)
def test_the_exit_status_of_uvicorn_after_an_invalid_setting(options, status):
    command = [*UVICORN, "--port", "0", *options]
    process = start_command("mongodb://127.0.0.1:1", *command, JWT_SECRET_KEY="short")
    log = process.communicate(timeout=60)[1]
    assert process.returncode == status
    assert "auth-jwt cannot start: JWT_SECRET_KEY " in log


# Errors of MongoDB


def start_in_vain(uri, *command):
    """Return the log of a start that fails."""
    process = start_command(uri, *command)
    log = process.communicate(timeout=60)[1]
    assert process.returncode == 3
    assert "auth-jwt cannot start: MongoDB returned the error above.\n" in log
    return log


@pytest.mark.parametrize(
    "command", [("app.py",), (*UVICORN, "--port", "0")], ids=["app.py", "uvicorn"]
)
def test_a_failed_start_names_the_error(restricted_mongod, command):
    server, admin = restricted_mongod
    admin.faults.command("createUser", "reader", pwd="s3cret", roles=["read"])
    admin.faults.users.insert_many([{"email": "twice@example.com"} for _ in range(2)])
    host = f"127.0.0.1:{server.port}"
    errors = {
        f"mongodb://reader:wr0ng@{host}/faults": "AuthenticationFailed",
        f"mongodb://reader:s3cret@{host}/faults": "Unauthorized",
        f"mongodb://admin:admin@{host}": "DuplicateKey",
    }
    # One after another, because a start waits for an index that another one is creating.
    for uri, error in errors.items():
        log = start_in_vain(uri, *command)
        assert f"MongoDB returned an error: {error}\n" in log
        for secret in ("wr0ng", "s3cret", "twice@example.com"):
            assert secret not in log
        if command == ("app.py",):
            # There is no traceback.
            assert len(log.splitlines()) == 2


# Log


def test_uvicorn_logs_security_events_with_time_and_level(service):
    email = new_email()
    service.register(email)
    service.login(email)
    service.stop()
    time_and_level = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
    assert re.search(time_and_level + "WARNING user_created user=", service.log, re.MULTILINE)
    assert re.search(time_and_level + "INFO authn_login_success", service.log, re.MULTILINE)
