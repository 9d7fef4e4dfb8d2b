"""Tests of tasks.py and convert_emails.py, each run in a process of its own on MongoDB."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from helpers import ROOT, SETTINGS

DOCS = ROOT / ".github/docs"
ALICE = "alice@example.com"
BOB = "bob@example.com"
NEW_PASSWORD = "N3w-Passw0rd"


@pytest.fixture
def environment(mongod):
    """The variables of a shell that has the settings of the service."""
    settings = {"MONGO_URI": mongod.uri, "MONGO_DB_NAME": "faults", "JWT_SECRET_KEY": "k" * 32}
    return os.environ | dict.fromkeys(SETTINGS, "") | settings | {"PYTHONPATH": "."}


@pytest.fixture
def run_file(environment):
    """A function that runs one of the files beside the service."""

    def run_file(name, *arguments, typed="", status=0, **variables):
        command = [sys.executable, DOCS / name, *arguments]
        process = subprocess.run(
            command,
            cwd=ROOT,
            env=environment | variables,
            input=typed,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            start_new_session=True,  # without a terminal, from which getpass would read
        )
        assert process.returncode == status, process.stderr
        assert "Traceback" not in process.stderr
        return process

    return run_file


@pytest.fixture
def run_task(run_file):
    """A function that runs a task and returns what it prints."""
    return lambda *arguments, **options: run_file("tasks.py", *arguments, **options).stdout


# Tasks


def test_each_task_is_tested(run_task):
    names = re.search(r"\{(.*)\}", run_task("--help", COLUMNS="1000"))[1]
    assert names.split(",") == [
        "set-password",
        "end-sessions",
        "disable",
        "enable",
        "unlock",
        "delete",
        "end-all-sessions",
        "remove-expired",
        "list-logged-in",
    ]


def test_a_password_that_is_set_replaces_the_old_one_and_ends_the_sessions(service, run_task):
    tokens = service.register(ALICE).body
    run_task("set-password", ALICE, typed=NEW_PASSWORD)
    assert service.me(tokens["access_token"]).status == 401
    assert service.refresh(tokens["refresh_token"]).status == 401
    assert service.login(ALICE).status == 401
    assert service.login(ALICE, NEW_PASSWORD).status == 200


def test_a_password_can_be_typed_in_decomposed_form(service, run_task):
    service.register(ALICE)
    run_task("set-password", ALICE, typed="Pa\u0308ssw0rd!", PYTHONIOENCODING="utf-8")
    assert service.login(ALICE, "P\u00e4ssw0rd!").status == 200


def test_a_weak_password_is_refused_without_being_quoted(service, users, run_file):
    service.register(ALICE)
    before = users.find_one()
    process = run_file("tasks.py", "set-password", ALICE, typed="hunter2", status=1)
    assert "The password needs at least 8 characters" in process.stderr
    assert "hunter2" not in process.stderr
    assert users.find_one() == before


def test_a_password_is_not_shown_on_the_terminal(service, environment):
    service.register(ALICE)
    terminal, of_process = pty.openpty()
    command = [sys.executable, DOCS / "tasks.py", "set-password", ALICE]
    streams = dict.fromkeys(["stdin", "stdout", "stderr"], of_process)
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, **streams
    )
    shown = b""
    while b"password: " not in shown:
        assert select.select([terminal], [], [], 30)[0], shown
        shown += os.read(terminal, 1000)
    os.write(terminal, f"{NEW_PASSWORD}\n".encode())
    assert process.wait(30) == 0
    shown += os.read(terminal, 1000)
    os.close(terminal)
    os.close(of_process)
    assert b"1 users" in shown
    assert NEW_PASSWORD.encode() not in shown


@pytest.mark.parametrize("task", [("end-sessions", ALICE), ("end-all-sessions",)])
def test_the_tokens_of_an_ended_session_are_rejected(service, run_task, task):
    tokens = service.register(ALICE).body
    run_task(*task)
    assert service.me(tokens["access_token"]).status == 401
    assert service.refresh(tokens["refresh_token"]).status == 401
    assert service.login(ALICE).status == 200


def test_the_sessions_of_all_users_are_ended_once(service, run_task):
    tokens = [service.register(email).body for email in (ALICE, BOB)]
    assert run_task("end-all-sessions") == "2 users in faults.users\n"
    assert [service.me(each["access_token"]).status for each in tokens] == [401, 401]
    assert run_task("end-all-sessions", status=1) == "0 users in faults.users\n"


def test_the_end_of_all_sessions_does_not_change_documents_of_other_programs(users, run_task):
    users.insert_one({"_id": 1})
    run_task("end-all-sessions", status=1)
    assert users.find_one() == {"_id": 1}


def test_a_task_can_take_longer_than_a_query_of_the_service(mongod, service, run_task):
    service.register(ALICE)
    mongod.hang()
    assert run_task("end-all-sessions") == "1 users in faults.users\n"


def test_a_disabled_user_can_neither_log_in_nor_register(service, run_task):
    tokens = service.register(ALICE).body
    run_task("disable", ALICE)
    assert service.me(tokens["access_token"]).status == 401
    assert service.refresh(tokens["refresh_token"]).status == 401
    assert service.login(ALICE).status == 401
    assert service.register(ALICE).status == 409


def test_a_user_who_is_disabled_twice_can_be_enabled(service, run_task):
    service.register(ALICE)
    run_task("disable", ALICE)
    run_task("disable", ALICE, status=1)
    run_task("enable", ALICE)
    assert service.login(ALICE).status == 200


def test_a_password_that_is_set_for_a_disabled_user_works_when_they_are_enabled(service, run_task):
    service.register(ALICE)
    run_task("disable", ALICE)
    run_task("set-password", ALICE, typed=NEW_PASSWORD)
    assert service.login(ALICE, NEW_PASSWORD).status == 401
    run_task("enable", ALICE)
    assert service.login(ALICE, NEW_PASSWORD).status == 200
    assert service.login(ALICE).status == 401


def test_enable_does_not_replace_a_newer_password(service, users, run_task):
    service.register(ALICE)
    users.update_one({"email": ALICE}, {"$set": {"disabled_hash": "an older hash"}})
    run_task("enable", ALICE, status=1)
    assert service.login(ALICE).status == 200


def test_a_user_can_log_in_after_unlock(service, users, run_task):
    service.register(ALICE)
    failure = {"network": "127.0.0.1", "failed_at": datetime.now(UTC)}
    users.update_one({"email": ALICE}, {"$set": {"login_failures": [failure] * 20}})
    assert service.login(ALICE).status == 429
    run_task("unlock", ALICE)
    assert service.login(ALICE).status == 200


def test_a_deleted_user_is_logged_out_and_can_register_again(service, run_task):
    tokens = service.register(ALICE).body
    run_task("delete", ALICE)
    assert service.me(tokens["access_token"]).status == 401
    assert service.register(ALICE).status == 201


def test_the_list_of_who_is_logged_in_omits_ended_and_expired_sessions(service, users, run_task):
    for email in (ALICE, BOB):
        service.register(email)
    carol = service.register("carol@example.com").body
    assert service.logout(carol["refresh_token"]).status == 204
    # A refresh token is valid for seven days.
    expired = {"refresh_tokens.0.issued_at": datetime.now(UTC) - timedelta(days=8)}
    users.update_one({"email": BOB}, {"$set": expired})
    assert run_task("list-logged-in") == f"{ALICE}\n1 users in faults.users\n"


def test_remove_expired_keeps_live_sessions_and_failures_that_count(service, users, run_task):
    def get_counts():
        return [len(users.find_one()[name]) for name in ("refresh_tokens", "login_failures")]

    service.register(ALICE)
    service.login(ALICE)
    for _ in range(2):
        service.login(ALICE, "wrong")
    assert get_counts() == [2, 2]
    run_task("remove-expired", status=1)
    assert get_counts() == [2, 2]
    session = {"refresh_tokens.0.issued_at": datetime.now(UTC) - timedelta(days=7, minutes=1)}
    failure = {"login_failures.0.failed_at": datetime.now(UTC) - timedelta(minutes=61)}
    users.update_one({}, {"$set": session | failure})
    run_task("remove-expired")
    assert get_counts() == [1, 1]


@pytest.mark.parametrize(
    "name", ["set-password", "end-sessions", "disable", "enable", "unlock", "delete"]
)
def test_a_task_does_not_change_another_user(service, users, run_task, name):
    service.register(BOB)
    service.login(BOB, "wrong")
    users.update_one({"email": BOB}, {"$set": {"disabled_hash": "hash"}})
    service.register(ALICE)
    if name == "enable":
        run_task("disable", ALICE)
    before = users.find_one({"email": BOB})
    assert run_task(name, ALICE, typed=NEW_PASSWORD) == "1 users in faults.users\n"
    assert users.find_one({"email": BOB}) == before


@pytest.mark.parametrize("email", ["ZOE\u0308@example.com", "zo\u00eb@example.com"])
def test_the_email_of_a_task_is_normalised(service, run_task, email):
    tokens = service.register("zo\u00eb@example.com").body
    run_task("end-sessions", email)
    assert service.me(tokens["access_token"]).status == 401


def test_a_task_for_an_unknown_user_ends_with_status_1(mongod, run_task):
    assert run_task("delete", ALICE, status=1) == "0 users in faults.users\n"


def test_a_task_for_an_invalid_email_ends_with_status_2(mongod, run_file):
    assert "'alice'" in run_file("tasks.py", "delete", "alice", status=2).stderr


@pytest.mark.parametrize(
    "command", [("tasks.py", "end-all-sessions"), ("convert_emails.py",)], ids=lambda each: each[0]
)
def test_it_is_an_error_that_users_are_kept_in_memory(run_file, command):
    process = run_file(*command, MONGO_URI="", JWT_SECRET_KEY="", status=1)
    assert process.stderr.startswith("Set MONGO_URI and JWT_SECRET_KEY")


@pytest.fixture
def package(tmp_path, environment):
    """A function that runs a module of a package that contains the service."""
    folder = tmp_path / "accounts"
    folder.mkdir()
    (folder / "__init__.py").touch()
    files = [ROOT / name for name in ("app.py", "auth.py", "db.py")]
    for file in [*files, DOCS / "tasks.py", DOCS / "convert_emails.py"]:
        copy = shutil.copy(file, folder)
        expression = r"s/^import (app|auth|db)$/from . import \1/"
        subprocess.run(["sed", "-i", "-E", expression, copy], check=True)

    def run(module, *arguments, **options):
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.check_output(
            command, cwd=tmp_path, env=environment | {"PYTHONPATH": ""}, text=True, **options
        )

    return run


def test_a_task_works_in_a_package(service, package):
    service.register(ALICE)
    package("accounts.tasks", "set-password", ALICE, input=NEW_PASSWORD, start_new_session=True)
    assert service.login(ALICE, NEW_PASSWORD).status == 200


# The conversion of emails


def convert(run_file, status=0):
    return run_file("convert_emails.py", status=status).stdout.splitlines()


def test_a_user_can_log_in_with_a_converted_email(service, users, run_file):
    service.register(ALICE)
    # An upper-case, decomposed local part and a domain in Punycode.
    users.update_one({}, {"$set": {"email": "Zoe\u0308@XN--BCHER-KVA.example.com"}})
    email = "zo\u00eb@b\u00fccher.example.com"
    assert service.login(email).status == 401
    assert convert(run_file) == ["0 emails in faults.users cannot be converted"]
    assert service.login(email).status == 200


def test_the_conversion_works_in_a_package(users, package):
    users.insert_one({"_id": 1, "email": "Alice@example.com"})
    assert package("accounts.convert_emails").startswith("0 emails")
    assert users.find_one({"_id": 1}) == {"_id": 1, "email": ALICE}


def test_a_second_conversion_changes_nothing(mongod, users, run_file):
    users.insert_many([{"email": "Alice@example.com"}, {"email": BOB}])
    convert(run_file)
    mongod.set_fail_point("alwaysOn", failCommands=["update"], errorCode=1)
    convert(run_file)


def test_an_email_that_another_user_has_is_not_converted(users, run_file):
    documents = [{"_id": 1, "email": "Alice@example.com"}, {"_id": 2, "email": ALICE}]
    users.insert_many(documents)
    assert convert(run_file, status=1) == [
        "1: the converted email is that of 2",
        "1 emails in faults.users cannot be converted",
    ]
    assert list(users.find()) == documents


def test_emails_that_would_become_equal_are_not_both_converted(users, run_file):
    emails = ["ALICE@example.com", "Alice@example.com"]
    users.insert_many({"_id": number, "email": email} for number, email in enumerate(emails))
    assert convert(run_file, status=1)[0] == "1: the converted email is that of 0"
    assert [user["email"] for user in users.find()] == [ALICE, "Alice@example.com"]


def test_equal_emails_are_reported_before_anything_is_changed(users, run_file):
    emails = [ALICE, ALICE, "Bob@example.com", None, None]
    documents = [{"_id": number, "email": email} for number, email in enumerate(emails)]
    users.insert_many(documents)
    printed = convert(run_file, status=1)
    assert sorted(printed[:-1]) == [
        "0, 1: the emails are equal, or absent",
        "3, 4: the emails are equal, or absent",
    ]
    assert list(users.find()) == documents


def test_an_invalid_email_is_reported_without_being_quoted(users, run_file):
    emails = ["s3cret", "Bob@example.com"]
    users.insert_many({"_id": number, "email": email} for number, email in enumerate(emails))
    process = run_file("convert_emails.py", status=1)
    assert process.stdout.splitlines()[0] == "0: the email is invalid"
    assert "s3cret" not in process.stdout + process.stderr
    assert [user["email"] for user in users.find()] == ["s3cret", BOB]


def test_an_email_that_is_changed_during_the_conversion_is_kept(mongod, users, environment):
    users.insert_one({"_id": 1, "email": "Alice@example.com"})
    reached = mongod.set_fail_point(
        {"times": 1}, failCommands=["update"], blockConnection=True, blockTimeMS=2000
    )
    command = [sys.executable, DOCS / "convert_emails.py"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)

    mongod.wait_for_fail_point(reached + 1)
    users.find_one_and_update({"_id": 1}, {"$set": {"email": BOB}})
    assert process.wait(30) == 0
    assert users.find_one() == {"_id": 1, "email": BOB}


def test_the_conversion_does_not_change_documents_of_other_programs(users, run_file):
    documents = [
        {"_id": 1, "name": "without an email"},
        {"_id": 2, "email": 5},
        {"_id": 3, "email": ["Alice@example.com"]},
    ]
    users.insert_many(documents)
    convert(run_file)
    assert list(users.find()) == documents
