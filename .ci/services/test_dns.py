"""Tests of a service whose name server fails for a while.

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
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
from helpers import TWO_WORKERS, Service, new_email, wait_until

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
        query = dns.message.from_wire(data)
        response = dns.message.make_response(query)
        response.flags |= dns.flags.RA
        if self.mode in ("SERVFAIL", "NXDOMAIN"):
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
        if record:
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

    wait_until(five_registrations_in_a_row_succeed, 60)


SRV_URI = f"mongodb+srv://{DOMAIN}/?tls=false"


# MongoDB's driver rejects a host outside of the domain.
@pytest.mark.parametrize("mode", ["SERVFAIL", "NXDOMAIN", "silent", "foreign host"])
def test_a_service_starts_without_dns_and_works_when_dns_does(name_server, in_namespace, mode):
    name_server.mode = mode
    service = Service(SRV_URI, prefix=in_namespace)
    response = service.register(new_email())
    assert (response.status, response.retry_after) == (503, 2)
    assert service.me("malformed").status == 401
    name_server.mode = "works"
    wait_for_registrations(service)
    service.stop()
    assert service.log.count("MongoDB is not responding (ConfigurationError)") == 1
    assert service.log.count("MongoDB is responding again") == 1


def test_a_service_starts_without_resolv_conf(name_server, tmp_path):
    folder = tmp_path / "etc"
    subprocess.run(["cp", "-a", "/etc", folder], check=True)
    (folder / "resolv.conf").unlink(missing_ok=True)
    mount = f"mount --bind {shlex.quote(str(folder))} /etc"
    prefix = ("unshare", "--mount", "sh", "-c", f'{mount} && exec "$0" "$@"')
    service = Service(SRV_URI, prefix=prefix)
    assert service.register(new_email()).status == 503
    (folder / "resolv.conf").write_text(f"nameserver {NAME_SERVER[0]}\n")
    (folder / "nsswitch.conf").write_text("hosts: files dns\n")
    wait_for_registrations(service)
    service.stop()


def test_a_plain_host_name_that_does_not_resolve_is_an_outage(name_server, mongod, in_namespace):
    name_server.mode = "silent"
    service = Service(f"mongodb://a.{DOMAIN}:{mongod.port}", prefix=in_namespace)
    assert service.register(new_email()).status == 503
    name_server.mode = "works"
    wait_for_registrations(service)
    service.stop()
    assert service.log.count("MongoDB is not responding") == 1
    assert service.log.count("MongoDB is responding again") == 1


def test_a_worker_that_is_replaced_without_dns_does_not_end_the_others(name_server, in_namespace):
    service = Service(SRV_URI, *TWO_WORKERS, prefix=in_namespace)
    service.wait_for_log("startup complete", 2)
    assert service.register(new_email()).status == 201
    name_server.mode = "SERVFAIL"
    os.kill(service.workers()[0], signal.SIGKILL)
    service.wait_for_log("startup complete", 3)
    assert service.process.poll() is None
    name_server.mode = "works"
    wait_for_registrations(service)
    service.stop()
