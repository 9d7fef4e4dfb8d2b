"""Tests of settings, .env files, connection strings, logging and failed starts."""

import json
import logging
import os
import runpy
import subprocess
import sys
import warnings
from contextlib import contextmanager

import pytest
import uvicorn
from conftest import ROOT
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pymongo import ReadPreference
from pymongo.read_concern import ReadConcern

import app
import db
from test_app import ADDRESS, SETTINGS, login


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Undo what a copy of db.py loads from its own .env."""
    for name in SETTINGS:
        monkeypatch.setenv(name, os.environ[name])


def start_error(module, monkeypatch, capsys, **settings):
    """Return the line that the module prints when its start fails with these settings."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(module))
    assert stopped.value.code == 3
    printed = capsys.readouterr().err
    assert printed.startswith("auth-jwt cannot start: ")
    assert printed.count("\n") == 1
    assert "s3cret" not in printed
    return printed


# Keys, lifetimes and origins


@pytest.mark.parametrize(
    ("uri", "key"),
    [
        ("mongodb://127.0.0.1", ""),
        ("", "s3cret" * 8),
        ("mongodb://127.0.0.1", "s3cret-key-of-31-bytes-is-short"),
        ("mongodb://127.0.0.1", " s3cret-key-of-31-bytes-is-short\n"),
        ("mongodb://127.0.0.1", "ssh-rsa s3cret-key-s3cret-key-s3cret-key"),
        ("mongodb://127.0.0.1", json.dumps({"kty": "oct", "k": "s3cret" * 8})),
        ("mongodb://127.0.0.1", "s3cret" * 8 + os.fsdecode(b"\xff")),
    ],
)
def test_a_missing_or_unsuitable_key_prevents_startup(monkeypatch, capsys, uri, key):
    monkeypatch.setattr(db, "MONGO_URI", uri)
    printed = start_error(ROOT / "auth.py", monkeypatch, capsys, JWT_SECRET_KEY=key)
    assert "JWT_SECRET_KEY" in printed


def test_a_key_is_the_same_with_and_without_a_newline(monkeypatch):
    monkeypatch.setattr(db, "MONGO_URI", "mongodb://127.0.0.1")
    keys = set()
    for key in ("k" * 40, "k" * 40 + "\n", "\r\n\t " + "k" * 40 + " "):
        monkeypatch.setenv("JWT_SECRET_KEY", key)
        keys.add(runpy.run_path(str(ROOT / "auth.py"))["SECRET_KEY"])
    assert keys == {b"k" * 40}


def test_a_setting_of_white_space_counts_as_not_set(monkeypatch):
    monkeypatch.setenv("MONGO_DB_NAME", " \n")
    monkeypatch.setenv("MONGO_URI", "\n")
    module = runpy.run_path(str(ROOT / "db.py"))
    assert (module["MONGO_DB_NAME"], module["MONGO_URI"]) == ("auth_db", "")


@pytest.mark.parametrize("name", ["ACCESS_TOKEN_EXPIRE_MINUTES", "REFRESH_TOKEN_EXPIRE_DAYS"])
@pytest.mark.parametrize("value", ["soon", "0", "-1", "0.01", "1e3", "nan", "1000000", "١"])
def test_a_lifetime_that_is_not_a_positive_whole_number_prevents_startup(
    monkeypatch, capsys, name, value
):
    assert name in start_error(ROOT / "auth.py", monkeypatch, capsys, **{name: value})


def test_a_refresh_token_lifetime_above_the_limit_prevents_startup(monkeypatch, capsys):
    printed = start_error(ROOT / "auth.py", monkeypatch, capsys, REFRESH_TOKEN_EXPIRE_DAYS="100000")
    assert "REFRESH_TOKEN_EXPIRE_DAYS must be a whole number from 1 to 99999." in printed


