"""MongoDB access: connection, unique index, circuit breaker and queries.

A user is {_id, email, password_hash, created_at, refresh_tokens: [Session, ...]} and, after wrong
passwords, failed_logins: {count, last}. Times are in UTC.
"""

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime
from functools import cache, wraps
from pathlib import Path
from time import monotonic
from typing import NoReturn, TypedDict

import mongomock
from bson import ObjectId
from dotenv import load_dotenv
from pymongo import MongoClient, ReadPreference, WriteConcern, timeout
from pymongo.errors import ConnectionFailure, DuplicateKeyError, PyMongoError

logger = logging.getLogger("auth_jwt")


def refuse_to_start(reason: str) -> NoReturn:
    """Print the reason and exit with 3, which stops `uvicorn --workers`."""
    print(f"auth-jwt cannot start: {reason}", file=sys.stderr)
    sys.exit(3)


try:
    load_dotenv(Path(__file__).with_name(".env"), encoding="utf-8-sig")
except (OSError, ValueError):
    refuse_to_start(".env cannot be read; save it as UTF-8.")

MONGO_URI = os.getenv("MONGO_URI")
MONGO_DB_NAME = os.getenv("MONGO_DB_NAME") or "auth_db"
TIMEOUT_MS = 2500  # per operation, including server selection and retries
RETRY_INTERVAL = 1.0  # seconds between attempts while the breaker is open
MAX_SESSIONS = 20


class Session(TypedDict):
    """A session of a user. The generation counts its refreshes."""

    sid: str
    generation: int
    issued_at: datetime


class DatabaseUnavailable(PyMongoError):
    """MongoDB does not respond."""


def get_collection(uri: str):
    """Return the users collection. The first query opens the connection."""
    try:
        if not uri.startswith(("mongodb://", "mongodb+srv://")):
            raise ValueError
        # PyMongo only warns about a misspelled option.
        with warnings.catch_warnings(action="error"):
            client = MongoClient(uri, connect=False, tz_aware=True, timeoutMS=TIMEOUT_MS)
        # These settings take precedence over options in the URI.
        return client[MONGO_DB_NAME].get_collection(
            "users",
            read_preference=ReadPreference.PRIMARY,
            write_concern=WriteConcern("majority", j=True),
        )
    # These errors can quote the password.
    except (PyMongoError, OSError, ValueError, Warning):
        refuse_to_start("MONGO_URI or MONGO_DB_NAME is malformed; see README.md.")


users = get_collection(MONGO_URI) if MONGO_URI else mongomock.MongoClient(tz_aware=True).db.users
# The operations of mongomock are not atomic.
memory_lock = nullcontext() if MONGO_URI else threading.Lock()


@cache
def create_index() -> None:
    """Make emails unique. No-op once it has succeeded."""
    users.create_index("email", unique=True)


def prepare_collection() -> None:
    """Create the index at start-up, in at most 8 seconds. Raises RuntimeError."""
    try:
        with timeout(8):
            create_index()
    except PyMongoError as error:
        reason = f"MONGO_URI or MONGO_DB_NAME is not usable ({get_error_name(error)})"
        if isinstance(error, DuplicateKeyError):
            reason = "several users have the same email or no email"
        raise RuntimeError(f"auth-jwt cannot start: {reason}.") from None


def get_error_name(error: PyMongoError) -> str:
    """Return the error's code name or class. Its text can quote a document."""
    details = getattr(error, "details", None) or {}
    return details.get("codeName", type(error).__name__)


breaker_lock = threading.Lock()
next_attempt = 0.0  # monotonic time, or 0.0 while the breaker is closed
last_response = 0.0  # monotonic time


