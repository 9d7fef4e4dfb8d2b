"""Servers that the tests start: MongoDB and the service, and clients that load the service.

The variable MONGOD contains the path of MongoDB's binary. Linux is required.
"""

import contextlib
import functools
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pymongo

ROOT = Path(__file__).parents[1]
PASSWORD = "MyS3cret@1"
TIMEOUT = 2.5  # seconds, as TIMEOUT_MS in db.py
REJECTION_DELAY = 1  # second, as in app.py


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


def new_email():
    return f"{uuid.uuid4().hex}@example.com"


# MongoDB


class Mongod:
    def __init__(self, folder, *options, port=None):
        folder.mkdir()
        self.port = port or free_port()
        self.uri = f"mongodb://127.0.0.1:{self.port}"
        self.command = [os.environ["MONGOD"], "--dbpath", str(folder), "--port", str(self.port)]
        self.command += ["--bind_ip", "127.0.0.1", "--wiredTigerCacheSizeGB", "0.25"]
        self.command += ["--setParameter", "enableTestCommands=1", *options]
        self.process = None
        self.start()

    def start(self):
        """Start the server unless it is running."""

        def is_started():
            # An outgoing connection can occupy the port for a moment.
            if self.process is None or self.process.poll() is not None:
                self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
            return listens(self.port)

        wait_until(is_started, 60)

    def kill(self):
        self.process.kill()
        self.process.wait()

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

    def wait_for_fail_point(self, times):
        """Wait until so many queries have reached a fail point since the server started."""
        wait = {"waitForFailPoint": "failCommand", "timesEntered": times, "maxTimeMS": 60_000}
        with pymongo.MongoClient(self.uri) as client:
            client.admin.command(wait)

    def hang(self):
        # Longer than the timeout of the service. Switching off waits for blocked queries.
        self.set_fail_point("alwaysOn", blockConnection=True, blockTimeMS=3000)

    def stop_hanging(self):
        self.set_fail_point("off")

    def drop_databases(self):
        with pymongo.MongoClient(self.uri) as client:
            for name in {*client.list_database_names()} - {"admin", "config", "local"}:
                client.drop_database(name)

    def has_unique_index(self):
        with pymongo.MongoClient(self.uri) as client:
            return client.faults.users.index_information()["email_1"]["unique"]


# The service

UVICORN = ("-m", "uvicorn", "app:app", "--no-access-log")
# By default, uvicorn replaces a worker that does not respond for five seconds.
TWO_WORKERS = ("--workers", "2", "--timeout-worker-healthcheck", "20")
SETTINGS = (
    "MONGO_URI",
    "MONGO_DB_NAME",
    "JWT_SECRET_KEY",
    "ACCESS_TOKEN_EXPIRE_MINUTES",
    "REFRESH_TOKEN_EXPIRE_DAYS",
    "CORS_ORIGINS",
)
started_services = []  # of which a failed test does not end its own


