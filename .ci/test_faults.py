"""The service and a MongoDB that is killed, frozen and brought back. MONGOD names the server's binary."""

import contextlib
import http.client
import json
import os
import signal
import socket
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
PATIENCE = 5.5  # seconds: "503 within about 5 seconds"


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
        self.command = [os.environ["MONGOD"], "--dbpath", str(folder), "--port", str(self.port), "--bind_ip"]
        self.command += ["127.0.0.1", "--wiredTigerCacheSizeGB", "0.25", *options]
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        wait_until(lambda: listens(self.port), 30)

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        self.process.kill()
        self.process.wait()


class Service:
    def __init__(self, uri):
        self.port = free_port()
        settings = {"MONGO_URI": uri, "MONGO_DB_NAME": "faults", "JWT_SECRET_KEY": uuid.uuid4().hex}
        command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(self.port), "--no-access-log"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stderr=subprocess.PIPE, text=True)
        self.log = []
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()
        wait_until(lambda: listens(self.port), 30)

    def ask(self, method, path, body=None, token=None):
        """Return the status and the JSON of the answer; a 503 has to come in time and to say when to ask again."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        asked = time.monotonic()
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        if answer.status == 503:
            assert answer.headers["Retry-After"]
            assert time.monotonic() - asked < PATIENCE
            assert "127.0.0.1" not in text
        return answer.status, json.loads(text)

    def register(self, email):
        return self.ask("POST", "/auth/register", {"email": email, "password": PASSWORD})

    def login(self, email):
        return self.ask("POST", "/auth/login", {"email": email, "password": PASSWORD})

    def me(self, token):
        return self.ask("GET", "/auth/me", token=token)

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


def new_email():
    return f"{uuid.uuid4().hex}@example.com"


def what_needs_no_database_is_answered_as_always(service):
    asked = time.monotonic()
    assert service.ask("POST", "/auth/login", {"email": "x"})[0] == 422
    assert service.me("x")[0] == 401
    assert time.monotonic() - asked < 2


def test_a_registration_survives_kill_9_of_mongod_right_after_the_201(mongod, service):
    emails = [new_email() for _ in range(5)]
    for email in emails:
        wait_until(lambda email=email: service.register(email)[0] in (201, 409), 30)
        mongod.kill()
        mongod.start()
    for email in emails:
        wait_until(lambda email=email: service.login(email)[0] == 200, 30)


def test_while_mongod_is_dead_the_answer_is_503_and_afterwards_all_is_well(mongod, service):
    email = new_email()
    token = service.register(email)[1]["access_token"]
    mongod.kill()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(service.me, token), pool.submit(service.login, email)] * 3
        asked.append(pool.submit(service.register, new_email()))
        what_needs_no_database_is_answered_as_always(service)
        assert {answer.result()[0] for answer in asked} == {503}
    mongod.start()
    wait_until(lambda: service.me(token)[0] == 200, 15)
    assert service.login(email)[0] == 200


def test_while_mongod_is_frozen_the_answer_is_503_and_afterwards_all_is_well(mongod, service):
    email = new_email()
    token = service.register(email)[1]["access_token"]
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: service.me(token)[0], range(32))) == {200}
        mongod.signal(signal.SIGSTOP)
        try:
            answers = pool.map(lambda _: service.me(token)[0], range(16))
            what_needs_no_database_is_answered_as_always(service)
            assert set(answers) == {503}
            assert set(pool.map(lambda ask: ask(new_email())[0], [service.login, service.register] * 4)) == {503}
        finally:
            mongod.signal(signal.SIGCONT)
        wait_until(lambda: service.me(token)[0] == 200, 15)
        assert set(pool.map(lambda _: service.me(token)[0], range(32))) == {200}


def test_when_a_primary_is_killed_under_registrations_none_that_was_acknowledged_is_lost(tmp_path):
    servers = []
    for name in "abc":
        (tmp_path / name).mkdir()
        servers.append(Mongod(tmp_path / name, "--replSet", "rs"))
    members = [{"_id": i, "host": f"127.0.0.1:{server.port}"} for i, server in enumerate(servers)]
    with pymongo.MongoClient(servers[0].uri, directConnection=True) as client:
        settings = {"electionTimeoutMillis": 2000}
        client.admin.command("replSetInitiate", {"_id": "rs", "members": members, "settings": settings})
        wait_until(lambda: client.admin.command("hello")["isWritablePrimary"], 30)
    service = Service(f"mongodb://{','.join(member['host'] for member in members)}/?replicaSet=rs")
    answers = {}
    stop = time.monotonic() + 12

    def go_on_registering(_):
        while time.monotonic() < stop:
            email = new_email()
            answers[email] = service.register(email)[0]

    with ThreadPoolExecutor(4) as pool:
        running = pool.map(go_on_registering, range(4))
        time.sleep(3)
        servers[0].kill()
        list(running)
    acknowledged = [email for email, status in answers.items() if status == 201]
    refused = [email for email, status in answers.items() if status == 503]
    print(f"{len(acknowledged)} registrations acknowledged, {len(refused)} answered 503")
    assert len(acknowledged) + len(refused) == len(answers)
    assert list(answers.values())[-1] == 201
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda email: service.login(email)[0], acknowledged)) == {200}
    service.stop()
    for server in servers:
        server.kill()
