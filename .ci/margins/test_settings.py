"""Tests of settings, .env files, connection strings, logging and the start of app.py."""

import logging
import os
import re
import runpy
import threading
import traceback
import warnings
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import jwt
import pytest
import uvicorn
from fastapi.testclient import TestClient
from helpers import ROOT
from pymongo import ReadPreference
from pymongo.read_concern import ReadConcern

import app
import db

MONGO_URI = "mongodb://127.0.0.1:9"  # No server listens on this port.


def load(module, monkeypatch, **settings):
    """Return the names that the module defines when it is loaded with these settings."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return runpy.run_path(str(module))


def start_error(module, monkeypatch, capsys, **settings):
    """Return the line that the module prints when its start fails with these settings."""
    with pytest.raises(SystemExit) as stopped:
        load(module, monkeypatch, **settings)
    assert stopped.value.code == 3
    printed = capsys.readouterr().err
    assert printed.startswith("auth-jwt cannot start: ")
    assert printed.count("\n") == 1
    assert "s3cret" not in printed
    return printed


def test_the_traceback_of_a_failed_start_contains_no_earlier_error():
    with pytest.raises(SystemExit) as stopped:
        try:
            int("s3cret")
        except ValueError:
            db.abort_startup("MONGO_URI is invalid.")
    assert "ValueError" not in "".join(traceback.format_exception(stopped.value))


def test_a_setting_of_white_space_counts_as_not_set(monkeypatch):
    module = load(ROOT / "db.py", monkeypatch, MONGO_DB_NAME=" \n", MONGO_URI="\n")
    assert (module["MONGO_DB_NAME"], module["MONGO_URI"]) == ("auth_db", "")


# Key


@pytest.fixture
def with_mongodb(monkeypatch):
    """Let auth.py require a key."""
    monkeypatch.setattr(db, "MONGO_URI", MONGO_URI)


@pytest.mark.parametrize("key", ["s" * 31, " " + "s" * 31 + "\n", "ß" * 15])
def test_a_key_under_32_bytes_prevents_the_start(with_mongodb, monkeypatch, capsys, key):
    printed = start_error(ROOT / "auth.py", monkeypatch, capsys, JWT_SECRET_KEY=key)
    assert printed == "auth-jwt cannot start: JWT_SECRET_KEY must have at least 32 bytes.\n"


@pytest.mark.parametrize("key", ["ssh-rsa " + "s" * 32, '{"kty": "oct", "k": "AAECAwQFBgcICQ"}'])
def test_a_key_in_another_format_prevents_the_start(with_mongodb, monkeypatch, key):
    with pytest.raises(jwt.InvalidKeyError):
        load(ROOT / "auth.py", monkeypatch, JWT_SECRET_KEY=key)


@pytest.mark.parametrize("key", ["s" * 32, "ß" * 16])
def test_any_key_of_32_bytes_or_more_is_used(with_mongodb, monkeypatch, key):
    module = load(ROOT / "auth.py", monkeypatch, JWT_SECRET_KEY=key)
    assert module["SECRET_KEY"] == key.encode()


# Lifetimes


@pytest.mark.parametrize("name", ["ACCESS_TOKEN_EXPIRE_MINUTES", "REFRESH_TOKEN_EXPIRE_DAYS"])
@pytest.mark.parametrize("value", ["-1", "0.5", "1e3", "100000", "١", "²"])
def test_a_lifetime_that_is_no_whole_number_from_1_to_99999_prevents_the_start(
    monkeypatch, capsys, name, value
):
    printed = start_error(ROOT / "auth.py", monkeypatch, capsys, **{name: value})
    assert printed == f"auth-jwt cannot start: {name} must be a whole number from 1 to 99999.\n"


@pytest.mark.parametrize(("minutes", "days"), [("1", "1"), ("99999", "99999")])
def test_the_shortest_and_the_longest_lifetime_work(monkeypatch, minutes, days):
    lifetimes = {"ACCESS_TOKEN_EXPIRE_MINUTES": minutes, "REFRESH_TOKEN_EXPIRE_DAYS": days}
    module = load(ROOT / "auth.py", monkeypatch, **lifetimes)
    assert module["ACCESS_TOKEN_LIFETIME"] == timedelta(minutes=int(minutes))
    assert module["REFRESH_TOKEN_LIFETIME"] == timedelta(days=int(days))
    tokens = module["create_tokens"]("0" * 24, module["new_session"]())
    assert module["read_token"](tokens.access_token, "access").type == "access"
    assert module["read_token"](tokens.refresh_token, "refresh").type == "refresh"


# CORS


@pytest.mark.parametrize("origin", ["myapp2://localhost", "com.example.app://localhost", "null"])
def test_any_origin_can_be_allowed(cheap_hasher, monkeypatch, origin):
    standalone_app = load(ROOT / "app.py", monkeypatch, CORS_ORIGINS=origin)["app"]
    response = TestClient(standalone_app).get("/auth/me", headers={"Origin": origin})
    assert response.headers["Access-Control-Allow-Origin"] == origin


# Connection strings

# Regression table: PyMongo raises an error for the first ones, and warns about the others.
BAD_URIS = [
    "http://127.0.0.1/s3cret",
    "mongodb://127.0.0.1/?tls=true&tlsCAFile=s3cret",
    "mongodb://127.0.0.1/?datetime_conversion=s3cret",
    "mongodb+srv://db.example.org/?tlss=s3cret",
    "mongodb://127.0.0.1/?maxPoolSize=s3cret",
    "mongodb://127.0.0.1/?tls=s3cret",
    "mongodb://127.0.0.1/?authMechanism=s3cret",
]


@pytest.mark.parametrize("uri", BAD_URIS)
def test_an_invalid_mongo_uri_prevents_the_start(monkeypatch, capsys, uri):
    assert "MONGO_URI" in start_error(ROOT / "db.py", monkeypatch, capsys, MONGO_URI=uri)


@pytest.mark.parametrize("action", ["error", "ignore"])
def test_an_unknown_option_prevents_the_start_with_any_filter_for_warnings(
    monkeypatch, capsys, action
):
    with warnings.catch_warnings(action=action):
        uri = f"{MONGO_URI}/?tlss=true"
        printed = start_error(ROOT / "db.py", monkeypatch, capsys, MONGO_URI=uri)
    expected = "MONGO_URI has an unknown option or an invalid option value."
    assert printed == f"auth-jwt cannot start: {expected}\n"


def test_the_reason_contains_the_name_of_the_error(monkeypatch, capsys):
    uri = "mongodb://alice:s3cret@@127.0.0.1"
    printed = start_error(ROOT / "db.py", monkeypatch, capsys, MONGO_URI=uri)
    assert printed == "auth-jwt cannot start: MONGO_URI or MONGO_DB_NAME is invalid (InvalidURI).\n"


def load_collection(monkeypatch, uri):
    collection = load(ROOT / "db.py", monkeypatch, MONGO_URI=uri)["users"]
    collection.database.client.close()
    return collection


def test_options_in_mongo_uri_do_not_weaken_queries(monkeypatch):
    options = "w=0&journal=false&readPreference=secondary&readConcernLevel=available"
    timeouts = "timeoutMS=99999&connectTimeoutMS=99999"
    collection = load_collection(monkeypatch, f"{MONGO_URI}/?{options}&{timeouts}")
    assert collection.write_concern.document == {"w": "majority", "j": True}
    assert collection.read_preference == ReadPreference.PRIMARY
    assert collection.read_concern == ReadConcern()
    options = collection.database.client.options
    assert (options.timeout, options.pool_options.connect_timeout) == (2.5, 2.5)


# Regression table: the forms of hosting providers, and options about which PyMongo only warns.
GOOD_URIS = [
    "mongodb://u:p@c.cluster-1.eu-west-1.docdb.amazonaws.com:27017/?tls=true&replicaSet=rs0"
    "&readPreference=secondaryPreferred&retryWrites=false",
    "mongodb://a:k%3D%3D@a.mongo.cosmos.azure.com:10255/?ssl=true&replicaSet=globaldb"
    "&retrywrites=false&maxIdleTimeMS=120000&appName=@a@",
    "mongodb+srv://u:p@c.example.mongodb.net/?retryWrites=true&w=majority&appName=Cluster0",
    f"{MONGO_URI}/?compressors=snappy,zstd,zlib,unknown",
    f"{MONGO_URI}/?retryWrites=true&retryWrites=true",
]


@pytest.mark.parametrize("uri", GOOD_URIS)
def test_a_harmless_warning_of_pymongo_never_prevents_the_start(monkeypatch, uri):
    with warnings.catch_warnings(record=True, action="error"):
        assert load_collection(monkeypatch, uri).name == "users"


def test_the_filters_for_warnings_are_not_changed(monkeypatch):
    before = list(warnings.filters)
    load_collection(monkeypatch, MONGO_URI)
    assert warnings.filters == before


# .env files


@pytest.fixture
def module_copy(tmp_path, monkeypatch):
    """A copy of db.py in a package, beside which the tests write a .env with MONGO_DB_NAME."""
    copy = tmp_path / "accounts" / "db.py"
    copy.parent.mkdir()
    copy.write_bytes((ROOT / "db.py").read_bytes())
    monkeypatch.delenv("MONGO_DB_NAME")
    return copy


@pytest.fixture
def env_file(module_copy):
    return module_copy.parent / ".env"


@pytest.mark.parametrize("value", ["from_environment", ""])
def test_a_variable_in_the_environment_takes_precedence_even_if_it_is_empty(
    module_copy, env_file, monkeypatch, value
):
    env_file.write_text("MONGO_DB_NAME=from_file")
    module = load(module_copy, monkeypatch, MONGO_DB_NAME=value)
    assert module["MONGO_DB_NAME"] == (value or "auth_db")


def test_an_env_file_does_not_change_the_environment(module_copy, env_file):
    env_file.write_text("MONGO_DB_NAME=from_file\nWEB_CONCURRENCY=2\n")
    before = dict(os.environ)
    assert runpy.run_path(str(module_copy))["MONGO_DB_NAME"] == "from_file"
    assert dict(os.environ) == before


def test_an_env_file_can_begin_with_a_byte_order_mark(module_copy, env_file):
    env_file.write_text("MONGO_DB_NAME=from_file", encoding="utf-8-sig")
    assert runpy.run_path(str(module_copy))["MONGO_DB_NAME"] == "from_file"


def test_an_env_file_can_contain_comments_exports_and_empty_values(module_copy, env_file):
    env_file.write_text("# a comment\n\nMONGO_URI=\nJWT_SECRET_KEY\nexport MONGO_DB_NAME=from_file")
    assert runpy.run_path(str(module_copy))["MONGO_DB_NAME"] == "from_file"


MALFORMED_LINES = {
    "a colon": "MONGO_URI: mongodb://s3cret",
    "a space": "# comment\n\nMONGO_DB_NAME=x\nMONGO_URI mongodb://s3cret\n",
    "an unclosed quote": 'JWT_SECRET_KEY="s3cret\nMONGO_URI=mongodb://s3cret',
}


@pytest.mark.parametrize("text", MALFORMED_LINES.values(), ids=MALFORMED_LINES.keys())
def test_a_malformed_line_prevents_the_start(
    module_copy, env_file, monkeypatch, capsys, caplog, text
):
    env_file.write_text(text)
    printed = start_error(module_copy, monkeypatch, capsys)
    expected = f"{env_file} must consist of lines of the form NAME=value."
    assert printed == f"auth-jwt cannot start: {expected}\n"
    assert caplog.text == ""


def test_a_named_pipe_is_read_once(module_copy, env_file):
    os.mkfifo(env_file)
    names = []

    def read():
        names.append(runpy.run_path(str(module_copy))["MONGO_DB_NAME"])

    # Both ends of a pipe wait for each other, a second reader forever.
    write = partial(env_file.write_text, "MONGO_DB_NAME=from_pipe")
    writer, reader = [threading.Thread(target=end, daemon=True) for end in (write, read)]
    writer.start()
    reader.start()
    reader.join(10)
    assert names == ["from_pipe"]


def test_a_folder_named_env_is_passed_over(module_copy, env_file, tmp_path):
    env_file.mkdir()
    (tmp_path / ".env").write_text("MONGO_DB_NAME=from_file")
    assert runpy.run_path(str(module_copy))["MONGO_DB_NAME"] == "from_file"


def test_a_dangling_link_prevents_the_start(module_copy, env_file, tmp_path):
    (tmp_path / ".env").write_text("MONGO_DB_NAME=from_file")
    env_file.symlink_to("missing")
    with pytest.raises(FileNotFoundError, match=str(env_file)):
        runpy.run_path(str(module_copy))


def test_an_unreadable_env_file_prevents_the_start(module_copy, env_file):
    env_file.touch(mode=0)
    if os.access(env_file, os.R_OK):
        pytest.skip("root can read every file")
    with pytest.raises(PermissionError, match=str(env_file)):
        runpy.run_path(str(module_copy))


def test_an_env_file_in_the_working_directory_is_ignored(module_copy, tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("MONGO_DB_NAME=from_file")
    working_directory = tmp_path / "elsewhere"
    working_directory.mkdir()
    (working_directory / ".env").write_text("MONGO_DB_NAME=from_the_wrong_file")
    monkeypatch.chdir(working_directory)
    assert runpy.run_path(str(module_copy))["MONGO_DB_NAME"] == "from_file"


# Logging


@contextmanager
def root_handlers(monkeypatch, handlers):
    """Give the root logger these handlers instead of pytest's."""
    level = logging.root.level
    with monkeypatch.context() as patch:
        patch.setattr(logging.root, "handlers", handlers)
        yield
    logging.root.setLevel(level)


