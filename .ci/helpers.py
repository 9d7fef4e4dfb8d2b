"""Servers that the tests start: MongoDB and the service.

The variable MONGOD contains the path of MongoDB's binary. Linux is required.
"""

import contextlib
import functools
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import pymongo

ROOT = Path(__file__).parents[1]
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
    def __init__(self, folder, *options, port=None):
        folder.mkdir()
        self.port = port or free_port()
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
running = []  # the services, of which a failed test does not end its own


def start_command(uri, *command, prefix=(), folder=ROOT, **variables):
    """Start Python with a command of the service, which uses the MongoDB at the URI."""
    key = uuid.uuid4().hex if uri else ""
    settings = {"MONGO_URI": uri, "MONGO_DB_NAME": "faults", "JWT_SECRET_KEY": key}
    process = subprocess.Popen(
        [*prefix, sys.executable, *command],
        cwd=folder,
        env=os.environ | settings | variables,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    running.append(process)
    return process


def kill_running_services():
    """End the services, with their workers, that a test has not ended."""
    while running:
        process = running.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Response(NamedTuple):
    status: int
    body: dict
    seconds: float
    retry_after: int


class Service:
    def __init__(self, uri, *options, app="app:app", prefix=(), seconds=30, **variables):
        end = time.monotonic() + seconds
        self.start(uri, options, app, prefix, variables)
        while not listens(self.port):
            assert time.monotonic() < end, f"not within {seconds} s: {self.log}"
            if self.process.poll() is not None:
                self.reader.join(10)
                # Another connection can have taken the port in the meantime.
                assert "address already in use" in self.log, self.log
                self.start(uri, options, app, prefix, variables)
            time.sleep(0.1)

    def start(self, uri, options, app, prefix, variables):
        self.port = free_port()
        command = ("-m", "uvicorn", app, "--no-access-log", "--port", str(self.port), *options)
        self.process = start_command(uri, *command, prefix=prefix, **variables)
        self.lines = []
        read = functools.partial(self.lines.extend, self.process.stderr)
        self.reader = threading.Thread(target=read, daemon=True)
        self.reader.start()

    @property
    def log(self):
        return "".join(self.lines)

    def workers(self):
        """Return the process ids of all workers that have started."""
        return re.findall(r"Started server process \[(\d+)\]", self.log)

    def request(self, method, path, body=None, token=None, source="127.0.0.1"):
        """Send a request from the source address, which is one of 127.0.0.0/8."""
        headers = {"Content-Type": "application/json"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=30, source_address=(source, 0)
        )
        started = time.monotonic()
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
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
        self.process.terminate()
        self.process.wait(15)
        self.reader.join(10)
        assert "Traceback" not in self.log


def new_email():
    return f"{uuid.uuid4().hex}@example.com"


def join_uri(servers):
    return f"mongodb://{','.join(f'127.0.0.1:{server.port}' for server in servers)}/?replicaSet=rs"
