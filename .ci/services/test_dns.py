"""Tests of a service whose name server fails for a while, and of other unusable answers.

They run the service in a mount namespace of its own, where /etc/resolv.conf names a name server
of this test on port 53 of 127.0.0.53. Root is required.
"""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
from helpers import UVICORN, Mongod, Service, free_port, new_email, start_command, wait_until

NAME_SERVER = ("127.0.0.53", 53)
DOMAIN = "db.auth-jwt.example"


def can_use_namespaces():
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        return False
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as server:
        server.bind(NAME_SERVER)
        return True
    return False


pytestmark = pytest.mark.skipif(
    not can_use_namespaces(), reason="needs root, unshare and port 53 of 127.0.0.53"
)


class NameServer:
    """A name server that answers in the current mode. It answers truthfully in the mode "works"."""

    def __init__(self, mongod_port):
        self.mode, self.mongod_port = "works", mongod_port
        self.socket = socket.socket(type=socket.SOCK_DGRAM)
        self.socket.bind(NAME_SERVER)
        self.socket.settimeout(0.1)
        self.is_stopped = False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while not self.is_stopped:
            with contextlib.suppress(TimeoutError):
                data, client = self.socket.recvfrom(4096)
                answer = self.answer(data)
                if answer is not None:
                    self.socket.sendto(answer, client)

    def stop(self):
        self.is_stopped = True
        self.thread.join(5)
        self.socket.close()

    def answer(self, data):
        if self.mode == "silent":
            return None
        if self.mode == "garbled":
            return data[:2] + b"\xff" * 30
        query = dns.message.from_wire(data)
        response = dns.message.make_response(query)
        response.flags |= dns.flags.RA
        if self.mode in ("SERVFAIL", "NXDOMAIN", "REFUSED"):
            response.set_rcode(dns.rcode.from_text(self.mode))
            return response.to_wire()
        question = query.question[0]
        record_type = dns.rdatatype.to_text(question.rdtype)
        host = f"a.{DOMAIN}." if self.mode != "foreign host" else "mongo.elsewhere.example."
        records = {
            ("SRV", f"_mongodb._tcp.{DOMAIN}."): f"0 0 {self.mongod_port} {host}",
            ("A", f"a.{DOMAIN}."): "127.0.0.1",
        }
        record = records.get((record_type, question.name.to_text()))
        if record and self.mode != "no answer":
            response.answer.append(dns.rrset.from_text(question.name, 1, "IN", record_type, record))
        return response.to_wire()


@pytest.fixture
def name_server(mongod):
    server = NameServer(mongod.port)
    yield server
    server.stop()


@pytest.fixture
def in_namespace(tmp_path):
    """The words before a command that is to use the name server of the test."""
    resolv_conf, nsswitch = tmp_path / "resolv.conf", tmp_path / "nsswitch.conf"
    resolv_conf.write_text(f"nameserver {NAME_SERVER[0]}\noptions timeout:1 attempts:1\n")
    nsswitch.write_text("hosts: files dns\n")
    mounts = f"mount --bind {shlex.quote(str(resolv_conf))} /etc/resolv.conf"
    if Path("/etc/nsswitch.conf").exists():
        mounts += f" && mount --bind {shlex.quote(str(nsswitch))} /etc/nsswitch.conf"
    return ("unshare", "--mount", "sh", "-c", f'{mounts} && exec "$0" "$@"')


def wait_for_registrations(service):
    """Wait until all workers work."""
    statuses = []

    def five_registrations_in_a_row_succeed():
        statuses.append(service.register(new_email()).status)
        return statuses[-5:] == [201] * 5

    wait_until(five_registrations_in_a_row_succeed, 15)


SRV_URI = f"mongodb+srv://{DOMAIN}/?tls=false"
FAILURES = ["SERVFAIL", "NXDOMAIN", "REFUSED", "silent", "garbled", "no answer"]


@pytest.mark.parametrize("mode", FAILURES)
def test_a_service_starts_without_dns_and_works_when_dns_does(name_server, in_namespace, mode):
    name_server.mode = mode
    started = time.monotonic()
    service = Service(SRV_URI, prefix=in_namespace)
    starting_time = time.monotonic() - started
    responses = [service.register(new_email())]
    # The circuit breaker lets one of these requests try again.
    time.sleep(1.1)
    responses += [service.register(new_email()) for _ in range(2)]
    slowest = max(response.seconds for response in responses)
    print(f"{mode}: started in {starting_time:.1f} s, slowest 503 in {slowest:.1f} s")
    assert starting_time < 8
    assert slowest < 5
    assert {(response.status, response.retry_after) for response in responses} == {(503, 2)}
    assert service.me("malformed").status == 401
    name_server.mode = "works"
    wait_until(lambda: service.register(new_email()).status == 201, 10)
    assert service.log.count("MongoDB is not responding") == service.log.count("MONGO_URI") == 1
    assert service.log.count("MongoDB is responding again") == 1
    service.stop()


