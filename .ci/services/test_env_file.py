"""Tests of a service that reads its settings from .env."""

import os
import signal
import threading
import time

import jwt
import pytest
from helpers import TWO_WORKERS, Service, copy_modules, new_email

HOST = """
import sys
import uvicorn
from fastapi import FastAPI
from app import router

app = FastAPI()
app.include_router(router)

if __name__ == "__main__":
    uvicorn.run("main:app", port=int(sys.argv[2]), access_log=False, OPTION)
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with a copy of the service, in which the tests write a .env."""
    copy_modules(tmp_path)
    return tmp_path


def set_lifetime(folder, minutes):
    (folder / ".env").write_text(f"ACCESS_TOKEN_EXPIRE_MINUTES={minutes}\n")


def read_lifetime(service):
    """Return the minutes until a new access token expires."""
    token = service.register(new_email()).body["access_token"]
    claims = jwt.decode(token, options={"verify_signature": False})
    return round((claims["exp"] - time.time()) / 60)


def restart_workers(service):
    service.process.send_signal(signal.SIGHUP)
    service.wait_for_log("Finished server process", 2)


def test_workers_read_a_changed_env_file_after_a_restart(folder):
    set_lifetime(folder, 60)
    service = Service(None, *TWO_WORKERS, folder=folder)
    service.wait_for_log("startup complete", 2)
    assert read_lifetime(service) == 60
    set_lifetime(folder, 120)
    restart_workers(service)
    assert read_lifetime(service) == 120
    service.stop()


def test_workers_of_a_host_that_imports_the_service_read_a_changed_env_file(folder):
    set_lifetime(folder, 60)
    (folder / "main.py").write_text(
        HOST.replace("OPTION", "workers=2, timeout_worker_healthcheck=20")
    )
    service = Service(None, script="main.py", folder=folder)
    service.wait_for_log("startup complete", 2)
    assert read_lifetime(service) == 60
    set_lifetime(folder, 120)
    restart_workers(service)
    assert read_lifetime(service) == 120
    service.stop()


def test_a_host_that_is_reloaded_reads_a_changed_env_file(folder):
    set_lifetime(folder, 60)
    (folder / "main.py").write_text(HOST.replace("OPTION", "reload=True"))
    service = Service(None, script="main.py", folder=folder)
    service.wait_for_log("startup complete")
    assert read_lifetime(service) == 60
    set_lifetime(folder, 120)
    # uvicorn only watches Python files.
    (folder / "main.py").touch()
    service.wait_for_log("startup complete", 2)
    assert read_lifetime(service) == 120
    service.stop()


def test_workers_continue_if_the_new_settings_are_invalid(folder):
    set_lifetime(folder, 60)
    service = Service(None, *TWO_WORKERS, folder=folder)
    service.wait_for_log("startup complete", 2)
    set_lifetime(folder, "never")
    service.process.send_signal(signal.SIGHUP)
    service.wait_for_log("auth-jwt cannot start: ACCESS_TOKEN_EXPIRE_MINUTES ")
    service.wait_for_log("aborting the restart")
    assert "Finished server process" not in service.log
    assert {read_lifetime(service) for _ in range(4)} == {60}
    service.stop()


def test_a_named_pipe_can_be_the_env_file(mongod, users, folder):
    pipe = folder / ".env"
    os.mkfifo(pipe)
    settings = f"MONGO_URI={mongod.uri}\nMONGO_DB_NAME=faults\nJWT_SECRET_KEY={'k' * 32}\n"
    # Opening the pipe waits for the service.
    threading.Thread(target=pipe.write_text, args=[settings], daemon=True).start()
    service = Service(None, folder=folder)
    email = new_email()
    assert service.register(email).status == 201
    assert users.count_documents({"email": email}) == 1
    service.stop()