def circuit_breaker(query: Callable) -> Callable:
    """Guard a query. All queries share one circuit breaker.

    It opens when MongoDB does not respond and closes at the next response. While it is open, one
    call per RETRY_INTERVAL runs its query; all others raise DatabaseUnavailable at once.
    """

    @wraps(query)
    def guarded_query(*args):
        global next_attempt, last_response
        started = monotonic()
        with breaker_lock:
            if started < next_attempt:
                raise DatabaseUnavailable
            if next_attempt:
                next_attempt = started + RETRY_INTERVAL
        responded = True
        try:
            with memory_lock:
                return query(*args)
        except ConnectionFailure:
            responded = False
            raise DatabaseUnavailable from None
        finally:
            ended = monotonic()
            with breaker_lock:
                if responded:
                    next_attempt, last_response = 0.0, ended
                # A recent response since the query started keeps it closed.
                elif not next_attempt and last_response < max(started, ended - RETRY_INTERVAL):
                    next_attempt = ended + RETRY_INTERVAL
                    logger.error("MongoDB does not respond")

    return guarded_query


@circuit_breaker
def create_user(email: str, password_hash: str, session: Session) -> str | None:
    """Store a user and a session. Return the user's id, or None if the email is taken."""
    create_index()
    user = {"email": email, "password_hash": password_hash, "refresh_tokens": [session]}
    user["created_at"] = session["issued_at"]
    try:
        return str(users.insert_one(user).inserted_id)
    except DuplicateKeyError:
        return None


@circuit_breaker
def find_user_by_email(email: str) -> dict | None:
    """Return the user's _id, password_hash and failed_logins (if any), or None."""
    query = {"email": email, "password_hash": {"$type": "string"}}
    return users.find_one(query, {"password_hash": 1, "failed_logins": 1})


@circuit_breaker
def find_user_by_session(user_id: str, sid: str) -> dict | None:
    """Return the user's email and created_at, or None if the user or session does not exist."""
    query = {"_id": ObjectId(user_id), "refresh_tokens.sid": sid, "email": {"$type": "string"}}
    user = users.find_one(query, {"email": 1, "created_at": 1})
    # An old document can lack it.
    if user and not isinstance(user.get("created_at"), datetime):
        user["created_at"] = user["_id"].generation_time
    return user


@circuit_breaker
def replace_password_hash(user_id: str, old_hash: str, new_hash: str) -> None:
    """Replace the password hash, unless it has changed."""
    query = {"_id": ObjectId(user_id), "password_hash": old_hash}
    users.update_one(query, {"$set": {"password_hash": new_hash}})


@circuit_breaker
def record_failed_login(email: str, failed_at: datetime) -> None:
    """Count a wrong password. Does nothing for an unknown email."""
    count = {"$inc": {"failed_logins.count": 1}, "$set": {"failed_logins.last": failed_at}}
    # Waiting for the journal would reveal that the email is registered.
    users.with_options(write_concern=WriteConcern(1)).update_one({"email": email}, count)


@circuit_breaker
def add_session(user_id: str, session: Session) -> bool:
    """Add a session, drop any excess, reset failed_logins. Return whether the user exists."""
    newest = {"$each": [session], "$slice": -MAX_SESSIONS}
    changes = {"$push": {"refresh_tokens": newest}, "$unset": {"failed_logins": ""}}
    return users.update_one({"_id": ObjectId(user_id)}, changes).matched_count == 1


@circuit_breaker
def advance_session(user_id: str, session: Session) -> Session | None:
    """Store this generation of a session if the one before it is stored.

    Return the generation that is stored afterwards, or None if the session does not exist.
    """
    previous = {"sid": session["sid"], "generation": session["generation"] - 1}
    query = {"_id": ObjectId(user_id), "refresh_tokens": {"$elemMatch": previous}}
    if users.update_one(query, {"$set": {"refresh_tokens.$": session}}).matched_count:
        return session
    stored = {"refresh_tokens": {"$elemMatch": {"sid": session["sid"]}}}
    user = users.find_one({"_id": ObjectId(user_id)} | stored, stored)
    return user["refresh_tokens"][0] if user else None


@circuit_breaker
def delete_session(user_id: str, sid: str) -> bool | None:
    """Delete the session. Return whether it existed, or None if there is no user."""
    removal = {"$pull": {"refresh_tokens": {"sid": sid}}}
    result = users.update_one({"_id": ObjectId(user_id)}, removal)
    return result.modified_count == 1 if result.matched_count else None
