"""Settings, MongoDB connection, circuit breaker and queries.

A user is one document:

    {_id, email, password_hash, created_at,
     refresh_tokens: [{sid, generation, issued_at, network}],  # the sessions
     login_failures: [{network, failed_at}]}

Times are in UTC. Other programs can use the collection, too, so the queries accept documents that
lack fields or have fields of other types.
"""

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn, TypedDict

import mongomock
from bson import ObjectId
from bson.errors import BSONError
from dns.exception import DNSException
from dotenv import load_dotenv
from dotenv.parser import parse_stream
from fastapi import HTTPException
from pymongo import MongoClient, ReadPreference, WriteConcern
from pymongo.collection import Collection
from pymongo.errors import (
    ConnectionFailure,
    DuplicateKeyError,
    OperationFailure,
    ProtocolError,
    PyMongoError,
)
from pymongo.read_concern import ReadConcern

logger = logging.getLogger("auth_jwt")

Document = dict[str, Any]


# Settings


def abort_startup(reason: str) -> NoReturn:
    """Print the reason and exit with status 3, which also ends `uvicorn --workers`."""
    print(f"auth-jwt cannot start: {reason}", file=sys.stderr)
    sys.exit(3)


def load_env_file() -> Path | None:
    """Load the nearest .env, in the folder of this file or above, and return its path.

    Environment variables take precedence over the file.
    """
    # find_dotenv() would search from the working directory in some cases, such as in a debugger.
    folders = Path(__file__).absolute().parents
    env_file = next((folder / ".env" for folder in folders if (folder / ".env").is_file()), None)
    if env_file is None:
        return None
    malformed = f"{env_file} must be UTF-8 text with lines of the form NAME=value."
    try:
        with env_file.open(encoding="utf-8-sig") as lines:
            # load_dotenv() only logs a warning about a malformed line.
            if any(binding.error for binding in parse_stream(lines)):
                abort_startup(malformed)
        load_dotenv(env_file, encoding="utf-8-sig")
    except (OSError, ValueError):
        abort_startup(malformed)
    return env_file


def read_setting(name: str, default: str = "") -> str:
    """Return the setting without surrounding white space, or the default if it is empty.

    A secret that is mounted as a file often ends with a newline.
    """
    value = os.getenv(name, "").strip()
    try:
        # os.getenv() returns bytes that are not UTF-8 as surrogates, which cannot be encoded.
        value.encode()
    except UnicodeEncodeError:
        abort_startup(f"{name} must be UTF-8 text.")
    return value or default


ENV_FILE = load_env_file()
MONGO_URI = read_setting("MONGO_URI")
MONGO_DB_NAME = read_setting("MONGO_DB_NAME", "auth_db")


# Connection

# The limit for one query, including the selection of a server and retries.
TIMEOUT_MS = 2500


def get_collection() -> Collection[Document]:
    """Return MongoDB's collection `users`, or one in memory if MONGO_URI is not set.

    It connects at the first query, so that the service can start before MongoDB.
    """
    if not MONGO_URI:
        return mongomock.MongoClient(tz_aware=True)["memory"]["users"]
    if "://" not in MONGO_URI:
        abort_startup("MONGO_URI must start with mongodb:// or mongodb+srv://.")
    try:
        with warnings.catch_warnings(action="default"):
            # PyMongo only warns about an option that it ignores, and a misspelled TLS option would
            # disable TLS. Its other warnings are harmless, such as one about another vendor.
            warnings.filterwarnings("error", "Unknown option|The value of|authMechanism must")
            client = MongoClient[Document](
                MONGO_URI,
                connect=False,
                tz_aware=True,
                timeoutMS=TIMEOUT_MS,
                # The limit for connecting to a server, and for the DNS lookup of mongodb+srv.
                connectTimeoutMS=TIMEOUT_MS,
                # A burst of requests needs many connections at once. The default is 2.
                maxConnecting=16,
            )
        # These settings take precedence over the options in MONGO_URI. A session that was
        # reported as stored or revoked must stay so when a server fails.
        return client[MONGO_DB_NAME].get_collection(
            "users",
            write_concern=WriteConcern("majority", j=True),
            read_preference=ReadPreference.PRIMARY,
            read_concern=ReadConcern(),
        )
    except UserWarning:
        abort_startup("MONGO_URI has an unknown option or an invalid option value.")
    except Exception as error:
        # The message of the error can quote the password.
        name = type(error).__name__
        abort_startup(f"MONGO_URI or MONGO_DB_NAME is invalid ({name}); see README.md.")


