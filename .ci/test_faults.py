"""Tests of a service that lacks memory or whose MongoDB is killed, frozen, restricted or failing.

The variable MONGOD contains the path of the server's binary. Linux is required.
"""

import contextlib
import functools
import http.client
import json
import os
import re
import resource
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
from typing import NamedTuple

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
        folder.mkdir()
        self.port = free_port()
        self.uri = f"mongodb://127.0.0.1:{self.port}"
        self.command = [os.environ["MONGOD"], "--dbpath", str(folder), "--port", str(self.port)]
        self.command += ["--bind_ip", "127.0.0.1", "--wiredTigerCacheSizeGB", "0.25"]
        self.command += ["--setParameter", "enableTestCommands=1", *options]
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        wait_until(lambda: listens(self.port), 30)

    def freeze(self):
        self.process.send_signal(signal.SIGSTOP)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def set_fail_point(self, mode, **effect):
        """Let queries fail, but not the driver's monitors. Return how many have failed so far."""
        commands = {"failCommands": ["find", "update", "insert", "findAndModify"]}
        fail_point = {"configureFailPoint": "failCommand", "mode": mode, "data": commands | effect}
        with pymongo.MongoClient(self.uri) as client:
            return client.admin.command(fail_point)["count"]

    def hang(self):
        # Longer than the timeout of the service. Switching off waits for blocked queries.
        self.set_fail_point("alwaysOn", blockConnection=True, blockTimeMS=4000)

    def stop_hanging(self):
        self.set_fail_point("off")

    def has_unique_index(self):
        with pymongo.MongoClient(self.uri) as client:
            return client.faults.users.index_information()["email_1"]["unique"]

    def kill(self):
        self.process.kill()
        self.process.wait()


UVICORN = ("-m", "uvicorn", "app:app", "--no-access-log")


def start_command(uri, *command):
    """Start Python with a command of the service, which uses the MongoDB at the URI."""
    settings = {"MONGO_URI": uri, "MONGO_DB_NAME": "faults", "JWT_SECRET_KEY": uuid.uuid4().hex}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | settings,
        stderr=subprocess.PIPE,
        text=True,
    )


class Response(NamedTuple):
    status: int
    body: dict
    seconds: float
    retry_after: int


