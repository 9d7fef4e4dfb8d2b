"""Tests of nginx.conf and nginx-prefix.conf in a real nginx, in front of a service in memory.

The programs nginx, curl and openssl are required.
"""

import functools
import json
import re
import socket
import ssl
import subprocess
import threading
from typing import NamedTuple

import pytest
from helpers import (
    PASSWORD,
    ROOT,
    Service,
    free_port,
    listens,
    new_email,
    start_command,
    wait_until,
)
from websockets.sync.client import connect

FRONT_END = "https://front.example.com"
FORGED_ADDRESS = "203.0.113.66"
# The files allow this many requests at once.
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
    set_real_ip_from ::1;
    real_ip_header X-Test-Address;
    {text}
}}
"""

# An application that includes the router.
HOST = """
from fastapi import FastAPI, Request, WebSocket

from app import router

app = FastAPI()
app.include_router(router)


@app.post("/upload")
async def upload(request: Request):
    return len(await request.body())


@app.websocket("/echo")
async def echo(websocket: WebSocket):
    await websocket.accept()
    await websocket.send_text(await websocket.receive_text())
"""


class Site(NamedTuple):
    """One of the two files, and what it says."""

    file: str
    name: str
    prefix: str

    @property
    def options(self):
        """The options of uvicorn."""
        return ["--root-path", self.prefix] if self.prefix else []


SITES = [
    Site("nginx.conf", "auth.example.com", ""),
    Site("nginx-prefix.conf", "www.example.com", "/accounts"),
]


def replace(text, old, new, count=1):
    """Return the text with the new string, after a check of how often the old one occurs."""
    assert text.count(old) == count
    return text.replace(old, new)


def uncomment(text, beginning):
    """Return the text with the commented directives that begin with this."""
    text, count = re.subn(rf"^( *)#({re.escape(beginning)})", r"\1\2", text, flags=re.MULTILINE)
    assert count
    return text


def has_http2_directive():
    version = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=True).stderr
    return tuple(map(int, re.search(r"nginx/(\d+)\.(\d+)\.(\d+)", version).groups())) >= (1, 25, 1)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The path of a self-signed certificate and its key, without their suffixes."""
    path = tmp_path_factory.mktemp("certificate") / "test"
    names = ",".join(f"DNS:{site.name}" for site in SITES)
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=test", "-addext", f"subjectAltName={names}"]
    command += ["-keyout", f"{path}.key", "-out", f"{path}.crt"]
    subprocess.run(command, check=True, capture_output=True)
    return path


class Response(NamedTuple):
    status: int
    version: str
    headers: dict
    body: str