@pytest.mark.parametrize(("minutes", "days"), [("1", "1"), ("999999", "99999"), (" 15\n", " 7\n")])
def test_the_shortest_and_the_longest_lifetime_work(monkeypatch, minutes, days):
    monkeypatch.setenv("ACCESS_TOKEN_EXPIRE_MINUTES", minutes)
    monkeypatch.setenv("REFRESH_TOKEN_EXPIRE_DAYS", days)
    module = runpy.run_path(str(ROOT / "auth.py"))
    tokens = module["create_tokens"]("0" * 24, module["create_session"]())
    assert module["read_token"](tokens.access_token, "access").type == "access"
    assert module["read_token"](tokens.refresh_token, "refresh").type == "refresh"


BAD_ORIGINS = [
    "*",
    "localhost:5173",
    "http://localhost:5173/",
    "http://localhost/x",
    "HTTP://A.COM",
    "a,,b",
    "http://a b",
    '["http://localhost:5173"]',
]


@pytest.mark.parametrize("origins", BAD_ORIGINS)
def test_a_malformed_cors_origin_prevents_the_start_of_the_application(
    monkeypatch, capsys, origins
):
    monkeypatch.setenv("CORS_ORIGINS", origins)
    configure_standalone = runpy.run_path(str(ROOT / "app.py"))["configure_standalone"]
    with pytest.raises(SystemExit) as stopped:
        configure_standalone()
    assert stopped.value.code == 3
    assert "CORS_ORIGINS" in capsys.readouterr().err


@pytest.mark.parametrize("origins", BAD_ORIGINS)
def test_a_host_that_includes_the_router_can_use_cors_origins_itself(monkeypatch, origins):
    monkeypatch.setenv("CORS_ORIGINS", origins)
    host = FastAPI()
    host.include_router(runpy.run_path(str(ROOT / "app.py"))["router"])
    with TestClient(host, client=(ADDRESS, 50000)) as client:
        assert login(client, "x").status_code == 422


# Connection strings


BAD_URIS = [
    "s3cret",
    "http://s3cret",
    "mongodb://alice:s3cret@@127.0.0.1",
    "mongodb://alice:s3cret@127.0.0.1:port",
    "mongodb://alice:s3cret/@127.0.0.1",
    "mongodb://127.0.0.1/?maxPoolSize=s3cret",
    "mongodb://127.0.0.1/?maxPolSize=3&x=s3cret",
    "mongodb://127.0.0.1/?tlss=true&x=s3cret",
    "mongodb://127.0.0.1/?tlsCAfil=s3cret",
    "mongodb://127.0.0.1/?tls=ture",
    "mongodb+srv://db.example.org/?tlss=true",
    "mongodb://127.0.0.1/?tls=true&tlsCAFile=s3cret",
    "mongodb://127.0.0.1/?datetime_conversion=s3cret",
    "mongodb://127.0.0.1/?w=0&journal=true",
    "mongodb://127.0.0.1/?authMechanism=s3cret",
    "mongodb://127.0.0.1/" + os.fsdecode(b"\xff"),
]


@pytest.mark.parametrize("action", ["default", "error", "ignore"])
@pytest.mark.parametrize("uri", BAD_URIS)
def test_a_malformed_mongo_uri_prevents_startup(monkeypatch, capsys, uri, action):
    with warnings.catch_warnings(action=action):
        printed = start_error(ROOT / "db.py", monkeypatch, capsys, MONGO_URI=uri)
    assert "MONGO_URI" in printed


def test_the_message_contains_the_type_of_the_error(monkeypatch, capsys):
    uri = "mongodb://alice:s3cret@@127.0.0.1"
    printed = start_error(ROOT / "db.py", monkeypatch, capsys, MONGO_URI=uri)
    assert "(InvalidURI)" in printed


@pytest.mark.parametrize("name", ["two words", "a.b", os.fsdecode(b"\xff")])
def test_an_invalid_mongo_db_name_prevents_startup(monkeypatch, capsys, name):
    settings = {"MONGO_URI": "mongodb://127.0.0.1", "MONGO_DB_NAME": name}
    assert "MONGO_DB_NAME" in start_error(ROOT / "db.py", monkeypatch, capsys, **settings)