def start_command(uri, *command, prefix=(), folder=ROOT, **variables):
    """Start Python with a command of the service, which uses the MongoDB at the URI.

    If the URI is empty, users are kept in memory. If it is None, .env contains the settings.
    """
    environment = {name: os.environ[name] for name in os.environ if name not in SETTINGS}
    if uri is not None:
        key = uuid.uuid4().hex if uri else ""
        # An empty variable hides the one in .env.
        environment |= dict.fromkeys(SETTINGS, "")
        environment |= {"MONGO_URI": uri, "MONGO_DB_NAME": "faults", "JWT_SECRET_KEY": key}
    process = subprocess.Popen(
        [*prefix, sys.executable, *command],
        cwd=folder,
        env=environment | variables,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started_services.append(process)
    return process


def kill_services(processes):
    """End the services, with their workers, that a test has not ended."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def copy_modules(folder):
    """Copy the service. The copy of app.py takes its port from its arguments `--port N`."""
    for name in ("auth.py", "db.py"):
        shutil.copy(ROOT / name, folder)
    code = (ROOT / "app.py").read_text()
    assert code.count("port=5000") == 1
    argument = 'int(__import__("sys").argv[2])'
    (folder / "app.py").write_text(code.replace("port=5000", f"port={argument}"))


class Response(NamedTuple):
    status: int
    body: dict
    seconds: float
    retry_after: int


class Service:
    """A running service.

    uvicorn starts the application `app`, unless `script` names a script that starts it and gets
    the arguments `--port N`.
    """

    def __init__(
        self,
        uri,
        *options,
        app="app:app",
        script=None,
        folder=ROOT,
        prefix=(),
        seconds=60,
        **variables,
    ):
        command = (script,) if script else ("-m", "uvicorn", app, "--no-access-log")
        start = functools.partial(start_command, uri, prefix=prefix, folder=folder, **variables)
        end = time.monotonic() + seconds
        self.start(start, command, options)
        while not listens(self.port):
            assert time.monotonic() < end, f"not within {seconds} s: {self.log}"
            if self.process.poll() is not None:
                self.reader.join(10)
                # Another connection can have taken the port in the meantime.
                assert "address already in use" in self.log, self.log
                self.start(start, command, options)
            time.sleep(0.1)

    def start(self, start, command, options):
        self.port = free_port()
        self.process = start(*command, "--port", str(self.port), *options)
        self.lines = []
        read = functools.partial(self.lines.extend, self.process.stderr)
        self.reader = threading.Thread(target=read, daemon=True)
        self.reader.start()

    @property
    def log(self):
        return "".join(self.lines)

    def wait_for_log(self, text, count=1):
        """Wait until the text occurs so often in the log."""
        wait_until(lambda: self.log.count(text) >= count, 60)
        assert self.log.count(text) == count

    def workers(self):
        """Return the process ids of all workers that have started."""
        return [int(pid) for pid in re.findall(r"Started server process \[(\d+)\]", self.log)]

    def request(self, method, path, body=None, token=None, source="127.0.0.1"):
        """Send a request from the source address, which is one of 127.0.0.0/8."""
        headers = {"Content-Type": "application/json"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=60, source_address=(source, 0)
        )
        started = time.monotonic()
        with contextlib.closing(connection):
            body = json.dumps(body) if body is not None else None
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            text = response.read().decode()
        seconds = time.monotonic() - started
        retry_after = int(response.headers.get("Retry-After", 0))
        assert (retry_after > 0) == (response.status in (429, 503))
        assert "127.0.0.1" not in text
        # A 204 has no body.
        body = json.loads(text) if text else {}
        return Response(response.status, body, seconds, retry_after)

    def register(self, email, source="127.0.0.1"):
        credentials = {"email": email, "password": PASSWORD}
        return self.request("POST", "/auth/register", credentials, source=source)

    def login(self, email, password=PASSWORD, source="127.0.0.1"):
        credentials = {"email": email, "password": password}
        return self.request("POST", "/auth/login", credentials, source=source)

    def refresh(self, token):
        return self.request("POST", "/auth/refresh", {"refresh_token": token})

    def logout(self, token):
        return self.request("POST", "/auth/logout", {"refresh_token": token})

    def me(self, token):
        return self.request("GET", "/auth/me", token=token)

    def stop(self):
        """End the service. Its log is complete then."""
        self.process.terminate()
        self.process.wait(60)
        self.reader.join(10)
        assert "Traceback" not in self.log


# Clients


def send_at_once(number, send):
    """Return the responses to send(client) of so many clients at once."""
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(send, range(number)))


@contextlib.contextmanager
def repeat(number, send, obey_retry_after=True):
    """Repeat send(client) with so many clients during the block. The value is their responses."""
    responses, is_over = [], threading.Event()

    def run(client):
        while not is_over.is_set():
            response = send(client)
            responses.append(response)
            is_over.wait(response.retry_after if obey_retry_after else 0)

    with ThreadPoolExecutor(number) as pool:
        clients = [pool.submit(run, client) for client in range(number)]
        try:
            yield responses
        finally:
            is_over.set()
        for client in clients:
            client.result()


def start_sessions(service, number):
    """Return a function refresh(client) for so many clients, each of which has a session.

    A client sends its newest token, which is the same as before if it got a 503.
    """
    tokens = [service.register(new_email()).body["refresh_token"] for _ in range(number)]

    def refresh(client):
        response = service.refresh(tokens[client])
        tokens[client] = response.body.get("refresh_token", tokens[client])
        return response

    return refresh


def statuses_of(responses):
    return [response.status for response in responses]