@pytest.mark.parametrize("resolv_conf", ["", None], ids=["empty", "missing"])
def test_a_service_starts_without_a_usable_resolv_conf(name_server, tmp_path, resolv_conf):
    folder = tmp_path / "etc"
    subprocess.run(["cp", "-a", "/etc", folder], check=True)
    (folder / "resolv.conf").unlink(missing_ok=True)
    if resolv_conf is not None:
        (folder / "resolv.conf").write_text(resolv_conf)
    mount = f"mount --bind {shlex.quote(str(folder))} /etc"
    prefix = ("unshare", "--mount", "sh", "-c", f'{mount} && exec "$0" "$@"')
    service = Service(SRV_URI, prefix=prefix)
    response = service.register(new_email())
    assert (response.status, response.retry_after) == (503, 2)
    (folder / "resolv.conf").write_text(f"nameserver {NAME_SERVER[0]}\n")
    (folder / "nsswitch.conf").write_text("hosts: files dns\n")
    wait_until(lambda: service.register(new_email()).status == 201, 10)
    assert service.log.count("MongoDB is not responding") == service.log.count("MONGO_URI") == 1
    service.stop()


@pytest.mark.parametrize("mode", ["NXDOMAIN", "silent"])
def test_a_plain_host_name_that_does_not_resolve_for_a_while(
    name_server, mongod, in_namespace, mode
):
    name_server.mode = mode
    service = Service(f"mongodb://a.{DOMAIN}:{mongod.port}", prefix=in_namespace)
    response = service.register(new_email())
    assert (response.status, response.retry_after) == (503, 2)
    assert response.seconds < 5
    name_server.mode = "works"
    wait_until(lambda: service.register(new_email()).status == 201, 20)
    assert service.log.count("MongoDB is not responding") == service.log.count("MONGO_URI") == 1
    assert service.log.count("MongoDB is responding again") == 1
    service.stop()


def test_workers_start_and_are_replaced_without_dns(name_server, in_namespace):
    name_server.mode = "silent"
    service = Service(SRV_URI, "--workers", "2", prefix=in_namespace)
    wait_until(lambda: service.log.count("startup complete") == 2, 15)
    os.kill(int(service.workers()[0]), signal.SIGKILL)
    wait_until(lambda: service.log.count("startup complete") == 3, 15)
    assert service.process.poll() is None
    assert service.register(new_email()).status == 503
    assert service.log.count("MongoDB is not responding") == 3
    name_server.mode = "works"
    wait_for_registrations(service)
    service.stop()


def test_a_worker_that_is_replaced_without_dns_does_not_end_the_others(name_server, in_namespace):
    service = Service(SRV_URI, "--workers", "2", prefix=in_namespace)
    wait_until(lambda: service.log.count("startup complete") == 2, 30)
    assert service.register(new_email()).status == 201
    name_server.mode = "SERVFAIL"
    os.kill(int(service.workers()[0]), signal.SIGKILL)
    wait_until(lambda: service.log.count("startup complete") == 3, 30)
    assert service.process.poll() is None
    name_server.mode = "works"
    wait_for_registrations(service)
    service.stop()


def test_a_host_outside_of_the_domain_prevents_the_start(name_server, in_namespace):
    name_server.mode = "foreign host"
    process = start_command(SRV_URI, *UVICORN, "--port", "0", prefix=in_namespace)
    log = process.communicate(timeout=60)[1]
    assert process.returncode == 3
    assert "(ConfigurationError)" in log


class FakeMongoDB(threading.Thread):
    """A server that answers every connection with the same bytes."""

    def __init__(self, answer):
        super().__init__(daemon=True)
        self.answer, self.listener = answer, socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", free_port()))
        self.listener.listen()
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                with contextlib.suppress(OSError), connection:
                    connection.recv(4096)
                    connection.sendall(self.answer)

    def stop(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.join(5)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
        b"\xff" * 64,
        b"\x20\0\0\0" + b"\x01" * 28,
    ],
    ids=["HTTP", "ones", "a short message"],
)
def test_a_server_that_is_not_mongodb_is_an_outage(tmp_path, answer):
    fake = FakeMongoDB(answer)
    service = Service(f"mongodb://127.0.0.1:{fake.port}")
    for _ in range(3):
        assert service.register(new_email()).status == 503
    fake.stop()
    mongod = Mongod(tmp_path / "late", port=fake.port)
    try:
        wait_until(lambda: service.register(new_email()).status == 201, 15)
        service.stop()
    finally:
        mongod.kill()