def load_collection(monkeypatch, uri):
    monkeypatch.setenv("MONGO_URI", uri)
    collection = runpy.run_path(str(ROOT / "db.py"))["users"]
    collection.database.client.close()
    return collection


GOOD_URIS = [
    "mongodb://u:p@c.cluster-1.eu-west-1.docdb.amazonaws.com:27017/?tls=true&replicaSet=rs0"
    "&readPreference=secondaryPreferred&retryWrites=false",
    "mongodb://a:k%3D%3D@a.mongo.cosmos.azure.com:10255/?ssl=true&replicaSet=globaldb"
    "&retrywrites=false&maxIdleTimeMS=120000&appName=@a@",
    "mongodb+srv://u:p@c.example.mongodb.net/?retryWrites=true&w=majority&appName=Cluster0",
    "mongodb://127.0.0.1:9/?compressors=snappy,zstd,zlib,unknown",
    "mongodb://127.0.0.1:9/?readPreference=nearest&readPreferenceTags=dc:east&readPreferenceTags=",
    "mongodb://127.0.0.1:9/?readPreference=secondary&maxStalenessSeconds=120",
    "mongodb://127.0.0.1:9/?wTimeoutMS=5000&retryWrites=true&retryWrites=true",
    "mongodb://127.0.0.1:9/?w=0&journal=false&readPreference=secondary&timeoutMS=99999"
    "&readConcernLevel=available&connectTimeoutMS=99999",
    " mongodb://127.0.0.1:9\n",
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("uri", GOOD_URIS)
def test_options_in_the_uri_neither_prevent_the_start_nor_weaken_queries(monkeypatch, uri):
    collection = load_collection(monkeypatch, uri)
    assert collection.write_concern.document == {"w": "majority", "j": True}
    assert collection.read_preference == ReadPreference.PRIMARY
    assert collection.read_concern == ReadConcern()
    options = collection.database.client.options
    assert (options.timeout, options.pool_options.connect_timeout) == (2.5, 2.5)


def test_the_filters_for_warnings_are_not_changed(monkeypatch):
    before = list(warnings.filters)
    load_collection(monkeypatch, "mongodb://127.0.0.1:9/?retryWrites=true")
    assert warnings.filters == before


# .env files


@pytest.fixture
def module_copy(tmp_path):
    """A copy of db.py in a package, beside which the tests write their own .env."""
    copy = tmp_path / "accounts" / "db.py"
    copy.parent.mkdir()
    copy.write_bytes((ROOT / "db.py").read_bytes())
    return copy


@pytest.mark.parametrize(
    "content",
    [
        "MONGO_URI=mongodb://s3cret".encode("utf-16"),
        b"MONGO_URI: mongodb://s3cret",
        b'JWT_SECRET_KEY="s3cret\nMONGO_URI=mongodb://s3cret',
        b"# comment\n\nMONGO_DB_NAME=x\nMONGO_URI mongodb://s3cret\n",
        b"UNUSED=s3cret\0",
    ],
    ids=["not UTF-8", "a colon", "an unclosed quote", "no sign", "a NUL"],
)
def test_a_malformed_env_file_prevents_startup(module_copy, monkeypatch, capsys, caplog, content):
    (module_copy.parent / ".env").write_bytes(content)
    assert str(module_copy.parent / ".env") in start_error(module_copy, monkeypatch, capsys)
    assert caplog.text == ""


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root can read every file")
def test_an_unreadable_env_file_prevents_startup(module_copy, monkeypatch, capsys):
    (module_copy.parent / ".env").touch(mode=0)
    assert str(module_copy.parent / ".env") in start_error(module_copy, monkeypatch, capsys)


def test_a_folder_named_env_is_skipped(module_copy, tmp_path, monkeypatch):
    (module_copy.parent / ".env").mkdir()
    (tmp_path / ".env").write_text("MONGO_DB_NAME=from_file")
    monkeypatch.delenv("MONGO_DB_NAME")
    assert runpy.run_path(str(module_copy))["MONGO_DB_NAME"] == "from_file"


def test_an_env_file_can_contain_comments_exports_and_a_byte_order_mark(module_copy, monkeypatch):
    text = "# a comment\n\nexport MONGO_DB_NAME=from_file\nEMPTY=\n"
    (module_copy.parent / ".env").write_text(text, encoding="utf-8-sig")
    monkeypatch.delenv("MONGO_DB_NAME")
    assert runpy.run_path(str(module_copy))["MONGO_DB_NAME"] == "from_file"


TRACE = "import sys; sys.settrace(lambda *args: None); from accounts.db import MONGO_DB_NAME"


@pytest.mark.parametrize(
    "command",
    [["main.py"], ["-m", "main"], ["-c", "import main"], ["-c", f"{TRACE}; print(MONGO_DB_NAME)"]],
    ids=["script", "module", "command", "debugger"],
)
def test_an_env_file_is_found_from_another_working_directory(module_copy, tmp_path, command):
    (tmp_path / ".env").write_text("MONGO_DB_NAME=from_file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".env").write_text("MONGO_DB_NAME=from_the_wrong_file")
    hidden = {*SETTINGS, "COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    main = tmp_path / "main.py"
    main.write_text("from accounts.db import MONGO_DB_NAME; print(MONGO_DB_NAME)")
    printed = subprocess.check_output(
        [sys.executable, *(str(main) if part == "main.py" else part for part in command)],
        cwd=tmp_path / "elsewhere",
        env=environment | {"PYTHONPATH": str(tmp_path)},
        timeout=60,
    )
    assert printed == b"from_file\n"


def test_the_env_file_in_use_is_logged(events, cheap_hasher, monkeypatch, tmp_path):
    monkeypatch.setattr(db, "ENV_FILE", tmp_path / ".env")
    with TestClient(app.app):
        assert any(str(tmp_path / ".env") in message for _, message in events())


# Logging and start


def start(command, **settings):
    """Run the command with these settings. Return its exit code and its standard error."""
    process = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | dict.fromkeys(SETTINGS, "") | settings,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return process.returncode, process.stderr


@pytest.mark.parametrize(
    "command", [["app.py"], ["-m", "uvicorn", "app:app", "--port", "0"]], ids=["python", "uvicorn"]
)
def test_a_failed_start_prints_one_line_and_exits_with_3(command):
    code, printed = start(command, JWT_SECRET_KEY="s3cret" * 8)
    assert (code, printed.count("\n")) == (3, 1)
    assert printed.startswith("auth-jwt cannot start: ")


@contextmanager
def root_handlers(monkeypatch, handlers):
    """Give the root logger these handlers instead of pytest's."""
    level = logging.root.level
    with monkeypatch.context() as patch:
        patch.setattr(logging.root, "handlers", handlers)
        yield
    logging.root.setLevel(level)


def test_the_standalone_application_configures_logging(cheap_hasher, monkeypatch):
    with root_handlers(monkeypatch, []), TestClient(app.app):
        (handler,) = logging.root.handlers
        assert logging.root.level == logging.INFO
        assert handler.formatter._fmt == "%(asctime)s %(levelname)s %(message)s"


def test_logging_that_is_configured_already_is_not_changed(cheap_hasher, monkeypatch):
    handler, level = logging.NullHandler(), logging.root.level
    with root_handlers(monkeypatch, [handler]), TestClient(app.app):
        assert logging.root.handlers == [handler]
        assert logging.root.level == level


def test_a_host_that_includes_the_router_keeps_its_logging(cheap_hasher, monkeypatch):
    host = FastAPI()
    host.include_router(app.router)
    with root_handlers(monkeypatch, []), TestClient(host):
        assert logging.root.handlers == []


def test_python_app_py_serves_on_port_5000_and_ends_open_requests(monkeypatch, capsys):
    served = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: served.append(options))
    runpy.run_path(str(ROOT / "app.py"), run_name="__main__")
    server = uvicorn.Config(app.app, **served[0], log_config=None)
    assert (server.host, server.port) == ("127.0.0.1", 5000)
    assert 5 < server.timeout_graceful_shutdown < 10
    assert capsys.readouterr().out == ""
