"""Tests of a service with a replica set that loses its primary or its majority."""

import contextlib

import pymongo
import pytest
from helpers import (
    Mongod,
    Service,
    new_email,
    repeat,
    send_at_once,
    start_sessions,
    statuses_of,
    wait_until,
)


def direct_client(server):
    return pymongo.MongoClient(server.uri, directConnection=True)


def step_up(server):
    """Make the server the primary, without waiting for an election timeout of ten seconds."""
    with direct_client(server) as client:

        def is_primary():
            with contextlib.suppress(pymongo.errors.PyMongoError):
                client.admin.command("replSetStepUp")
            return client.admin.command("hello")["isWritablePrimary"]

        wait_until(is_primary, 60)


@pytest.fixture(scope="module")
def three_servers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replica_set")
    servers = [Mongod(folder / name, "--replSet", "rs") for name in "abc"]
    members = [{"_id": i, "host": f"127.0.0.1:{s.port}"} for i, s in enumerate(servers)]
    with direct_client(servers[0]) as client:
        client.admin.command("replSetInitiate", {"_id": "rs", "members": members})
    yield servers
    for server in servers:
        server.kill()


@pytest.fixture
def replica_set(three_servers):
    """Three running servers, of which the first is the primary."""
    step_up(three_servers[0])
    yield three_servers
    for server in three_servers:
        server.resume()
        server.start()


@pytest.fixture
def service(replica_set):
    servers = ",".join(f"127.0.0.1:{server.port}" for server in replica_set)
    service = Service(f"mongodb://{servers}/?replicaSet=rs")
    yield service
    service.stop()


@contextlib.contextmanager
def majority_lost(replica_set):
    """Freeze both secondaries during the block."""
    for server in replica_set[1:]:
        server.freeze()
    try:
        yield
    finally:
        for server in replica_set[1:]:
            server.resume()


def test_acknowledged_registrations_survive_the_loss_of_the_primary(replica_set, service):
    statuses = {}

    def register(_):
        email = new_email()
        response = service.register(email)
        statuses[email] = response.status
        return response

    with repeat(4, register) as responses:
        wait_until(lambda: len(responses) > 10, 60)
        replica_set[0].kill()
        step_up(replica_set[1])
        wait_until(lambda: set(statuses_of(responses[-4:])) == {201}, 60)
    assert set(statuses.values()) <= {201, 503}
    acknowledged = [email for email in statuses if statuses[email] == 201]
    with direct_client(replica_set[1]) as client:
        stored = client.faults.users.distinct("email")
    assert set(acknowledged) <= set(stored)


def test_a_write_without_a_majority_is_503_and_reads_work(replica_set, service):
    email = new_email()
    tokens = service.register(email).body
    with majority_lost(replica_set):
        assert service.refresh(tokens["refresh_token"]).status == 503
        # For ten seconds, the primary does not notice the loss.
        wait_until(lambda: service.me(tokens["access_token"]).status == 200, 5)
    wait_until(lambda: service.login(email).status == 200, 60)


def test_a_repeated_logout_is_503_until_a_majority_has_the_first_one(replica_set, service):
    tokens = service.register(new_email()).body
    with majority_lost(replica_set):
        assert service.logout(tokens["refresh_token"]).status == 503
        # The primary responds, and has deleted the session.
        wait_until(lambda: service.me(tokens["access_token"]).status == 401, 5)
        assert service.logout(tokens["refresh_token"]).status == 503
    wait_until(lambda: service.logout(tokens["refresh_token"]).status == 204, 60)


def test_a_lost_majority_ends_no_session_of_clients_that_obey_retry_after(replica_set, service):
    refresh = start_sessions(service, 10)
    with repeat(10, refresh) as responses:
        with majority_lost(replica_set):
            wait_until(lambda: statuses_of(responses).count(503) >= 10, 60)
            with direct_client(replica_set[0]) as client:
                client.admin.command("replSetStepDown", 1, force=True)
        # The new primary may lack the refreshes without a response.
        step_up(replica_set[1])
        wait_until(lambda: set(statuses_of(responses[-10:])) == {200}, 60)
    assert set(statuses_of(responses)) == {200, 503}
    assert set(statuses_of(send_at_once(10, refresh))) == {200}
    service.stop()
    assert "authn_token_reuse " not in service.log
