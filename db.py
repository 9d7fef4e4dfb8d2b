"""Settings, MongoDB connection, circuit breaker and queries.

A user is {_id, email, password_hash, created_at, refresh_tokens: [{sid, generation, issued_at,
network}], login_failures: [{network, failed_at}]}. Times are in UTC.
"""

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn, TypedDict

import mongomock
from bson import ObjectId
from dotenv import find_dotenv, load_dotenv
from dotenv.parser import parse_stream
from pymongo import MongoClient, WriteConcern
from pymongo.collection import Collection
from pymongo.errors import ConnectionFailure, DuplicateKeyError, PyMongoError

logger = logging.getLogger("auth_jwt")


def abort_startup(reason: str) -> NoReturn:
    """Print the reason and exit with status 3, which stops `uvicorn --workers`."""
    print(f"auth-jwt cannot start: {reason}", file=sys.stderr)
    sys.exit(3)


env_file = Path(find_dotenv() or os.devnull)
try:
    with env_file.open(encoding="utf-8-sig") as lines:
        # load_dotenv() only warns about a malformed line.
        if any(binding.error for binding in parse_stream(lines)):
            raise ValueError
    load_dotenv(env_file, encoding="utf-8-sig")
except (OSError, ValueError):
    abort_startup(f"{env_file} must be UTF-8 text with lines of the form NAME=value.")

MONGO_URI = os.getenv("MONGO_URI")
MONGO_DB_NAME = os.getenv("MONGO_DB_NAME") or "auth_db"
TIMEOUT_MS = 2500  # per operation with retries
RETRY_INTERVAL = 1.0  # seconds until the breaker opens and between attempts
MAX_SESSIONS = 20
MAX_LOGIN_FAILURES = 100

Document = dict[str, Any]


class Session(TypedDict):
    """A session. generation counts the refreshes; issued_at is the time of the newest tokens."""

    sid: str
    generation: int
    issued_at: datetime


class DatabaseError(Exception):
    """A query failed. The message is only the name of MongoDB's error."""


class DatabaseUnavailable(DatabaseError):
    """MongoDB is unavailable. A retry may succeed."""


users: Collection[Document] = mongomock.MongoClient(tz_aware=True).db.users
if MONGO_URI:
    try:
        if "://" not in MONGO_URI:
            raise ValueError
        # PyMongo only warns about a misspelled option.
        with warnings.catch_warnings(action="error"):
            # Keyword arguments take precedence over options in the URI.
            users = MongoClient[Document](
                MONGO_URI,
                connect=False,
                tz_aware=True,
                timeoutMS=TIMEOUT_MS,
                w="majority",
                journal=True,
                readPreference="primary",
            )[MONGO_DB_NAME]["users"]
    # These errors can quote the password.
    except Exception:
        abort_startup("MONGO_URI or MONGO_DB_NAME is malformed; see README.md.")
# mongomock operations are not atomic.
memory_lock = nullcontext() if MONGO_URI else threading.Lock()


last_success = 0.0  # monotonic time
next_attempt = 0.0  # monotonic time; 0.0 while the circuit breaker is closed


@contextmanager
def circuit_breaker() -> Iterator[None]:
    """Convert PyMongo errors. During an outage, try only one query per RETRY_INTERVAL."""
    global last_success, next_attempt
    if monotonic() < next_attempt:
        raise DatabaseUnavailable
    if next_attempt:
        next_attempt = monotonic() + RETRY_INTERVAL
    try:
        with memory_lock:
            yield
    except PyMongoError as error:
        no_response = error.timeout or isinstance(error, ConnectionFailure)
        if not no_response and not error.has_error_label("RetryableWriteError"):
            next_attempt = 0.0  # MongoDB responded.
            details = getattr(error, "details", None) or {}
            raise DatabaseError(details.get("codeName", type(error).__name__)) from None
        if not next_attempt and monotonic() - last_success > RETRY_INTERVAL:
            next_attempt = monotonic() + RETRY_INTERVAL
            logger.error("MongoDB does not respond. Is it running, and is MONGO_URI correct?")
        raise DatabaseUnavailable from None
    last_success, next_attempt = monotonic(), 0.0