users = get_collection()


# Errors and circuit breaker


class DatabaseUnavailable(HTTPException):
    """The error response while MongoDB is unavailable. A retry can succeed."""

    def __init__(self) -> None:
        super().__init__(503, "The database is unavailable; try again", {"Retry-After": "2"})


class DatabaseError(HTTPException):
    """The error response to any other MongoDB error. error_name is the name for the log."""

    def __init__(self, error_name: str) -> None:
        super().__init__(500, "Internal server error")
        self.error_name = error_name


RETRY_INTERVAL = 1.0  # seconds

# Values of monotonic(). next_attempt is 0.0 while the circuit breaker is closed.
last_response = 0.0
next_attempt = 0.0

# The operations of mongomock are not atomic.
memory_lock = nullcontext() if MONGO_URI else threading.Lock()


@contextmanager
def circuit_breaker() -> Iterator[None]:
    """Raise DatabaseUnavailable or DatabaseError instead of PyMongo's errors.

    While MongoDB is unavailable, only one query is tried per RETRY_INTERVAL. Without this limit,
    each request would occupy a thread for TIMEOUT_MS, and no thread would be left for requests
    that need no database. Use it in a `with` statement or as a decorator.
    """
    global next_attempt
    # Another thread can close the circuit breaker between two reads.
    scheduled_attempt = next_attempt
    if monotonic() < scheduled_attempt:
        raise DatabaseUnavailable
    if scheduled_attempt:
        # Several threads can get here at once. Then each tries one query, which is harmless.
        next_attempt = monotonic() + RETRY_INTERVAL
    try:
        with memory_lock:
            yield
    # PyMongo raises a ValueError for some passwords in MONGO_URI, at the first connection.
    except (PyMongoError, BSONError, ValueError) as error:
        if is_outage(error):
            record_outage()
            raise DatabaseUnavailable from None
        record_response()
        error_name = get_error_name(error)
        logger.error("MongoDB returned an error: %s", error_name)
        raise DatabaseError(error_name) from None
    record_response()


# The codes of MongoDB's errors after which a retry can succeed. PyMongo retries only some of them.
TRANSIENT_ERROR_CODES = {
    6,  # HostUnreachable
    7,  # HostNotFound
    24,  # LockTimeout
    89,  # NetworkTimeout
    112,  # WriteConflict
    133,  # FailedToSatisfyReadPreference
    262,  # ExceededTimeLimit
    462,  # IngressRequestRateLimitExceeded
    9001,  # SocketException
    16500,  # a rate limit of Azure Cosmos DB
}


def is_outage(error: Exception) -> bool:
    """Return whether a retry can succeed, because no server gave a usable response."""
    # The DNS lookup of mongodb+srv raises a ConfigurationError.
    if isinstance(error.__cause__, DNSException):
        return True
    if isinstance(error, ConnectionFailure | ProtocolError):
        return True
    if isinstance(error, OperationFailure) and error.code in TRANSIENT_ERROR_CODES:
        return True
    # For example a query that timed out, or a server that is shutting down.
    return isinstance(error, PyMongoError) and (
        error.timeout or error.has_error_label("RetryableWriteError")
    )


def get_error_name(error: Exception) -> str:
    """Return MongoDB's name for the error, or else PyMongo's.

    The message could contain part of a document.
    """
    details: Mapping[str, Any] = {}
    if isinstance(error, OperationFailure):
        details = error.details or {}
    return str(details.get("codeName") or type(error).__name__)


