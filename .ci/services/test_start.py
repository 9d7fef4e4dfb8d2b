"""Tests of a service that starts while MongoDB is unavailable or refuses it, and of workers."""

import os
import re
import signal

import pymongo
from helpers import UVICORN, Service, free_port, new_email, start_command, wait_until


def test_workers_start_without_mongodb(mongod):
    mongod.kill()
    service = Service(mongod.uri, "--workers", "2")
    wait_until(lambda: service.log.count("startup complete") == 2, 30)
    assert service.log.count("MongoDB is not responding") == 2
    assert all("MONGO_URI" in line for line in service.lines if "is not responding" in line)
    assert service.register(new_email()).status == 503
    mongod.start()
    wait_until(lambda: service.register(new_email()).status == 201, 10)
    assert mongod.has_unique_index()
    with pymongo.MongoClient(mongod.uri) as client:
        client.faults.users.drop()
    mongod.kill()
    # uvicorn replaces all workers that end, unless a replacement cannot start.
    for worker in service.workers():
        os.kill(int(worker), signal.SIGKILL)
    wait_until(lambda: service.log.count("startup complete") == 4, 30)
    assert service.process.poll() is None
    assert service.register(new_email()).status == 503
    mongod.start()
    wait_until(lambda: service.register(new_email()).status == 201, 10)
    assert mongod.has_unique_index()
    service.stop()


def test_a_failed_start_names_the_error(restricted_mongod):
    server, admin = restricted_mongod
    admin.faults.command("createUser", "reader", pwd="s3cret", roles=["read"])
    admin.faults.users.insert_many([{"email": "twice"}, {"email": "twice"}])
    host = f"127.0.0.1:{server.port}"
    expected = {
        f"mongodb://reader:wrong@{host}/faults": "(AuthenticationFailed)",
        f"mongodb://reader:s3cret@{host}/faults": "(Unauthorized)",
        f"mongodb://admin:admin@{host}": "(DuplicateKey)",
        # A password that is percent-encoded as Latin-1. PyMongo raises a ValueError.
        f"mongodb://admin:s3cret%E4@{host}": "(ValueError)",
    }
    commands = {"app.py": ["app.py"], "uvicorn": [*UVICORN, "--port", "0"]}
    starts = [
        (name, error, start_command(uri, *command))
        for name, command in commands.items()
        for uri, error in expected.items()
    ]
    for name, error, process in starts:
        log = process.communicate(timeout=60)[1]
        message = next(
            line for line in log.splitlines() if line.startswith("auth-jwt cannot start: ")
        )
        assert process.returncode == 3
        assert error in message
        if name == "app.py":
            assert log.splitlines()[1:] == [message]
            assert "MongoDB returned an error: " in log.splitlines()[0]
        assert "s3cret" not in log
        assert "wrong" not in log


def test_app_py_logs_an_unreachable_mongodb_once():
    process = start_command(f"mongodb://127.0.0.1:{free_port()}", "app.py")
    lines = []
    # Port 5000 can be taken, so no request is sent.
    for line in process.stderr:
        lines.append(line)
        if "startup complete" in line:
            break
    process.terminate()
    log = "".join([*lines, *process.stderr])
    process.wait()
    assert "startup complete" in log
    assert log.count("MongoDB is not responding") == log.count("MONGO_URI") == 1
    assert "Traceback" not in log


def test_uvicorn_logs_security_events_with_time_and_level(mongod, service):
    email = new_email()
    service.register(email)
    service.login(email)
    wait_until(lambda: "authn_login_success" in service.log, 5)
    time_and_level = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
    assert re.search(time_and_level + "WARNING user_created user=", service.log, re.MULTILINE)
    assert re.search(time_and_level + "INFO authn_login_success", service.log, re.MULTILINE)