class Nginx:
    """An nginx with one of the files, free ports and another address of the service."""

    def __init__(self, folder, certificate, site, upstream, *uncommented):
        self.certificate = certificate
        self.site = site
        self.port = free_port()
        self.plain_port = free_port()
        self.root = folder / "html"
        self.root.mkdir()
        text = (ROOT / ".github/docs" / site.file).read_text()
        for directive in uncommented:
            text = uncomment(text, directive)
        # The rate would let another request pass every three seconds.
        text = replace(text, "rate=20r/m", "rate=1r/m")
        text = replace(text, "http://127.0.0.1:5000", upstream, 3)
        text = replace(text, f"/etc/ssl/{site.name}", str(certificate), 2)
        text = re.sub("root /var/www/html;", f"root {self.root};", text)
        text = replace(text, "listen 80;", f"listen 127.0.0.1:{self.plain_port};")
        text = replace(text, "listen [::]:80;", f"listen [::1]:{self.plain_port};")
        text = replace(text, "listen 443 ssl;", f"listen 127.0.0.1:{self.port} ssl;")
        text = replace(text, "listen [::]:443 ssl;", f"listen [::1]:{self.port} ssl;")
        if not has_http2_directive():
            # As the first lines of the file say.
            text = replace(text, "    http2 on;\n", "")
            text = replace(text, f":{self.port} ssl;", f":{self.port} ssl http2;", 2)
        text = text.replace("192.0.2.0/24", "127.0.0.0/8")
        config = folder / "nginx.conf"
        config.write_text(NGINX_CONF.format(text=text))
        self.process = subprocess.Popen(["nginx", "-p", f"{folder}/", "-c", config])
        wait_until(lambda: self.process.poll() is not None or listens(self.port), 10)
        assert self.process.poll() is None

    def curl(self, url, *options):
        command = ["curl", "-s", "-i", "-m", "20", "--cacert", f"{self.certificate}.crt"]
        for port in (self.port, self.plain_port):
            command += ["--resolve", f"{self.site.name}:{port}:127.0.0.1"]
        command += ["-w", " %{http_version}", *options, url]
        output = subprocess.check_output(command, text=True).replace("\r\n", "\n")
        text, version = output.rsplit(" ", 1)
        head, text = text.split("\n\n", 1)
        status_line, *lines = head.splitlines()
        fields = {line.split(": ")[0].lower(): line.split(": ", 1)[1] for line in lines}
        return Response(int(status_line.split()[1]), version, fields, text)

    def request(self, path, body=None, *options, address=None, token=None, **headers):
        """Send a request for a path of the service with HTTP/2."""
        headers |= {"Content-Type": "application/json"}
        if address:
            headers["X-Test-Address"] = address
        if token:
            headers["Authorization"] = f"Bearer {token}"
        for name, value in headers.items():
            options = ("-H", f"{name}: {value}", *options)
        if body is not None:
            options = ("-d", json.dumps(body), *options)
        url = f"https://{self.site.name}:{self.port}{self.site.prefix}{path}"
        return self.curl(url, "--http2", *options)

    def request_plainly(self, path):
        """Send a request for a path of the site without TLS."""
        return self.curl(f"http://{self.site.name}:{self.plain_port}{path}")

    def reach_limit(self, address):
        """Send as many logins from the address as nginx passes on at once."""
        for _ in range(LIMIT):
            # A body without a password is rejected without a hash.
            assert self.request("/auth/login", {}, address=address).status == 422

    def stop(self):
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture(scope="module", params=SITES, ids=lambda site: site.file)
def site(request):
    return request.param


@pytest.fixture(scope="module")
def service(site):
    """A service in memory, with a host's routes, for the tests that need no other options."""
    service = Service("", *site.options, CORS_ORIGINS=FRONT_END)
    yield service
    service.stop()


def url_of(service):
    return f"http://127.0.0.1:{service.port}"


@pytest.fixture
def nginx(tmp_path, certificate, site, service):
    # Each test has an nginx of its own, because the counters are in its memory.
    nginx = Nginx(tmp_path, certificate, site, url_of(service))
    yield nginx
    nginx.stop()


@pytest.fixture
def start_nginx(tmp_path, certificate, site, service):
    """A function that starts nginx with commented lines of the file."""
    started = []

    def start(*uncommented, upstream=None):
        upstream = upstream or url_of(service)
        started.append(Nginx(tmp_path, certificate, site, upstream, *uncommented))
        return started[0]

    yield start
    for nginx in started:
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


def test_ipv6_works(nginx, site):
    options = ("--connect-to", f"::[::1]:{nginx.port}", "-6")
    assert nginx.request("/auth/me", None, *options).status == 401


def test_an_offer_to_upgrade_to_http_2_does_not_lose_the_body(nginx):
    credentials, _ = register(nginx)
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAAA"}
    assert nginx.request("/auth/login", credentials, "--http1.1", **headers).status == 200


# Addresses


def test_the_log_contains_the_address_of_the_client(nginx, service):
    register(nginx, address="192.0.2.1")
    wait_until(lambda: "network=192.0.2.1\n" in service.log, 5)


def test_a_forged_address_does_not_reach_the_service(nginx, service):
    _, tokens = register(nginx, address="192.0.2.2", **{"X-Forwarded-For": FORGED_ADDRESS})
    wait_until(lambda: tokens["user_id"] in service.log, 5)
    assert FORGED_ADDRESS not in service.log


def test_the_address_of_a_client_behind_a_load_balancer_is_the_last_forwarded_one(
    start_nginx, service
):
    nginx = start_nginx("set_real_ip_from", "real_ip_header")
    forwarded = {"X-Forwarded-For": f"{FORGED_ADDRESS}, 198.51.100.1"}
    register(nginx, **forwarded)
    wait_until(lambda: "network=198.51.100.1\n" in service.log, 5)