def test_the_standalone_application_logs_its_start_with_time_and_level(
    cheap_hasher, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(db, "ENV_FILE", tmp_path / ".env")
    with root_handlers(monkeypatch, []), TestClient(app.app):
        printed = capsys.readouterr().err
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    assert re.match(rf"{time} INFO Settings .* {tmp_path}/\.env\.\n", printed)


def test_logging_that_is_configured_already_is_not_changed(cheap_hasher, monkeypatch):
    handler, level = logging.NullHandler(), logging.root.level
    with root_handlers(monkeypatch, [handler]), TestClient(app.app):
        assert logging.root.handlers == [handler]
        assert logging.root.level == level


def test_a_host_that_includes_the_router_keeps_its_logging(host, monkeypatch):
    with root_handlers(monkeypatch, []), TestClient(host):
        assert logging.root.handlers == []


# python app.py


@pytest.fixture
def run_app_py(monkeypatch):
    """A function that runs app.py as a script. Returns the configuration of its server."""
    configurations = []

    def run(server):
        configurations.append(server.config)
        server.started = True

    def run_app_py():
        runpy.run_path(str(ROOT / "app.py"), run_name="__main__")
        return configurations.pop()

    # uvicorn would configure its loggers for the other tests, too.
    monkeypatch.setattr(uvicorn.Config, "configure_logging", lambda config: None)
    monkeypatch.setattr(uvicorn.Server, "run", run)
    return run_app_py


def test_app_py_serves_on_port_5000_and_ends_before_docker_kills_it(run_app_py, capsys):
    server = run_app_py()
    assert (server.host, server.port) == ("127.0.0.1", 5000)
    assert 5 < server.timeout_graceful_shutdown < 10
    assert capsys.readouterr().out == ""


def test_app_py_starts_one_worker_although_a_platform_sets_web_concurrency(run_app_py, monkeypatch):
    monkeypatch.setenv("WEB_CONCURRENCY", "2")
    assert run_app_py().workers == 1