class Service:
    def __init__(self, uri, *options):
        self.port = free_port()
        self.process = start_command(uri, *UVICORN, "--port", str(self.port), *options)
        self.lines = []
        read = functools.partial(self.lines.extend, self.process.stderr)
        self.reader = threading.Thread(target=read, daemon=True)
        self.reader.start()
        wait_until(lambda: listens(self.port), 30)

    @property
    def log(self):
        return "".join(self.lines)

    def workers(self):
        """Return the process ids of all workers that have started."""
        return re.findall(r"Started server process \[(\d+)\]", self.log)

    def request(self, method, path, body=None, token=None):
        headers = {"Content-Type": "application/json"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        started = time.monotonic()
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        seconds = time.monotonic() - started
        retry_after = int(response.headers.get("Retry-After", 0))
        assert (retry_after > 0) == (response.status in (429, 503))
        assert "127.0.0.1" not in text
        return Response(response.status, json.loads(text), seconds, retry_after)

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
        self.reader.join(10)
        assert "Traceback" not in self.log


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


def new_email():
    return f"{uuid.uuid4().hex}@example.com"


def test_an_acknowledged_registration_survives_kill_9_of_mongod(mongod, service):
    emails = [new_email() for _ in range(3)]
    for email in emails:
        wait_until(lambda email=email: service.register(email).status in (201, 409), 30)
        mongod.kill()
        mongod.start()
    for email in emails:
        wait_until(lambda email=email: service.login(email).status == 200, 30)


@pytest.mark.parametrize(
    ("fault", "repair"), [("kill", "start"), ("freeze", "resume"), ("hang", "stop_hanging")]
)
def test_an_outage_with_200_clients(mongod, service, fault, repair):
    email = new_email()
    token = service.register(email).body["access_token"]
    stop = time.monotonic() + 8
    during, malformed = [], []

    def request_me():
        while time.monotonic() < stop:
            during.append(service.me(token))

    def request_without_database():
        while time.monotonic() < stop:
            response = service.me("malformed")
            assert response.status == 401
            malformed.append(response.seconds)
            time.sleep(0.1)

    with ThreadPoolExecutor(220) as pool:
        requests = [pool.submit(request_me) for _ in range(200)]
        # The fault hits queries that are running.
        time.sleep(1)
        before = len(during)
        getattr(mongod, fault)()
        requests.append(pool.submit(request_without_database))
        hashing = [pool.submit(service.login, email) for _ in range(4)]
        hashing += [pool.submit(service.register, new_email()) for _ in range(4)]
        for request in requests:
            request.result()
        hashing = [request.result() for request in hashing]
    getattr(mongod, repair)()
    resumed = time.monotonic()
    wait_until(lambda: service.me(token).status == 200, 8)
    assert service.login(email).status == 200
    slowest = max(response.seconds for response in during)
    slowest_hash = max(response.seconds for response in hashing)
    print(
        f"{fault}: {len(during) - before} responses, slowest {slowest:.1f} s; "
        f"slowest login or registration {slowest_hash:.1f} s; "
        f"without database: median {statistics.median(malformed):.2f} s, "
        f"slowest {max(malformed):.1f} s; recovered in {time.monotonic() - resumed:.1f} s"
    )
    assert before > 100
    assert {response.status for response in during} == {200, 503}
    assert {response.status for response in hashing} <= {200, 201, 503}
    assert slowest < 5
    # While queries hang, one can wait for another to time out, hash, and then time out itself.
    assert slowest_hash < (8 if fault == "hang" else 5)
    assert statistics.median(malformed) < 0.7
    assert max(malformed) < 4
    assert service.log.count("MongoDB does not respond") == 1


def test_guessing_with_several_clients_and_workers_is_limited(mongod):
    service = Service(mongod.uri, "--workers", "2")
    wait_until(lambda: service.log.count("startup complete") == 2, 30)
    email = new_email()
    tokens = service.register(email).body
    stop = time.monotonic() + 8

    def guess(_):
        statuses = []
        while time.monotonic() < stop:
            statuses.append(service.login(email, "wrong").status)
        return statuses

    with ThreadPoolExecutor(6) as pool:
        statuses = [status for each in pool.map(guess, range(6)) for status in each]
    print(f"{len(statuses)} logins, {statuses.count(401)} passwords checked")
    assert set(statuses) == {401, 429}
    assert statuses.count(401) <= 25
    assert service.me(tokens["access_token"]).status == 200
    assert service.refresh(tokens["refresh_token"]).status == 200
    service.stop()


def test_dropped_connections_under_load(mongod, service):
    token = service.register(new_email()).body["access_token"]
    stop = time.monotonic() + 6
    statuses = []

    def request_me():
        while time.monotonic() < stop:
            statuses.append(service.me(token).status)

    with ThreadPoolExecutor(50) as pool:
        requests = [pool.submit(request_me) for _ in range(50)]
        while time.monotonic() < stop:
            mongod.set_fail_point("alwaysOn", closeConnection=True)
            time.sleep(0.1)
            dropped = mongod.set_fail_point("off")
            time.sleep(0.9)
        for request in requests:
            request.result()
    print(f"{dropped} dropped connections: {len(statuses)} responses, {statuses.count(503)} × 503")
    assert dropped >= 5
    assert statuses.count(200) > 100
    assert set(statuses) <= {200, 503}
    wait_until(lambda: service.me(token).status == 200, 3)


def test_workers_start_without_mongodb(mongod):
    mongod.kill()
    service = Service(mongod.uri, "--workers", "2")
    wait_until(lambda: service.log.count("startup complete") == 2, 30)
    assert service.log.count("MongoDB does not respond") == 2
    assert all("MONGO_URI" in line for line in service.lines if "does not respond" in line)
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
        assert log == message + "\n" or name != "app.py"
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
    assert log.count("MongoDB does not respond") == log.count("MONGO_URI") == 1
    assert "Traceback" not in log


def test_without_memory_for_a_hash_logins_and_registrations_are_503(mongod, service):
    email = new_email()
    service.register(email)
    assert service.login(email).status == 200
    process = service.process.pid
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[0])
    old_limit = resource.prlimit(process, resource.RLIMIT_AS)
    # Another thread fits, the 64 MiB of a hash do not.
    limit = pages * resource.getpagesize() + 48 * 1024**2
    resource.prlimit(process, resource.RLIMIT_AS, (limit, old_limit[1]))
    with ThreadPoolExecutor(4) as pool:
        logins = [pool.submit(service.login, email) for _ in range(8)]
        logins.append(pool.submit(service.login, email, "wrong"))
        assert {login.result().status for login in logins} == {503}
    assert service.register(new_email()).status == 503
    resource.prlimit(process, resource.RLIMIT_AS, old_limit)
    wait_until(lambda: service.log.count("The service is overloaded: ") == 10, 3)
    with pymongo.MongoClient(mongod.uri) as client:
        assert "login_failures" not in client.faults.users.find_one({"email": email})
    assert service.login(email).status == 200