@pytest.mark.parametrize("site", SITES[:1], ids=["nginx.conf"], indirect=True)
@pytest.mark.parametrize(
    ("options", "network"),
    [([], "unknown"), (["--forwarded-allow-ips", "*"], "192.0.2.10")],
    ids=["no trusted proxy", "all proxies are trusted"],
)
def test_the_network_of_a_client_behind_a_unix_socket(tmp_path, start_nginx, options, network):
    path = tmp_path / "socket"
    process = start_command("", "-m", "uvicorn", "app:app", "--uds", str(path), *options)
    lines = []
    threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
    nginx = start_nginx(upstream=f"http://unix:{path}")
    wait_until(path.exists, 30)
    register(nginx, address="192.0.2.10", **{"X-Forwarded-For": FORGED_ADDRESS})
    wait_until(lambda: f"network={network}\n" in "".join(lines), 5)
    process.terminate()
    process.wait(15)


# URLs


def test_the_interactive_documentation_works(nginx, site):
    [path] = re.findall(r"url: '(.*)'", nginx.request("/docs").body)
    assert path == f"{site.prefix}/openapi.json"
    document = json.loads(nginx.request(path.removeprefix(site.prefix)).body)
    assert "/auth/login" in document["paths"]
    assert document.get("servers", [{"url": ""}]) == [{"url": site.prefix}]


def test_a_redirect_uses_https_and_the_name_of_the_server(nginx, site):
    response = nginx.request("/auth/me/")
    assert response.status == 307
    assert response.headers["location"] == f"https://{site.name}{site.prefix}/auth/me"


def test_port_80_redirects_to_https(nginx, site):
    response = nginx.request_plainly("/page?a=b")
    assert response.status == 301
    assert response.headers["location"] == f"https://{site.name}/page?a=b"


def test_the_file_of_a_certificate_renewal_is_served_on_port_80(nginx):
    folder = nginx.root / ".well-known/acme-challenge"
    folder.mkdir(parents=True)
    (folder / "token").write_text("response")
    response = nginx.request_plainly("/.well-known/acme-challenge/token")
    assert (response.status, response.body) == (200, "response")


@pytest.mark.parametrize("site", SITES[1:], ids=["nginx-prefix.conf"], indirect=True)
def test_the_rest_of_the_site_is_served_beside_the_prefix(nginx, site):
    (nginx.root / "page.html").write_text("a page")
    response = nginx.curl(f"https://{site.name}:{nginx.port}/page.html")
    assert (response.status, response.body) == (200, "a page")


@pytest.mark.parametrize("path", ["/docs", "/%64ocs", "/redoc", "/openapi.json"])
def test_the_interactive_documentation_can_be_hidden(start_nginx, site, path):
    nginx = start_nginx(f"location ~ ^{site.prefix}/(?:docs")
    assert nginx.request(path).status == 404
    assert nginx.request("/auth/me").status == 401


# The limit


@pytest.mark.parametrize("route", ["login", "register"])
def test_too_many_requests_get_a_429_with_retry_after(nginx, route):
    for _ in range(LIMIT):
        assert nginx.request(f"/auth/{route}", {}, address="192.0.2.3").status == 422
    response = nginx.request(f"/auth/{route}", {}, address="192.0.2.3")
    assert (response.status, response.headers["retry-after"]) == (429, "3")


@pytest.mark.parametrize(
    "target",
    [
        "/auth/login?next=/",
        "/auth/%6cogin",
        "/auth%2flogin",
        # In a regular expression of nginx and of the service, $ matches before a final newline.
        "/auth/login%0a",
        "/auth/login%3f",
        "/auth/login#fragment",
        "/auth/%256cogin",
        "/auth/login/",
        "//auth/login",
        "/auth/./login",
        "/docs/..%2fauth/login",
        "/accounts/auth/login",
    ],
)
@pytest.mark.parametrize("form", ["{path}", "https://{name}{path}"], ids=["path", "URL"])
def test_each_target_that_reaches_the_login_is_limited(nginx, site, form, target):
    target = form.format(name=site.name, path=f"{site.prefix}{target}")
    options = ("--http1.1", "--request-target", target)
    nginx.reach_limit("2001:db8::1")
    is_limited = nginx.request("", {}, *options, address="2001:db8::1").status == 429
    # A login of another client gets a 422, because the body has no password.
    reaches_login = nginx.request("", {}, *options, address="192.0.2.11").status not in (307, 404)
    assert is_limited or not reaches_login


