"""Tests of a service that is restarted, with another key or without downtime."""

import signal
import uuid

from helpers import TWO_WORKERS, Response, Service, copy_modules, new_email, repeat, statuses_of


def test_a_new_key_logs_everybody_out(mongod, service):
    email = new_email()
    tokens = service.register(email).body
    restarted = Service(mongod.uri, JWT_SECRET_KEY=uuid.uuid4().hex)
    assert restarted.me(tokens["access_token"]).status == 401
    assert restarted.refresh(tokens["refresh_token"]).status == 401
    assert restarted.login(email).status == 200
    restarted.stop()


def test_sighup_replaces_the_workers_without_downtime(workers):
    def request_me(_):
        try:
            return workers.me("malformed")
        except OSError:
            return Response(status=0, body={}, seconds=0, retry_after=0)

    with repeat(1, request_me) as responses:
        workers.process.send_signal(signal.SIGHUP)
        workers.wait_for_log("Finished server process", 2)
    statuses = statuses_of(responses)
    print(f"{statuses.count(401)} responses during a restart, {statuses.count(0)} failures")
    assert set(statuses) <= {401, 0}
    # A worker that stops closes a connection on which it has not received a request yet.
    number_of_workers = 2
    assert statuses.count(0) <= number_of_workers


def test_workers_have_changed_code_after_a_restart(tmp_path):
    copy_modules(tmp_path)
    service = Service("", *TWO_WORKERS, folder=tmp_path)
    service.wait_for_log("startup complete", 2)
    with (tmp_path / "app.py").open("a") as app:
        app.write('\nlogger.critical("new code")\n')
    service.process.send_signal(signal.SIGHUP)
    service.wait_for_log("Finished server process", 2)
    assert service.log.count("new code") == 2
    service.stop()