def test_a_permanent_error_is_500(restricted_mongod, request):
    server, admin = restricted_mongod
    admin.faults.command("createUser", "writer", pwd="s3cret", roles=["readWrite"])
    service = Service(f"mongodb://writer:s3cret@127.0.0.1:{server.port}/faults")
    request.addfinalizer(service.process.kill)
    email, other_email = new_email(), new_email()
    tokens = service.register(email).body
    service.register(other_email)
    admin.faults.users.update_one({"email": other_email}, {"$set": {"refresh_tokens": "text"}})
    assert service.login(other_email)[:2] == (500, {"detail": "Internal server error"})
    assert service.login(email).status == 200
    admin.faults.command("updateUser", "writer", roles=["read"])
    assert service.login(email)[:2] == (500, {"detail": "Internal server error"})
    assert service.register(new_email()).status == 500
    assert service.me(tokens["access_token"]).status == 200
    log = service.log
    assert "MongoDB returned an error: WriteError" in log
    assert "MongoDB returned an error: Unauthorized" in log
    assert "does not respond" not in log
    assert email not in log
    service.stop()


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


def join_uri(servers):
    return f"mongodb://{','.join(f'127.0.0.1:{server.port}' for server in servers)}/?replicaSet=rs"


@pytest.mark.parametrize("replica_set", [10000], indirect=True)
def test_an_outage_ends_no_session_of_clients_that_obey_retry_after(mongod, replica_set):
    def refresh_often(service, token, stop):
        """After a 503, send the same token again. Stop at a response that is not."""
        statuses = []
        while time.monotonic() < stop or statuses[-1] == 503:
            response = service.refresh(token)
            statuses.append(response.status)
            assert response.status in (200, 503)
            token = response.body.get("refresh_token", token)
            time.sleep(response.retry_after)
        return statuses

    def run_outage(service, servers, seconds):
        tokens = [service.register(new_email()).body["refresh_token"] for _ in range(10)]
        stop = time.monotonic() + seconds + 4
        with ThreadPoolExecutor(10) as pool:
            clients = [pool.submit(refresh_often, service, token, stop) for token in tokens]
            time.sleep(2)
            for server in servers:
                server.freeze()
            time.sleep(seconds)
            for server in servers:
                server.resume()
            statuses = [status for client in clients for status in client.result()]
        print(f"{seconds} s: {statuses.count(200)} refreshes, {statuses.count(503)} × 503")
        assert statuses.count(503) >= 10
        service.stop()
        assert "authn_token_reuse " not in service.log

    with ThreadPoolExecutor(2) as pool:
        frozen = pool.submit(run_outage, Service(mongod.uri), [mongod], 20)
        no_majority = pool.submit(run_outage, Service(join_uri(replica_set)), replica_set[1:], 14)
        frozen.result()
        no_majority.result()


@pytest.mark.parametrize("replica_set", [2000], indirect=True)
def test_acknowledged_registrations_survive_the_loss_of_the_primary(replica_set):
    service = Service(join_uri(replica_set))
    statuses = {}
    stop = time.monotonic() + 9

    def register_often(_):
        while time.monotonic() < stop:
            email = new_email()
            statuses[email] = service.register(email).status

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
        assert set(pool.map(lambda email: service.login(email).status, acknowledged)) == {200}
    service.stop()


@pytest.mark.parametrize("replica_set", [2000, 10000], indirect=True)
def test_a_write_without_a_majority_is_503(replica_set, request):
    service = Service(join_uri(replica_set))
    email = new_email()
    tokens = service.register(email).body
    replica_set[1].freeze()
    replica_set[2].freeze()
    try:
        response = service.refresh(tokens["refresh_token"])
        assert response.status == 503
        assert response.seconds < 5
        # Without a majority, the primary steps down after the election timeout. Until then, reads
        # work as soon as the circuit breaker is closed.
        if request.node.callspec.params["replica_set"] == 10000:
            wait_until(lambda: service.me(tokens["access_token"]).status == 200, 3)
    finally:
        replica_set[1].resume()
        replica_set[2].resume()
    wait_until(lambda: service.login(email).status == 200, 15)
    service.stop()
