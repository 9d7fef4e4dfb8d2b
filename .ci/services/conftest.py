"""Fixtures that several tests use."""

import pymongo
import pytest
from helpers import TWO_WORKERS, Mongod, Service, kill_services, started_services


@pytest.fixture(autouse=True)
def no_service_remains():
    number = len(started_services)  # Fixtures of modules have started these.
    yield
    kill_services(started_services[number:])
    del started_services[number:]


@pytest.fixture(scope="session")
def session_mongod(tmp_path_factory):
    server = Mongod(tmp_path_factory.mktemp("mongod") / "data")
    yield server
    server.kill()


@pytest.fixture
def mongod(session_mongod):
    """A MongoDB server without data. It runs again after a test that killed or froze it."""
    yield session_mongod
    session_mongod.resume()
    session_mongod.start()
    session_mongod.stop_hanging()
    session_mongod.drop_databases()


@pytest.fixture
def users(mongod):
    """The collection of the service."""
    with pymongo.MongoClient(mongod.uri, tz_aware=True) as client:
        yield client.faults.users


@pytest.fixture
def service(mongod):
    service = Service(mongod.uri)
    yield service
    service.stop()


@pytest.fixture
def workers(mongod):
    """A service with two workers."""
    service = Service(mongod.uri, *TWO_WORKERS)
    service.wait_for_log("startup complete", 2)
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


@pytest.fixture(scope="module")
def memory_service():
    """The address of a service in memory; no request may cause a traceback in its log."""
    service = Service("")
    yield f"http://127.0.0.1:{service.port}"
    service.stop()