def record_outage() -> None:
    """Open the circuit breaker unless MongoDB has responded within RETRY_INTERVAL."""
    global next_attempt
    is_open = next_attempt > 0
    if not is_open and monotonic() - last_response > RETRY_INTERVAL:
        next_attempt = monotonic() + RETRY_INTERVAL
        logger.error("MongoDB is not responding. Is it running, and is MONGO_URI correct?")


def record_response() -> None:
    """Close the circuit breaker."""
    global last_response, next_attempt
    last_response = monotonic()
    is_open = next_attempt > 0
    if is_open:
        next_attempt = 0.0
        logger.warning("MongoDB is responding again.")


# Unique index


def is_unique_on_email(index: Mapping[str, Any]) -> bool:
    """Return whether an index, as index_information() describes it, makes all emails unique."""
    is_unique = index.get("unique", False)
    is_on_email = index["key"] in ([("email", 1)], [("email", -1)])
    # A collation is a way to compare text. One that ignores case would change which emails differ.
    has_filter_or_collation = "partialFilterExpression" in index or "collation" in index
    return is_unique and is_on_email and not has_filter_or_collation


def ensure_unique_index() -> None:
    """Create a unique index on `email` unless there is one under any name."""
    if not any(is_unique_on_email(index) for index in users.index_information().values()):
        users.create_index("email", unique=True)


def prepare_collection() -> None:
    """Create the index, or leave that to create_user if MongoDB is unavailable."""
    try:
        with circuit_breaker():
            ensure_unique_index()
    except DatabaseUnavailable:
        return
    except DatabaseError as error:
        abort_startup(f"MongoDB at MONGO_URI is not usable ({error.error_name}); see README.md.")


# Queries


class Session(TypedDict):
    """A session. generation counts the refreshes; issued_at is the time of the newest tokens."""

    sid: str
    generation: int
    issued_at: datetime


MAX_SESSIONS = 20
MAX_LOGIN_FAILURES = 100


@circuit_breaker()
def create_user(email: str, password_hash: str, session: Session, network: str) -> str | None:
    """Store a user and a session. Return the user's id, or None if the email is taken."""
    # The collection may have been dropped, together with its index.
    ensure_unique_index()
    user: Document = {
        "email": email,
        "password_hash": password_hash,
        "created_at": session["issued_at"],
        "refresh_tokens": [{**session, "network": network}],
    }
    try:
        return str(users.insert_one(user).inserted_id)
    except DuplicateKeyError:
        is_taken = users.find_one({"email": email}, {"_id": 1}) is not None
        if is_taken:
            return None
        # Another program has a unique index. circuit_breaker raises DatabaseError.
        raise


@circuit_breaker()
def find_user_by_email(email: str) -> Document | None:
    """Return the user's id, password hash and failed logins, or None."""
    projection = {"email": 1, "password_hash": 1, "login_failures": 1}
    user = users.find_one({"email": email}, projection)
    # Documents of other programs may have other types, such as a list of emails or a numeric _id.
    is_usable = (
        user is not None
        and isinstance(user["_id"], ObjectId)
        and isinstance(user["email"], str)
        and isinstance(user.get("password_hash"), str)
    )
    return user if is_usable else None


@circuit_breaker()
def find_user_by_session(user_id: str, sid: str) -> Document | None:
    """Return the user's email and created_at, or None if the user or session does not exist."""
    query = {"_id": ObjectId(user_id), "refresh_tokens.sid": sid}
    user = users.find_one(query, {"email": 1, "created_at": 1})
    # Documents of other programs may lack these fields or have other types.
    if user is None or not isinstance(user.get("email"), str):
        return None
    if not isinstance(user.get("created_at"), datetime):
        user["created_at"] = user["_id"].generation_time
    return user


