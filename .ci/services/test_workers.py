"""Tests of several processes that share a MongoDB, and of a process that was forked."""

import os
import shutil
import signal
import subprocess
import uuid
from datetime import UTC, datetime

import pytest
from argon2 import PasswordHasher
from bson import ObjectId
from helpers import PASSWORD, Service, copy_modules, new_email, send_at_once, statuses_of


def test_a_killed_worker_is_replaced(workers):
    os.kill(workers.workers()[0], signal.SIGKILL)
    workers.wait_for_log("startup complete", 3)
    assert workers.register(new_email()).status == 201


# Each of the simultaneous requests below comes from its own network.


def test_one_of_twelve_simultaneous_registrations_succeeds_after_a_drop(workers, users, mongod):
    users.drop()
    email = new_email()
    responses = send_at_once(12, lambda client: workers.register(email, f"127.0.1.{client + 1}"))
    assert sorted(statuses_of(responses)) == [201] + [409] * 11
    assert users.count_documents({"email": email}) == 1
    assert mongod.has_unique_index()


def test_twelve_simultaneous_logins_with_an_older_hash_succeed(workers, users):
    email = new_email()
    user = {"_id": ObjectId(workers.register(email).body["user_id"])}
    older_hash = PasswordHasher(time_cost=1, memory_cost=1024).hash(PASSWORD)
    users.update_one(user, {"$set": {"password_hash": older_hash}})
    responses = send_at_once(
        12, lambda client: workers.login(email, source=f"127.0.1.{client + 1}")
    )
    assert statuses_of(responses) == [200] * 12
    assert users.find_one(user)["password_hash"] != older_hash


# The login limit


def guess_until_limited(service, email, clients, networks):
    """Return how many wrong passwords were checked before each client got a 429."""

    def guess(client):
        statuses = []
        while 429 not in statuses:
            response = service.login(email, "wrong", f"127.0.1.{client % networks + 1}")
            statuses.append(response.status)
        return statuses

    statuses = [status for each in send_at_once(clients, guess) for status in each]
    assert set(statuses) <= {401, 429, 503}
    print(f"{clients} clients: {statuses.count(401)} passwords checked")
    return statuses.count(401)


def test_simultaneous_guesses_from_one_network_exceed_the_limit_by_a_few(workers):
    email = new_email()
    token = workers.register(email).body["access_token"]
    # Without the second check of the limit, up to 16 more guesses would be checked, because 16
    # can wait for their hashes in the two processes.
    assert 20 <= guess_until_limited(workers, email, clients=30, networks=1) < 30
    assert workers.me(token).status == 200


def test_simultaneous_guesses_from_many_networks_exceed_the_limit_by_a_few(workers, users):
    email = new_email()
    user = {"_id": ObjectId(workers.register(email, "127.0.2.1").body["user_id"])}
    failures = [{"network": f"192.0.2.{n}", "failed_at": datetime.now(UTC)} for n in range(95)]
    users.update_one(user, {"$set": {"login_failures": failures}})
    # Without the second check of the limit, 32 guesses can wait for their hashes.
    assert 5 <= guess_until_limited(workers, email, clients=50, networks=50) < 15
    # The network of a session is exempt.
    assert workers.login(email, source="127.0.2.1").status == 200


# Clocks


def clock_variables(offset):
    """Return the variables that change the clock of a process."""
    # faketime itself would not pass on SIGTERM.
    printed = subprocess.check_output(["faketime", "-f", offset, "printenv"], text=True)
    variables = dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)
    return {name: variables[name] for name in ("LD_PRELOAD", "FAKETIME")}


@pytest.fixture
def late_and_exact(mongod):
    """Two services with the same key. The clock of the first one is 5 minutes late."""
    if shutil.which("faketime") is None:
        pytest.skip("needs faketime")
    key = uuid.uuid4().hex
    late = Service(mongod.uri, JWT_SECRET_KEY=key, **clock_variables("-5m"))
    exact = Service(mongod.uri, JWT_SECRET_KEY=key)
    yield late, exact
    exact.stop()
    late.stop()


def test_tokens_are_valid_on_servers_whose_clocks_differ_by_minutes(late_and_exact):
    tokens = late_and_exact[0].register(new_email()).body
    for service in (*late_and_exact, *late_and_exact):
        assert service.me(tokens["access_token"]).status == 200
        tokens = service.refresh(tokens["refresh_token"]).body
    assert late_and_exact[0].logout(tokens["refresh_token"]).status == 204
    assert late_and_exact[1].me(tokens["access_token"]).status == 401


def test_a_clock_that_differs_by_minutes_ends_the_grace_period(late_and_exact):
    late, exact = late_and_exact
    token = late.register(new_email()).body["refresh_token"]
    late.refresh(token)
    assert exact.refresh(token).status == 401
    exact.wait_for_log("CRITICAL authn_token_reuse ")


def test_servers_whose_clocks_differ_by_minutes_share_the_login_limit(late_and_exact):
    late, exact = late_and_exact
    email = new_email()
    late.register(email)
    for service in (*[exact] * 10, *[late] * 10):
        assert service.login(email, "wrong").status == 401
    waits = []
    for service in late_and_exact:
        response = service.login(email)
        assert response.status == 429
        waits.append(response.retry_after)
    # By the late clock, the hour since the first failure ends five minutes later.
    assert waits[0] > waits[1] + 4 * 60


# A fork

HOST_THAT_FORKS = """
import os
import signal
import sys
import uvicorn
import auth
from app import app

auth.hash_password("MyS3cret@1", "192.0.2.1")
worker = os.fork()
if worker == 0:
    uvicorn.run(app, port=int(sys.argv[2]), access_log=False)
else:
    signal.signal(signal.SIGTERM, lambda *_: os.kill(worker, signal.SIGTERM))
    os.waitpid(worker, 0)
"""


def test_a_process_that_is_forked_after_a_hash_can_hash(mongod, tmp_path):
    copy_modules(tmp_path)
    (tmp_path / "host.py").write_text(HOST_THAT_FORKS)
    service = Service(mongod.uri, script="host.py", folder=tmp_path)
    email = new_email()
    assert service.register(email).status == 201
    assert service.login(email).status == 200
    service.stop()
