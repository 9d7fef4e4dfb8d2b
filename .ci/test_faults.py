"""Tests with a real MongoDB that is killed, frozen or restricted, and with a replica set.

The variable MONGOD contains the path of the server's binary.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pymongo
import pytest

ROOT = Path(__file__).parent.parent
PASSWORD = "MyS3cret@1"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


def listens(port):
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True


class Mongod:
    def __init__(self, folder, *options):
        self.port = free_port()
        self.uri = f"mongodb://127.0.0.1:{self.port}"
        self.command = [os.environ["MONGOD"], "--dbpath", str(folder), "--port", str(self.port)]
        self.command += ["--bind_ip", "127.0.0.1", "--wiredTigerCacheSizeGB", "0.25", *options]
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        wait_until(lambda: listens(self.port), 30)

    def freeze(self):
        self.process.send_signal(signal.SIGSTOP)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def kill(self):
        self.process.kill()
        self.process.wait()


def uvicorn(uri, *options):
    """Return the command and the environment of a service that uses the MongoDB at the URI."""
    settings = {"MONGO_URI": uri, "MONGO_DB_NAME": "faults", "JWT_SECRET_KEY": uuid.uuid4().hex}
    command = [sys.executable, "-m", "uvicorn", "app:app", "--no-access-log", *options]
    return {"args": command, "cwd": ROOT, "env": os.environ | settings}


class Service:
    def __init__(self, uri, *options):
        self.port = free_port()
        command = uvicorn(uri, "--port", str(self.port), *options)
        self.process = subprocess.Popen(**command, stderr=subprocess.PIPE, text=True)
        self.log = []
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()
        wait_until(lambda: listens(self.port), 30)

    def request(self, method, path, body=None, token=None):
        """Return the status, the JSON and the seconds that the response took."""
        headers = {"Content-Type": "application/json"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        started = time.monotonic()
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        if response.status in (429, 503):
            assert response.headers["Retry-After"]
        assert "127.0.0.1" not in text
        return response.status, json.loads(text), time.monotonic() - started

    def register(self, email):
        return self.request("POST", "/auth/register", {"email": email, "password": PASSWORD})

    def login(self, email, password=PASSWORD):
        return self.request("POST", "/auth/login", {"email": email, "password": password})

    def refresh(self, token):
        return self.request("POST", "/auth/refresh", {"refresh_token": token})

    def me(self, token):
        return self.request("GET", "/auth/me", token=token)

    def stop(self):
        self.process.terminate()
        self.process.wait(10)
        assert "Traceback" not in "".join(self.log)


@pytest.fixture
def mongod(tmp_path):
    server = Mongod(tmp_path)
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
    server = Mongod(tmp_path, "--auth")
    with pymongo.MongoClient(server.uri) as client:
        client.admin.command("createUser", "admin", pwd="admin", roles=["root"])
    with pymongo.MongoClient(server.uri, username="admin", password="admin") as client:
        yield server, client
    server.kill()


def new_email():
    return f"{uuid.uuid4().hex}@example.com"


def test_an_acknowledged_registration_survives_kill_9_of_mongod(mongod, service):
    emails = [new_email() for _ in range(5)]
    for email in emails:
        wait_until(lambda email=email: service.register(email)[0] in (201, 409), 30)
        mongod.kill()
        mongod.start()
    for email in emails:
        wait_until(lambda email=email: service.login(email)[0] == 200, 30)


@pytest.mark.parametrize("fault", ["killed", "frozen"])
def test_an_outage_with_200_clients(mongod, service, fault):
    email = new_email()
    token = service.register(email)[1]["access_token"]
    stop = time.monotonic() + 8
    during, malformed = [], []

    def request_me():
        while time.monotonic() < stop:
            during.append(service.me(token))

    def request_without_database():
        while time.monotonic() < stop:
            status, _, seconds = service.me("malformed")
            assert status == 401
            malformed.append(seconds)
            time.sleep(0.1)

    with ThreadPoolExecutor(220) as pool:
        requests = [pool.submit(request_me) for _ in range(200)]
        # The fault hits queries that are running.
        time.sleep(1)
        before = len(during)
        mongod.kill() if fault == "killed" else mongod.freeze()
        requests.append(pool.submit(request_without_database))
        requests += [pool.submit(service.login, email) for _ in range(4)]
        requests += [pool.submit(service.register, new_email()) for _ in range(4)]
        for request in requests:
            response = request.result()
            during.extend([response] if response else [])
    mongod.start() if fault == "killed" else mongod.resume()
    resumed = time.monotonic()
    wait_until(lambda: service.me(token)[0] == 200, 8)
    assert service.login(email)[0] == 200
    print(
        f"{fault}: {len(during) - before} responses, slowest {max(s for _, _, s in during):.1f} s; "
        f"without database: median {statistics.median(malformed):.2f} s, "
        f"slowest {max(malformed):.1f} s; recovered in {time.monotonic() - resumed:.1f} s"
    )
    assert before > 100
    assert {status for status, _, _ in during} == {200, 503}
    assert max(seconds for _, _, seconds in during) < 5
    assert statistics.median(malformed) < 0.7
    assert max(malformed) < 4
    assert "".join(service.log).count("MongoDB does not respond") == 1


def test_guessing_with_several_clients_and_workers_is_limited(mongod):
    service = Service(mongod.uri, "--workers", "2")
    wait_until(lambda: "".join(service.log).count("startup complete") == 2, 30)
    email = new_email()
    tokens = service.register(email)[1]
    stop = time.monotonic() + 15

    def guess(_):
        statuses = []
        while time.monotonic() < stop:
            statuses.append(service.login(email, "wrong")[0])
        return statuses

    with ThreadPoolExecutor(6) as pool:
        statuses = [status for each in pool.map(guess, range(6)) for status in each]
    print(f"{len(statuses)} logins, {statuses.count(401)} passwords checked")
    assert set(statuses) == {401, 429}
    assert statuses.count(401) <= 25
    assert service.me(tokens["access_token"])[0] == 200
    assert service.refresh(tokens["refresh_token"])[0] == 200
    service.stop()


def test_a_failed_start_names_the_error(restricted_mongod):
    server, admin = restricted_mongod
    admin.faults.command("createUser", "reader", pwd="s3cret", roles=["read"])
    admin.faults.users.insert_many([{"email": "twice"}, {"email": "twice"}])
    host = f"127.0.0.1:{server.port}"
    expected = {
        f"mongodb://reader:wrong@{host}/faults": "(AuthenticationFailed)",
        f"mongodb://reader:s3cret@{host}/faults": "(Unauthorized)",
        f"mongodb://admin:admin@{host}": "several users have the same email or no email.",
        f"mongodb://127.0.0.1:{free_port()}": "(ServerSelectionTimeoutError)",
    }
    starts = {
        uri: subprocess.Popen(**uvicorn(uri, "--port", "0"), stderr=subprocess.PIPE, text=True)
        for uri in expected
    }
    for uri, process in starts.items():
        log = process.communicate(timeout=60)[1]
        assert process.returncode == 3
        start_of_message = "RuntimeError: auth-jwt cannot start: "
        message = next(line for line in log.splitlines() if line.startswith(start_of_message))
        assert expected[uri] in message
        assert "s3cret" not in log


def test_a_permanent_error_is_500(restricted_mongod):
    server, admin = restricted_mongod
    admin.faults.command("createUser", "writer", pwd="s3cret", roles=["readWrite"])
    service = Service(f"mongodb://writer:s3cret@127.0.0.1:{server.port}/faults")
    email, other_email = new_email(), new_email()
    tokens = service.register(email)[1]
    service.register(other_email)
    admin.faults.users.update_one({"email": other_email}, {"$set": {"refresh_tokens": "text"}})
    assert service.login(other_email)[:2] == (500, {"detail": "Internal server error"})
    assert service.login(email)[0] == 200
    admin.faults.command("updateUser", "writer", roles=["read"])
    assert service.login(email)[:2] == (500, {"detail": "Internal server error"})
    assert service.register(new_email())[0] == 500
    assert service.me(tokens["access_token"])[0] == 200
    log = "".join(service.log)
    assert "MongoDB returned an error: WriteError" in log
    assert "MongoDB returned an error: Unauthorized" in log
    assert "does not respond" not in log
    assert email not in log
    service.stop()


@pytest.fixture
def replica_set(request, tmp_path):
    """Three servers; the first is the primary, the parameter is the election timeout."""
    servers = []
    for name in "abc":
        (tmp_path / name).mkdir()
        servers.append(Mongod(tmp_path / name, "--replSet", "rs"))
    members = [{"_id": i, "host": f"127.0.0.1:{s.port}"} for i, s in enumerate(servers)]
    members[0]["priority"] = 2
    with pymongo.MongoClient(servers[0].uri, directConnection=True) as client:
        settings = {"electionTimeoutMillis": request.param}
        config = {"_id": "rs", "members": members, "settings": settings}
        client.admin.command("replSetInitiate", config)
        wait_until(lambda: client.admin.command("hello")["isWritablePrimary"], 30)
    yield servers
    for server in servers:
        server.kill()


@pytest.mark.parametrize("replica_set", [2000], indirect=True)
def test_acknowledged_registrations_survive_the_loss_of_the_primary(replica_set):
    hosts = ",".join(f"127.0.0.1:{server.port}" for server in replica_set)
    service = Service(f"mongodb://{hosts}/?replicaSet=rs")
    statuses = {}
    stop = time.monotonic() + 12

    def register_often(_):
        while time.monotonic() < stop:
            email = new_email()
            statuses[email] = service.register(email)[0]

    with ThreadPoolExecutor(4) as pool:
        running = pool.map(register_often, range(4))
        time.sleep(3)
        replica_set[0].kill()
        list(running)
    acknowledged = [email for email, status in statuses.items() if status == 201]
    unavailable = [email for email, status in statuses.items() if status == 503]
    print(f"{len(acknowledged)} registrations acknowledged, {len(unavailable)} got 503")
    assert len(acknowledged) + len(unavailable) == len(statuses)
    assert list(statuses.values())[-1] == 201
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda email: service.login(email)[0], acknowledged)) == {200}
    service.stop()


@pytest.mark.parametrize("replica_set", [2000, 10000], indirect=True)
def test_a_write_without_a_majority_is_503(replica_set, request):
    hosts = ",".join(f"127.0.0.1:{server.port}" for server in replica_set)
    service = Service(f"mongodb://{hosts}/?replicaSet=rs")
    email = new_email()
    tokens = service.register(email)[1]
    replica_set[1].freeze()
    replica_set[2].freeze()
    try:
        status, _, seconds = service.refresh(tokens["refresh_token"])
        assert status == 503
        assert seconds < 5
        # Without a majority, the primary steps down after the election timeout. Until then, reads
        # work as soon as the circuit breaker is closed.
        if request.node.callspec.params["replica_set"] == 10000:
            wait_until(lambda: service.me(tokens["access_token"])[0] == 200, 3)
    finally:
        replica_set[1].resume()
        replica_set[2].resume()
    wait_until(lambda: service.login(email)[0] == 200, 15)
    service.stop()