@circuit_breaker()
def replace_password_hash(user_id: str, old_hash: str, new_hash: str) -> bool:
    """Replace the password hash if it is still the old one. Return whether it was."""
    user = {"_id": ObjectId(user_id), "password_hash": old_hash}
    change = {"$set": {"password_hash": new_hash}}
    return users.update_one(user, change).matched_count == 1


@circuit_breaker()
def record_failed_login(email: str, network: str, failed_at: datetime) -> None:
    """Add a failed login and keep the newest ones. Does nothing for an unknown email."""
    failure = {"network": network, "failed_at": failed_at}
    # $slice needs $each. A negative number keeps the last elements.
    push = {"$each": [failure], "$slice": -MAX_LOGIN_FAILURES}
    # The update of an unknown email writes nothing. A write that waited for other servers or the
    # journal would take longer, which would reveal that the email is registered.
    fast_users = users.with_options(write_concern=WriteConcern(1))
    fast_users.update_one({"email": email}, {"$push": {"login_failures": push}})


@circuit_breaker()
def has_session_since(user_id: str, network: str, since: datetime) -> bool:
    """Return whether a session of the network has been refreshed or started since then."""
    session = {"network": network, "issued_at": {"$gt": since}}
    query = {"_id": ObjectId(user_id), "refresh_tokens": {"$elemMatch": session}}
    return users.find_one(query, {"_id": 1}) is not None


@circuit_breaker()
def add_session(user_id: str, verified_hash: str, session: Session, network: str) -> bool:
    """Add a session and drop the failed logins of its network.

    Return whether the user still exists with the password hash that was verified. Otherwise, a
    login could continue with a password that was changed in the meantime.
    """
    user = {"_id": ObjectId(user_id), "password_hash": verified_hash}
    # A number in a path is a position. The last one is empty while there is room.
    has_room = {f"refresh_tokens.{MAX_SESSIONS - 1}": {"$exists": False}}
    change = {
        "$push": {"refresh_tokens": {**session, "network": network}},
        "$pull": {"login_failures": {"network": network}},
    }
    # Adds nothing, sorts the sessions by time and keeps the last ones. In one update with the new
    # session, $sort could put the new one first if this server's clock is slow.
    keep_newest = {"$each": [], "$sort": {"issued_at": 1}, "$slice": 1 - MAX_SESSIONS}
    # Repeated if another login takes the room that was made.
    while True:
        is_added = users.update_one(user | has_room, change).matched_count == 1
        if is_added:
            return True
        made_room = users.update_one(user, {"$push": {"refresh_tokens": keep_newest}})
        if made_room.matched_count == 0:
            return False


@circuit_breaker()
def advance_session(user_id: str, next_session: Session) -> bool:
    """Replace the previous generation of the session. Return whether that one was stored.

    The query compares and the update sets in one step, so that only one of two simultaneous
    refreshes succeeds.
    """
    previous = {"sid": next_session["sid"], "generation": next_session["generation"] - 1}
    query = {"_id": ObjectId(user_id), "refresh_tokens": {"$elemMatch": previous}}
    # $ is the position of the session that the query has found.
    changes = {f"refresh_tokens.$.{name}": value for name, value in next_session.items()}
    return users.update_one(query, {"$set": changes}).matched_count == 1


@circuit_breaker()
def find_session(user_id: str, sid: str) -> Session | None:
    """Return the session, or None if it does not exist."""
    query = {"_id": ObjectId(user_id), "refresh_tokens.sid": sid}
    # Of all sessions, return only this one.
    projection = {"refresh_tokens": {"$elemMatch": {"sid": sid}}}
    user = users.find_one(query, projection)
    return user["refresh_tokens"][0] if user else None


@circuit_breaker()
def delete_session(user_id: str, sid: str) -> bool:
    """Delete the session. Return whether it existed."""
    removal = {"$pull": {"refresh_tokens": {"sid": sid}}}
    return users.update_one({"_id": ObjectId(user_id)}, removal).modified_count == 1
