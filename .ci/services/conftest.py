"""Fixtures that several tests use."""

import contextlib
import os
import subprocess
import sys

import pymongo
import pytest
from helpers import ROOT, Mongod, Service, free_port, kill_running_services, listens, wait_until


@pytest.fixture(autouse=True)
def no_service_remains():
    yield
    kill_running_services()


@pytest.fixture
def mongod(tmp_path):
    server = Mongod(tmp_path / "single")
    yield server
    server.kill()


@pytest.fixture
def service(mongod):
    service = Service(mongod.uri)
    yield service
    service.stop()


@pytest.fixture
def restricted_mongod(tmp_path):
    """A MongoDB server with access control, and a client with its administrator."""
    server = Mongod(tmp_path / "restricted", "--auth")
    with pymongo.MongoClient(server.uri) as client:
        client.admin.command("createUser", "admin", pwd="admin", roles=["root"])
    with pymongo.MongoClient(server.uri, username="admin", password="admin") as client:
        yield server, client
    server.kill()


@pytest.fixture
def replica_set(request, tmp_path):
    """Three servers; the first is the primary, the parameter is the election timeout."""
    servers = [Mongod(tmp_path / name, "--replSet", "rs") for name in "abc"]
    members = [{"_id": i, "host": f"127.0.0.1:{s.port}"} for i, s in enumerate(servers)]
    members[0]["priority"] = 2
    try:
        with pymongo.MongoClient(servers[0].uri, directConnection=True) as client:

            def becomes_primary():
                # By itself, it would wait for the election timeout.
                with contextlib.suppress(pymongo.errors.OperationFailure):
                    client.admin.command("replSetStepUp")
                return client.admin.command("hello")["isWritablePrimary"]

            settings = {"electionTimeoutMillis": request.param}
            config = {"_id": "rs", "members": members, "settings": settings}
            client.admin.command("replSetInitiate", config)
            wait_until(becomes_primary, 30)
        yield servers
    finally:
        for server in servers:
            server.kill()


@pytest.fixture(scope="module")
def memory_service(tmp_path_factory):
    """The address of a service in memory; no request may cause a traceback in its log."""
    port = free_port()
    settings = dict.fromkeys(["MONGO_URI", "JWT_SECRET_KEY", "CORS_ORIGINS"], "")
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port), "--no-access-log"]
    with (tmp_path_factory.mktemp("service") / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stderr=log)
        wait_until(lambda: listens(port), 30)
        yield f"http://127.0.0.1:{port}"
        process.terminate()
        process.wait(15)
        log.seek(0)
        assert "Traceback" not in log.read()
