"""Tasks of an operator. They change users in MongoDB, also while the service runs.

In the folder of the service: PYTHONPATH=. .venv/bin/python .github/docs/tasks.py --help
Beside a package's db.py: python -m accounts.tasks --help
"""

import argparse
import sys
from getpass import getpass

import pymongo
from pydantic import ValidationError

import app
import auth
import db

# Each task returns the number of users that it has found or changed.


def set_password(email: str) -> int:
    """Set a new password and end all sessions of the user. A disabled user stays disabled."""
    password_hash = auth.hash_password(read_password(email), network="operator")
    counts = []
    for field in ("disabled_hash", "password_hash"):
        query = {"email": email, field: {"$exists": True}}
        changes = {"$set": {field: password_hash, "refresh_tokens": []}}
        counts.append(db.users.update_one(query, changes).matched_count)
    return max(counts)


def read_password(email: str) -> str:
    """Return a strong password that the operator types."""
    try:
        return app.NewCredentials(email=email, password=getpass("New password: ")).password
    except ValidationError as error:
        # The text of the error quotes the password.
        sys.exit(error.errors()[0]["msg"])


def end_sessions(email: str) -> int:
    """End all sessions of the user."""
    return db.users.update_one({"email": email}, {"$set": {"refresh_tokens": []}}).matched_count


def disable(email: str) -> int:
    """End all sessions of the user and reject their logins, as for a wrong password."""
    query = {"email": email, "password_hash": {"$exists": True}}
    changes = {"$rename": {"password_hash": "disabled_hash"}, "$set": {"refresh_tokens": []}}
    return db.users.update_one(query, changes).matched_count


def enable(email: str) -> int:
    """Accept logins of a disabled user again."""
    is_disabled = {"password_hash": {"$exists": False}, "disabled_hash": {"$exists": True}}
    changes = {"$rename": {"disabled_hash": "password_hash"}}
    return db.users.update_one({"email": email, **is_disabled}, changes).matched_count


def unlock(email: str) -> int:
    """Remove the failed logins of the user, so that a login gets no 429."""
    return db.users.update_one({"email": email}, {"$unset": {"login_failures": ""}}).matched_count


def delete(email: str) -> int:
    """Delete the user."""
    return db.users.delete_one({"email": email}).deleted_count


def end_all_sessions() -> int:
    """End all sessions of all users."""
    # After an interruption, the next run continues with the rest.
    query = {"refresh_tokens.sid": {"$exists": True}}
    return db.users.update_many(query, {"$set": {"refresh_tokens": []}}).modified_count


def remove_expired() -> int:
    """Remove expired sessions, and failed logins that no longer count."""
    session = {"issued_at": {"$lt": auth.now() - auth.REFRESH_TOKEN_LIFETIME}}
    failure = {"failed_at": {"$lt": auth.now() - auth.LIMIT_PERIOD}}
    expired = {"refresh_tokens": session, "login_failures": failure}
    query = {"$or": [{field: {"$elemMatch": item}} for field, item in expired.items()]}
    return db.users.update_many(query, {"$pull": expired}).modified_count


def list_logged_in() -> int:
    """Print the emails of all users who have a live session."""
    live = {"refresh_tokens.issued_at": {"$gt": auth.now() - auth.REFRESH_TOKEN_LIFETIME}}
    count = 0
    for user in db.users.find(live, {"email": 1}):
        print(user["email"])
        count += 1
    return count


TASKS_FOR_ONE_USER = (set_password, end_sessions, disable, enable, unlock, delete)
TASKS_FOR_ALL_USERS = (end_all_sessions, remove_expired, list_logged_in)


def main() -> None:
    """Run the task that the command line names."""
    parser = argparse.ArgumentParser(description="Exits with status 1 if there is no such user.")
    commands = parser.add_subparsers(required=True)
    for task in TASKS_FOR_ONE_USER + TASKS_FOR_ALL_USERS:
        command = commands.add_parser(task.__name__.replace("_", "-"), help=task.__doc__)
        command.set_defaults(task=task)
        if task in TASKS_FOR_ONE_USER:
            command.add_argument("email", type=app.normalize_email)
    arguments = vars(parser.parse_args())
    if not db.MONGO_URI:
        sys.exit("Set MONGO_URI and JWT_SECRET_KEY to those of the service.")
    # Without a limit for the time of a query. None would mean the limit of the service.
    with pymongo.timeout(0):
        count = arguments.pop("task")(**arguments)
    print(f"{count} users in {db.users.full_name}")
    sys.exit(0 if count else 1)


if __name__ == "__main__":
    main()
