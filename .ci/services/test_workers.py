"""Tests of several workers that share a MongoDB."""

import os
import shutil
import signal
import subprocess
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pymongo
import pytest
from argon2 import PasswordHasher
from bson import ObjectId
from helpers import PASSWORD, Service, new_email, wait_until


@pytest.fixture
def workers(mongod):
    """A service with two workers."""
    service = Service(mongod.uri, "--workers", "2")
    wait_until(lambda: service.log.count("startup complete") == 2, 30)
    yield service
    service.stop()


@pytest.fixture
def users(mongod):
    with pymongo.MongoClient(mongod.uri) as client:
        yield client.faults.users


def run_at_once(number, send):
    """Return the statuses of responses that are requested at once, each from its own address."""
    with ThreadPoolExecutor(number) as pool:
        responses = pool.map(lambda n: send(source=f"127.0.1.{n + 1}"), range(number))
        return [response.status for response in responses]


def test_a_killed_worker_is_replaced(workers):
    os.kill(int(workers.workers()[0]), signal.SIGKILL)
    wait_until(lambda: workers.log.count("startup complete") == 3, 30)
    assert workers.register(new_email()).status == 201


def test_twelve_registrations_after_the_collection_was_dropped(workers, users, mongod):
    workers.register(new_email())
    for _ in range(2):
        users.drop()
        email = new_email()
        statuses = run_at_once(12, lambda source, email=email: workers.register(email, source))
        assert sorted(statuses) == [201] + [409] * 11
        assert users.count_documents({"email": email}) == 1
        assert mongod.has_unique_index()
    # Equal emails would prevent it.
    Service(mongod.uri).stop()


def test_twelve_logins_with_an_older_hash_all_succeed(workers, users):
    email = new_email()
    user = {"_id": ObjectId(workers.register(email).body["user_id"])}
    older_hash = PasswordHasher(time_cost=1, memory_cost=1024).hash(PASSWORD)
    users.update_one(user, {"$set": {"password_hash": older_hash}})
    statuses = run_at_once(12, lambda source: workers.login(email, source=source))
    assert statuses == [200] * 12
    assert users.find_one(user)["password_hash"] != older_hash


# The login limit


def guess_often(service, email, clients, seconds, networks=1):
    """Return the statuses of logins with a wrong password."""
    stop = time.monotonic() + seconds

    def guess(number):
        source = f"127.0.1.{number % networks + 1}"
        statuses = []
        while not statuses or time.monotonic() < stop:
            statuses.append(service.login(email, "wrong", source).status)
        return statuses

    with ThreadPoolExecutor(clients) as pool:
        statuses = [status for each in pool.map(guess, range(clients)) for status in each]
    print(f"{clients} clients in {networks} networks: {len(statuses)} logins, ", end="")
    print(f"{statuses.count(401)} passwords checked")
    return statuses


@pytest.mark.parametrize("clients", [6, 50])
def test_guessing_from_one_network_exceeds_the_limit_by_a_few(workers, clients):
    email = new_email()
    tokens = workers.register(email).body
    statuses = guess_often(workers, email, clients, seconds=4)
    assert set(statuses) <= {401, 429, 503}
    assert 5 <= statuses.count(401) <= 10
    assert workers.me(tokens["access_token"]).status == 200
    assert workers.refresh(tokens["refresh_token"]).status == 200


def test_guessing_from_many_networks_exceeds_the_limit_by_a_few(workers, users):
    email = new_email()
    user = {"_id": ObjectId(workers.register(email, "127.0.2.1").body["user_id"])}
    failures = [{"network": f"192.0.2.{n}", "failed_at": datetime.now(UTC)} for n in range(95)]
    users.update_one(user, {"$set": {"login_failures": failures}})
    statuses = guess_often(workers, email, 100, seconds=4, networks=50)
    assert set(statuses) <= {401, 429, 503}
    assert 5 <= statuses.count(401) <= 10
    # The network of a session is exempt.
    assert workers.login(email, source="127.0.2.1").status == 200


# A slow clock


def variables_of_a_slow_clock():
    # faketime itself would not pass on SIGTERM.
    printed = subprocess.check_output(["faketime", "-f", "-3d", "printenv"], text=True)
    variables = dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)
    return {name: variables[name] for name in ("LD_PRELOAD", "FAKETIME")}


@pytest.mark.skipif(shutil.which("faketime") is None, reason="needs faketime")
def test_a_login_on_a_worker_with_a_slow_clock_works_beside_20_newer_sessions(mongod, users):
    key = uuid.uuid4().hex
    service = Service(mongod.uri, JWT_SECRET_KEY=key)
    slow_service = Service(mongod.uri, JWT_SECRET_KEY=key, **variables_of_a_slow_clock())
    email = new_email()
    newer = [service.register(email).body, *(service.login(email).body for _ in range(19))]
    tokens = slow_service.login(email).body
    assert slow_service.me(tokens["access_token"]).status == 200
    # The access token is three days old by the other clock.
    assert service.me(tokens["access_token"]).status == 401
    tokens = service.refresh(tokens["refresh_token"]).body
    for each in (service, slow_service):
        assert each.me(tokens["access_token"]).status == 200
    # Only the oldest session has ended.
    statuses = [slow_service.me(each["access_token"]).status for each in newer]
    assert statuses == [401] + [200] * 19
    assert len(users.find_one({"email": email})["refresh_tokens"]) == 20
    slow_service.stop()
    service.stop()
