"""Tests of the README's nginx block in a real nginx, in front of a service in memory.

The programs nginx, curl and openssl are required.
"""

import functools
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import (
    PASSWORD,
    ROOT,
    UVICORN,
    Service,
    free_port,
    listens,
    new_email,
    start_command,
    wait_until,
)
from test_readme import README, find_blocks

NAME = "auth.example.com"
FRONT_END = "https://front.example.com"
FORGED_ADDRESS = "203.0.113.66"
# The block allows this many requests at once.
LIMIT = 11

# nginx as one process of the current user, which needs no file outside of its folder. A client
# sets its address with a header, because the loopback interface has a single IPv6 address.
NGINX_CONF = """
daemon off;
master_process off;
pid nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    set_real_ip_from 127.0.0.0/8;
    real_ip_header X-Test-Address;
    {block}
}}
"""


def replace(text, old, new, count):
    """Return the text with the new string, after a check of how often the old one occurs."""
    assert text.count(old) == count
    return text.replace(old, new)


def read_nginx_block():
    [block] = find_blocks("nginx")
    return block


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The path of a self-signed certificate and its key, without their suffixes."""
    path = tmp_path_factory.mktemp("certificate") / "test"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"]
    command += ["-keyout", f"{path}.key", "-out", f"{path}.crt"]
    subprocess.run(command, check=True, capture_output=True)
    return path


class Response(NamedTuple):
    status: int
    version: str
    headers: dict
    body: str


class Nginx:
    """An nginx with the README's block, a free port and another address of the service."""

    def __init__(self, folder, certificate, upstream, block=None):
        self.certificate = certificate
        self.port = free_port()
        block = block or read_nginx_block()
        block = replace(block, "listen 443 ", f"listen 127.0.0.1:{self.port} ", 1)
        block = replace(block, f"/etc/ssl/{NAME}", str(certificate), 2)
        block = replace(block, "http://127.0.0.1:5000", upstream, 2)
        config = folder / "nginx.conf"
        config.write_text(NGINX_CONF.format(block=block))
        self.process = subprocess.Popen(["nginx", "-p", f"{folder}/", "-c", config])
        wait_until(lambda: self.process.poll() is not None or listens(self.port), 10)
        assert self.process.poll() is None

    def request(self, path, body=None, *options, address=None, token=None, **headers):
        """Send a request with HTTP/2, from the address if there is one."""
        headers |= {"Content-Type": "application/json"}
        if address:
            headers["X-Test-Address"] = address
        if token:
            headers["Authorization"] = f"Bearer {token}"
        command = ["curl", "-s", "-i", "-m", "20", "--http2", "--cacert", f"{self.certificate}.crt"]
        command += ["--resolve", f"{NAME}:{self.port}:127.0.0.1", *options]
        for name, value in headers.items():
            command += ["-H", f"{name}: {value}"]
        if body is not None:
            command += ["-d", json.dumps(body)]
        command += ["-w", " %{http_version}", f"https://{NAME}:{self.port}{path}"]
        output = subprocess.check_output(command, text=True).replace("\r\n", "\n")
        text, version = output.rsplit(" ", 1)
        head, text = text.split("\n\n", 1)
        status_line, *lines = head.splitlines()
        fields = {line.split(": ")[0].lower(): line.split(": ", 1)[1] for line in lines}
        return Response(int(status_line.split()[1]), version, fields, text)

    def reach_limit(self, address):
        """Send as many logins from the address as nginx passes on at once."""
        for _ in range(LIMIT):
            # A body without a password is rejected without a hash.
            assert self.request("/auth/login", {}, address=address).status == 422

    def stop(self):
        self.process.terminate()
        self.process.wait(10)