@cache
def create_index() -> None:
    """Create the unique index once. Call it inside circuit_breaker()."""
    users.create_index("email", unique=True)


def prepare_collection() -> None:
    """Create the index, or leave that to create_user if MongoDB does not respond."""
    try:
        with suppress(DatabaseUnavailable), circuit_breaker():
            create_index()
    except DatabaseError as error:
        abort_startup(f"MongoDB at MONGO_URI is not usable ({error}); see README.md.")


@circuit_breaker()
def create_user(email: str, password_hash: str, session: Session, network: str) -> str | None:
    """Store a user and a session. Return the user's id, or None if the email is taken."""
    create_index()
    user: Document = {
        "email": email,
        "password_hash": password_hash,
        "created_at": session["issued_at"],
        "refresh_tokens": [{**session, "network": network}],
    }
    try:
        return str(users.insert_one(user).inserted_id)
    except DuplicateKeyError:
        return None


@circuit_breaker()
def find_user_by_email(email: str, network: str) -> Document | None:
    """Return the user's password hash, failed logins and a session from the network, or None."""
    session = {"refresh_tokens": {"$elemMatch": {"network": network}}}
    return users.find_one({"email": email}, {"password_hash": 1, "login_failures": 1} | session)


@circuit_breaker()
def find_user_by_session(user_id: str, sid: str) -> Document | None:
    """Return the user's email and created_at, or None if the user or session does not exist."""
    # Documents of other programs can lack email or created_at.
    query = {"_id": ObjectId(user_id), "refresh_tokens.sid": sid, "email": {"$type": "string"}}
    user = users.find_one(query, {"email": 1, "created_at": 1})
    if user and not isinstance(user.get("created_at"), datetime):
        user["created_at"] = user["_id"].generation_time
    return user


@circuit_breaker()
def replace_password_hash(user_id: str, old_hash: str, new_hash: str) -> None:
    """Replace the password hash if it is still the old one."""
    query = {"_id": ObjectId(user_id), "password_hash": old_hash}
    users.update_one(query, {"$set": {"password_hash": new_hash}})


@circuit_breaker()
def record_failed_login(email: str, network: str, failed_at: datetime) -> None:
    """Add a failed login and keep the newest ones. Does nothing for an unknown email."""
    failure = {"network": network, "failed_at": failed_at}
    change = {"$push": {"login_failures": {"$each": [failure], "$slice": -MAX_LOGIN_FAILURES}}}
    # A slower, journaled write would reveal a registered email.
    users.with_options(write_concern=WriteConcern(1)).update_one({"email": email}, change)


@circuit_breaker()
def add_session(user_id: str, session: Session, network: str) -> bool:
    """Add a session and drop the failed logins of its network. Return whether the user exists."""
    added = {**session, "network": network}
    # Keep the sessions that were refreshed last.
    push = {"$each": [added], "$sort": {"issued_at": 1}, "$slice": -MAX_SESSIONS}
    change = {"$push": {"refresh_tokens": push}, "$pull": {"login_failures": {"network": network}}}
    return users.update_one({"_id": ObjectId(user_id)}, change).matched_count == 1


@circuit_breaker()
def advance_session(user_id: str, session: Session) -> bool:
    """Replace the previous generation of the session. Return whether that one was stored."""
    previous = {"sid": session["sid"], "generation": session["generation"] - 1}
    query = {"_id": ObjectId(user_id), "refresh_tokens": {"$elemMatch": previous}}
    changes = {f"refresh_tokens.$.{name}": value for name, value in session.items()}
    return users.update_one(query, {"$set": changes}).matched_count == 1


@circuit_breaker()
def find_session(user_id: str, sid: str) -> Session | None:
    """Return the session, or None if it does not exist."""
    match = {"refresh_tokens": {"$elemMatch": {"sid": sid}}}
    user = users.find_one({"_id": ObjectId(user_id)} | match, match)
    return user["refresh_tokens"][0] if user else None


@circuit_breaker()
def delete_session(user_id: str, sid: str) -> bool:
    """Delete the session. Return whether it existed."""
    removal = {"$pull": {"refresh_tokens": {"sid": sid}}}
    return users.update_one({"_id": ObjectId(user_id)}, removal).modified_count == 1
