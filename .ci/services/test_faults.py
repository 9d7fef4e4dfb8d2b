"""Tests of a service whose MongoDB is killed, frozen, hanging, failing or not a MongoDB."""

import socketserver
import threading

import pytest
from helpers import (
    TIMEOUT,
    Mongod,
    Service,
    new_email,
    repeat,
    send_at_once,
    start_sessions,
    statuses_of,
    wait_until,
)

FAULTS = {"kill": "start", "freeze": "resume", "hang": "stop_hanging"}


def test_an_acknowledged_registration_survives_kill_9_of_mongod(tmp_path, request):
    # By itself, MongoDB writes its journal twice a second.
    mongod = Mongod(tmp_path / "data", "--journalCommitInterval", "500")
    request.addfinalizer(mongod.kill)
    service = Service(mongod.uri)
    emails = [new_email(), new_email()]
    for email in emails:
        assert service.register(email).status == 201
    mongod.kill()
    mongod.start()
    wait_until(lambda: service.login(emails[-1]).status == 200, 60)
    service.stop()


@pytest.mark.parametrize(("fault", "repair"), FAULTS.items(), ids=FAULTS.keys())
def test_requests_are_503_during_an_outage_and_work_after_it(mongod, service, fault, repair):
    token = service.register(new_email()).body["access_token"]
    with repeat(50, lambda _: service.me(token)) as responses:
        # The fault hits queries that are running.
        wait_until(lambda: len(responses) > 50, 60)
        getattr(mongod, fault)()
        wait_until(lambda: statuses_of(responses).count(503) > 50, 60)
        getattr(mongod, repair)()
        wait_until(lambda: set(statuses_of(responses[-50:])) == {200}, 60)
    assert set(statuses_of(responses)) == {200, 503}
    service.stop()
    assert service.log.count("MongoDB is not responding") == 1
    assert service.log.count("MongoDB is responding again") == 1


def test_requests_that_need_no_database_do_not_wait_in_an_outage(mongod, service):
    token = service.register(new_email()).body["access_token"]
    # Five times as many clients as there are threads.
    with repeat(200, lambda _: service.me(token)) as responses:
        mongod.freeze()
        wait_until(lambda: 503 in statuses_of(responses), 60)
        others = [service.me("malformed") for _ in range(5)]
        mongod.resume()
    assert set(statuses_of(others)) == {401}
    slowest = max(response.seconds for response in others)
    print(f"The slowest response took {slowest:.2f} s")
    # If each of the 200 requests waited for its own query, the queue would take five times as long.
    assert slowest < TIMEOUT


def test_the_liveness_probe_needs_neither_the_database_nor_a_thread(mongod, service):
    token = service.register(new_email()).body["access_token"]
    mongod.freeze()
    probes = []
    # More than there are threads, and each waits for MongoDB.
    with repeat(50, lambda _: service.me(token)) as responses:
        while not responses:
            probes.append(service.request("GET", "/openapi.json"))
    assert set(statuses_of(probes)) == {200}
    slowest = max(response.seconds for response in probes)
    print(f"The slowest of {len(probes)} responses to the probe took {slowest:.2f} s")
    # A probe that needed a thread would wait until the first request is given up.
    assert slowest < TIMEOUT / 2


def test_an_outage_ends_no_session_of_clients_that_obey_retry_after(mongod, service):
    refresh = start_sessions(service, 10)
    with repeat(10, refresh) as responses:
        wait_until(lambda: len(responses) > 20, 60)
        mongod.freeze()
        wait_until(lambda: statuses_of(responses).count(503) >= 10, 60)
        mongod.resume()
        wait_until(lambda: set(statuses_of(responses[-10:])) == {200}, 60)
    assert set(statuses_of(responses)) == {200, 503}
    assert set(statuses_of(send_at_once(10, refresh))) == {200}
    service.stop()
    assert "authn_token_reuse_in_grace" in service.log
    assert "authn_token_reuse " not in service.log


def test_a_dropped_connection_is_no_outage_while_others_work(mongod, service):
    # The driver does not repeat a refresh by itself.
    with repeat(10, start_sessions(service, 10)) as responses:
        for _ in range(5):
            wait_for_ten_responses(responses)
            dropped = mongod.set_fail_point({"times": 1}, closeConnection=True)
            mongod.wait_for_fail_point(dropped + 1)
        wait_for_ten_responses(responses)
    assert statuses_of(responses).count(503) == 5
    assert set(statuses_of(responses)) == {200, 503}
    service.stop()
    assert "MongoDB is not responding" not in service.log


def wait_for_ten_responses(responses):
    number = len(responses)
    wait_until(lambda: statuses_of(responses[number:]).count(200) >= 10, 60)


class HttpHandler(socketserver.BaseRequestHandler):
    """Sends the response of a web server to everything."""

    def handle(self):
        self.request.recv(4096)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def test_a_server_that_is_not_mongodb_is_an_outage(tmp_path, request):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), HttpHandler) as web_server:
        port = web_server.server_address[1]
        threading.Thread(target=web_server.serve_forever, daemon=True).start()
        service = Service(f"mongodb://127.0.0.1:{port}")
        assert service.register(new_email()).status == 503
        web_server.shutdown()
    mongod = Mongod(tmp_path / "late", port=port)
    request.addfinalizer(mongod.kill)
    wait_until(lambda: service.register(new_email()).status == 201, 60)
    service.stop()


def test_an_error_of_mongodb_that_no_retry_cures_is_500(restricted_mongod):
    server, admin = restricted_mongod
    admin.faults.command("createUser", "writer", pwd="s3cret", roles=["readWrite"])
    service = Service(f"mongodb://writer:s3cret@127.0.0.1:{server.port}/faults")
    email, other_email = new_email(), new_email()
    token = service.register(email).body["access_token"]
    service.register(other_email)
    admin.faults.users.update_one({"email": other_email}, {"$set": {"refresh_tokens": "text"}})
    assert service.login(other_email)[:2] == (500, {"detail": "Internal server error"})
    assert service.login(email).status == 200
    admin.faults.command("updateUser", "writer", roles=["read"])
    assert service.login(email)[:2] == (500, {"detail": "Internal server error"})
    assert service.register(new_email()).status == 500
    assert service.me(token).status == 200
    service.stop()
    assert "MongoDB returned an error: WriteError" in service.log
    assert "MongoDB returned an error: Unauthorized" in service.log
    assert "is not responding" not in service.log
    assert email not in service.log
    assert other_email not in service.log