class LoggingService(NamedTuple):
    url: str
    log_file: Path

    def has_logged(self, text):
        return text in self.log_file.read_text()


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A service in memory, for all tests that need no other options."""
    port = free_port()
    log_file = tmp_path_factory.mktemp("service") / "log"
    settings = dict.fromkeys(["MONGO_URI", "JWT_SECRET_KEY"], "")
    settings["CORS_ORIGINS"] = FRONT_END
    command = [sys.executable, *UVICORN, "--port", str(port)]
    with log_file.open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stderr=log)
    wait_until(lambda: listens(port), 30)
    yield LoggingService(f"http://127.0.0.1:{port}", log_file)
    process.terminate()
    process.wait(15)


@pytest.fixture
def nginx(tmp_path, certificate, service):
    # Each test has an nginx of its own, because the counters are in its memory.
    nginx = Nginx(tmp_path, certificate, service.url)
    yield nginx
    nginx.stop()


def register(nginx, **options):
    credentials = {"email": new_email(), "password": PASSWORD}
    response = nginx.request("/auth/register", credentials, **options)
    assert response.status == 201
    return credentials, json.loads(response.body)


def test_login_and_me_work_with_http_2(nginx):
    credentials, _ = register(nginx)
    login = nginx.request("/auth/login", credentials)
    assert (login.status, login.version) == (200, "2")
    me = nginx.request("/auth/me", token=json.loads(login.body)["access_token"])
    assert (me.status, json.loads(me.body)["email"]) == (200, credentials["email"])


def test_http_1_1_works(nginx):
    response = nginx.request("/openapi.json", None, "--http1.1")
    assert (response.status, response.version) == (200, "1.1")


def test_the_log_contains_the_address_of_the_client(nginx, service):
    register(nginx, address="192.0.2.1")
    wait_until(lambda: service.has_logged("network=192.0.2.1\n"), 5)


def test_a_forged_address_does_not_reach_the_service(nginx, service):
    _, tokens = register(nginx, address="192.0.2.2", **{"X-Forwarded-For": FORGED_ADDRESS})
    wait_until(lambda: service.has_logged(tokens["user_id"]), 5)
    assert not service.has_logged(FORGED_ADDRESS)


def test_the_interactive_documentation_works(nginx):
    docs = nginx.request("/docs")
    assert docs.status == 200
    [url] = re.findall(r"url: '(.*)'", docs.body)
    paths = json.loads(nginx.request(url).body)["paths"]
    assert "/auth/login" in paths


def test_a_redirect_uses_https_and_the_name_of_the_server(nginx):
    response = nginx.request("/auth/me/")
    assert response.status == 307
    assert response.headers["location"] == f"https://{NAME}/auth/me"


@pytest.mark.parametrize("route", ["login", "register"])
def test_too_many_requests_get_a_429_with_retry_after(nginx, route):
    for _ in range(LIMIT):
        assert nginx.request(f"/auth/{route}", {}, address="192.0.2.3").status == 422
    response = nginx.request(f"/auth/{route}", {}, address="192.0.2.3")
    assert (response.status, response.headers["retry-after"]) == (429, "3")


def test_the_limit_is_one_for_login_and_registration(nginx):
    nginx.reach_limit("192.0.2.4")
    assert nginx.request("/auth/register", {}, address="192.0.2.4").status == 429


def test_the_limit_does_not_affect_another_address(nginx):
    nginx.reach_limit("192.0.2.5")
    assert nginx.request("/auth/login", {}, address="192.0.2.6").status == 422


def test_the_limit_does_not_affect_other_routes(nginx):
    nginx.reach_limit("192.0.2.7")
    assert nginx.request("/auth/me", address="192.0.2.7").status == 401
    assert nginx.request("/auth/refresh", {}, address="192.0.2.7").status == 422


def test_addresses_of_one_ipv6_64_network_share_the_limit(nginx):
    # Bytes of these addresses are newlines and zeros.
    nginx.reach_limit("2001:db8:0:a0a::a0a")
    assert nginx.request("/auth/login", {}, address="2001:db8:0:a0a:1:2:3:4").status == 429
    assert nginx.request("/auth/login", {}, address="2001:db8:0:a0b::a0a").status == 422


def test_a_preflight_request_does_not_count(nginx):
    headers = {
        "Origin": FRONT_END,
        "Access-Control-Request-Method": "POST",
    }
    preflight = functools.partial(
        nginx.request, "/auth/login", None, "-X", "OPTIONS", address="192.0.2.8", **headers
    )
    assert {preflight().status for _ in range(LIMIT)} == {200}
    nginx.reach_limit("192.0.2.8")
    assert preflight().status == 200


def test_a_429_of_the_service_keeps_its_body_and_retry_after(nginx):
    credentials, _ = register(nginx, address="192.0.2.9")
    wrong = credentials | {"password": "Wr0ng@password"}
    for _ in range(5):
        assert nginx.request("/auth/login", wrong, address="192.0.2.9").status == 401
    response = nginx.request("/auth/login", wrong, address="192.0.2.9")
    assert (response.status, json.loads(response.body)["detail"][:8]) == (429, "Too many")
    # nginx would have sent 3.
    assert int(response.headers["retry-after"]) > 10


def send_body(nginx, folder, size):
    """Return the status of the response to a body of this size."""
    # As a file, because an argument has a maximum length.
    (folder / "body.json").write_text("a" * size)
    return nginx.request("/auth/refresh", None, "--data-binary", f"@{folder / 'body.json'}").status


def test_the_service_receives_a_body_of_8_kib(nginx, tmp_path):
    assert send_body(nginx, tmp_path, 8 * 1024) == 422


@pytest.mark.parametrize("size", [8 * 1024 + 1, 900_000])
def test_a_larger_body_always_gets_a_413(nginx, tmp_path, size):
    # If nginx sent it to the service, which responds early, some responses would be a 502.
    assert {send_body(nginx, tmp_path, size) for _ in range(5)} == {413}


def test_the_documentation_works_under_a_path_prefix(tmp_path, certificate):
    [location] = re.findall(r"`(location /accounts/ \{ .* \})`", README)
    service = Service("", "--root-path", "/accounts")
    block = re.sub(r"location / \{.*?\}", location, read_nginx_block(), count=1, flags=re.DOTALL)
    nginx = Nginx(tmp_path, certificate, f"http://127.0.0.1:{service.port}", block)
    try:
        docs = nginx.request("/accounts/docs")
        [url] = re.findall(r"url: '(.*)'", docs.body)
        assert url == "/accounts/openapi.json"
        document = json.loads(nginx.request(url).body)
        assert document["servers"] == [{"url": "/accounts"}]
        assert nginx.request("/accounts/auth/me").status == 401
    finally:
        nginx.stop()
        service.stop()


@pytest.mark.parametrize(
    ("options", "network"),
    [([], "unknown"), (["--forwarded-allow-ips", "*"], "192.0.2.10")],
    ids=["no trusted proxy", "all proxies are trusted"],
)
def test_the_network_of_a_client_behind_a_unix_socket(tmp_path, certificate, options, network):
    socket = tmp_path / "socket"
    process = start_command("", "-m", "uvicorn", "app:app", "--uds", str(socket), *options)
    lines = []
    threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
    nginx = Nginx(tmp_path, certificate, f"http://unix:{socket}")
    try:
        wait_until(socket.exists, 30)
        register(nginx, address="192.0.2.10", **{"X-Forwarded-For": FORGED_ADDRESS})
        wait_until(lambda: f"network={network}\n" in "".join(lines), 5)
    finally:
        nginx.stop()
        process.terminate()
        process.wait(15)