@pytest.mark.parametrize("path", ["/api/auth/login", "/session/login", "/session/register"])
def test_the_login_and_registration_of_an_application_are_limited(nginx, path):
    nginx.reach_limit("192.0.2.12")
    assert nginx.request(path, {}, address="192.0.2.12").status == 429


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


def test_addresses_of_one_ipv6_56_network_share_the_limit(nginx):
    # Bytes of these addresses are newlines and zeros.
    nginx.reach_limit("2001:db8:a:a0a::a0a")
    assert nginx.request("/auth/login", {}, address="2001:db8:a:aff:1:2:3:4").status == 429
    assert nginx.request("/auth/login", {}, address="2001:db8:a:b0a::a0a").status == 422


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


@pytest.mark.parametrize("site", SITES[:1], ids=["nginx.conf"], indirect=True)
def test_a_429_of_the_service_keeps_its_body_and_retry_after(nginx, service):
    credentials, _ = register(nginx, address="192.0.2.9")
    wrong = credentials | {"password": "Wr0ng@password"}
    # The service has a limit of 20, which nginx would not let pass.
    for _ in range(20):
        assert service.request("POST", "/auth/login", wrong).status == 401
    response = nginx.request("/auth/login", wrong)
    assert (response.status, json.loads(response.body)["detail"][:8]) == (429, "Too many")
    # nginx would have sent 3.
    assert int(response.headers["retry-after"]) > 10


def test_the_registration_can_be_closed(start_nginx, site, service):
    credentials = {"email": new_email(), "password": PASSWORD}
    assert service.request("POST", "/auth/register", credentials).status == 201
    nginx = start_nginx(f"location ~ ^{site.prefix}(?:/[^/]+)*/(?:auth|session)/register ")
    for path in ("/auth/register", "/auth/%72egister", "/auth/register?"):
        assert nginx.request(path, {}).status == 403
    assert nginx.request("/auth/login", credentials).status == 200


# Bodies, and an application that includes the router


def send_body(nginx, folder, path, size):
    """Return the response to a body of this size."""
    # As a file, because an argument has a maximum length.
    (folder / "body.json").write_text("a" * size)
    return nginx.request(path, None, "--data-binary", f"@{folder / 'body.json'}")


@pytest.mark.parametrize("path", ["/auth/refresh", "/auth/login"])
def test_the_service_receives_a_body_of_4_kib(nginx, tmp_path, path):
    assert send_body(nginx, tmp_path, path, 4 * 1024).status == 422


@pytest.mark.parametrize("size", [4 * 1024 + 1, 900_000])
@pytest.mark.parametrize("path", ["/auth/refresh", "/auth/login"])
def test_a_larger_body_always_gets_a_413(nginx, tmp_path, path, size):
    # If nginx sent it to the service, which responds early, some responses would be a 502.
    assert {send_body(nginx, tmp_path, path, size).status for _ in range(5)} == {413}


@pytest.fixture
def host_nginx(tmp_path, site, start_nginx):
    """nginx in front of an application that includes the router."""
    (tmp_path / "host.py").write_text(HOST)
    options = ["--app-dir", str(tmp_path), *site.options]
    service = Service("", *options, app="host:app", PYTHONPATH=str(ROOT))
    yield start_nginx(upstream=url_of(service))
    service.stop()


def test_a_host_receives_a_body_larger_than_4_kib_outside_of_auth(host_nginx, tmp_path):
    response = send_body(host_nginx, tmp_path, "/upload", 900_000)
    assert (response.status, response.body) == (200, "900000")
    assert send_body(host_nginx, tmp_path, "/auth/refresh", 5_000).status == 413


def test_a_websocket_of_a_host_works(host_nginx, certificate, site):
    tls = ssl.create_default_context(cafile=f"{certificate}.crt")
    with (
        socket.create_connection(("127.0.0.1", host_nginx.port), 10) as connection,
        connect(f"wss://{site.name}{site.prefix}/echo", ssl=tls, sock=connection) as websocket,
    ):
        websocket.send("hello")
        assert websocket.recv(timeout=10) == "hello"
