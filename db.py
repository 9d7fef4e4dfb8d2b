"""Settings, and the collection `users`.

A user is one document, so each change to a user or a session is one atomic update:

    {_id, email, password_hash, created_at,
     refresh_tokens: [{sid, generation, issued_at, network}],  # the sessions
     login_failures: [{network, failed_at}]}

The sessions are in a field named `refresh_tokens` because existing databases use that name. Times
are in UTC. Other programs may write to the collection, too. A user can log in only if `login_query`
matches the document; created_at, refresh_tokens and login_failures can be missing.
"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import datetime
from io import StringIO
from pathlib import Path
from threading import RLock
from time import monotonic
from typing import Any, NoReturn, TypedDict
from warnings import catch_warnings, filterwarnings

import mongomock
from bson import ObjectId
from bson.errors import InvalidBSON
from dotenv import dotenv_values
from dotenv.parser import parse_stream
from fastapi import HTTPException
from pymongo import MongoClient, ReadPreference, WriteConcern
from pymongo.collection import Collection
from pymongo.errors import DuplicateKeyError, OperationFailure, PyMongoError
from pymongo.read_concern import ReadConcern

logger = logging.getLogger("auth_jwt")

Document = dict[str, Any]


# Settings


def abort_startup(reason: str) -> NoReturn:
    """Print the reason and exit with status 3, which also ends `uvicorn --workers`."""
    print(f"auth-jwt cannot start: {reason}", file=sys.stderr)
    # `from None` keeps an earlier error, which could quote a secret, out of uvicorn's traceback.
    raise SystemExit(3) from None


def find_env_file() -> Path | None:
    """Return the path of the nearest .env, in the folder of this file or above."""
    for folder in Path(__file__).absolute().parents:
        path = folder / ".env"
        # A virtual environment can be a folder named .env. lexists() also finds a broken link, so
        # that reading it is an error.
        if os.path.lexists(path) and not path.is_dir():
            return path
    return None


def read_env_file(path: Path) -> dict[str, str | None]:
    """Return the settings in the file. Exits if a line is malformed."""
    # The file can be a named pipe, which can be read only once.
    text = path.read_text(encoding="utf-8-sig")
    # dotenv_values() would skip a malformed line.
    if any(binding.error for binding in parse_stream(StringIO(text))):
        abort_startup(f"{path} must consist of lines of the form NAME=value.")
    return dotenv_values(stream=StringIO(text))


ENV_FILE = find_env_file()
ENV_SETTINGS = read_env_file(ENV_FILE) if ENV_FILE else {}


def read_setting(name: str, default: str = "") -> str:
    """Return the setting from the environment or else from .env, or the default if it is empty.

    White space around it is removed, because a secret in a file often ends with a newline.
    """
    value = os.environ.get(name, ENV_SETTINGS.get(name))
    return (value or "").strip() or default


MONGO_URI = read_setting("MONGO_URI")
MONGO_DB_NAME = read_setting("MONGO_DB_NAME", "auth_db")


# Connection

# The limit for one query, including the selection of a server and retries.
TIMEOUT_MS = 2500


def get_collection() -> Collection[Document]:
    """Return the MongoDB collection `users`, or one in memory if MONGO_URI is not set.

    PyMongo connects at the first query, so the service can start before MongoDB.
    """
    if not MONGO_URI:
        return mongomock.MongoClient(tz_aware=True)["memory"]["users"]
    try:
        with catch_warnings(action="default"):
            # PyMongo only warns about an invalid option. A misspelled TLS option would disable TLS,
            # so these warnings are raised as errors. The other warnings are harmless.
            filterwarnings("error", "Unknown option|The value of|authMechanism must")
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
        # These settings take precedence over the options in MONGO_URI. A change that was reported
        # to the client must survive a failover.
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
        abort_startup(f"MONGO_URI or MONGO_DB_NAME is invalid ({type(error).__name__}).")


users = get_collection()


# Outages


class DatabaseUnavailable(HTTPException):
    """The 503 response while MongoDB is unavailable. A retry can succeed."""

    def __init__(self) -> None:
        super().__init__(503, "The database is unavailable; try again", {"Retry-After": "2"})


RETRY_INTERVAL = 1.0  # seconds

# Values of monotonic(). During an outage, next_attempt is the time from which one query may be
# tried. Otherwise, it is None.
last_response = float("-inf")
next_attempt: float | None = None

# mongomock is not thread-safe.
memory_lock = nullcontext() if MONGO_URI else RLock()


@contextmanager
def circuit_breaker() -> Iterator[None]:
    """Run queries in a `with` statement or a decorated function.

    Raises DatabaseUnavailable during an outage, and a 500 for another error of MongoDB. An outage
    begins when a query gets no usable response and no other query has had one for RETRY_INTERVAL.
    The next usable response ends it, even if it is an error. Until then, about one query per
    RETRY_INTERVAL is tried, because each one can occupy a thread for TIMEOUT_MS.
    """
    global last_response, next_attempt
    # Read once, because another thread can end the outage at any time.
    scheduled_attempt = next_attempt
    if scheduled_attempt is not None:
        if monotonic() < scheduled_attempt:
            raise DatabaseUnavailable
        next_attempt = monotonic() + RETRY_INTERVAL

    failure = None
    try:
        with memory_lock:
            yield
    except (PyMongoError, InvalidBSON) as error:
        failure = error

    if failure and is_outage(failure):
        # While other queries get responses, this may just be a lost connection.
        is_responding = monotonic() - last_response <= RETRY_INTERVAL
        if next_attempt is None and not is_responding:
            next_attempt = monotonic() + RETRY_INTERVAL
            logger.error(
                "MongoDB is not responding (%s). Is it running, and is MONGO_URI correct?",
                get_error_name(failure),
            )
        raise DatabaseUnavailable from None

    # MongoDB has responded, possibly with an error.
    last_response = monotonic()
    if next_attempt is not None:
        next_attempt = None
        logger.warning("MongoDB is responding again.")
    if failure:
        logger.error("MongoDB returned an error: %s", get_error_name(failure))
        raise HTTPException(500, "Internal server error") from None


def is_outage(error: Exception) -> bool:
    """Return whether the error is temporary, so that a retry may succeed."""
    if isinstance(error, OperationFailure):
        # For example a query that timed out, or a server that is shutting down.
        return error.timeout or error.has_error_label("RetryableWriteError")
    # InvalidBSON is a document that cannot be decoded. Other errors mostly concern the connection.
    return not isinstance(error, InvalidBSON)


def get_error_name(error: Exception) -> str:
    """Return MongoDB's name for the error, or else PyMongo's.

    The message of the error could quote a document.
    """
    details: Mapping[str, Any] = {}
    if isinstance(error, OperationFailure):
        details = error.details or {}
    return str(details.get("codeName") or type(error).__name__)


# Unique index

# IndexOptionsConflict: same keys, another name. IndexKeySpecsConflict: same name, other options.
INDEX_CONFLICTS = (85, 86)


def ensure_unique_index() -> None:
    """Create a unique index on `email` unless there is an equivalent one. Waits for its build."""
    try:
        users.create_index("email", unique=True)
    except OperationFailure as error:
        if error.code not in INDEX_CONFLICTS:
            raise
        for name, index in users.index_information().items():
            if is_unique_on_email(index):
                # An index is listed before it is built. Creating it again waits for the build.
                is_sparse = index.get("sparse", False)
                users.create_index("email", name=name, unique=True, sparse=is_sparse)
                return
        raise


def is_unique_on_email(index: Mapping[str, Any]) -> bool:
    """Return whether an index, as index_information() describes it, makes all emails unique."""
    # With a collation, an index can treat Ä and A as equal.
    has_filter_or_collation = "partialFilterExpression" in index or "collation" in index
    is_on_email = index["key"] == [("email", 1)]
    return bool(index.get("unique")) and is_on_email and not has_filter_or_collation


def prepare_collection() -> None:
    """Create the index. If MongoDB is unavailable, create_user creates it later."""
    try:
        with circuit_breaker():
            ensure_unique_index()
    except DatabaseUnavailable:
        return
    except HTTPException:
        abort_startup("MongoDB returned the error above.")


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
        users.insert_one(user)
    except DuplicateKeyError:
        if users.find_one({"email": email}, {"_id": 1}) is not None:
            return None
        # The other user has been deleted meanwhile, so retry once. A violation of another unique
        # index raises an error again.
        users.insert_one(user)
    return str(user["_id"])


def login_query(email: str) -> Document:
    """Return a filter for the user with this email, if it is a user of this service."""
    # In MongoDB, a condition also matches an array with such an element, so arrays are excluded.
    not_array = {"$not": {"$type": "array"}}
    return {
        "_id": {"$type": "objectId"},
        "email": {"$eq": email, **not_array},
        "password_hash": {"$regex": r"^\$argon2id\$", **not_array},
    }


@circuit_breaker()
def find_user_by_email(email: str) -> Document | None:
    """Return the user's id, password hash and failed logins, or None."""
    return users.find_one(login_query(email), {"password_hash": 1, "login_failures": 1})


@circuit_breaker()
def find_user_by_session(user_id: str, sid: str) -> Document | None:
    """Return the user's email and created_at, or None if the user or session does not exist."""
    query = {"_id": ObjectId(user_id), "refresh_tokens.sid": sid}
    user = users.find_one(query, {"email": 1, "created_at": 1})
    # Another program may have changed or omitted these fields.
    if user is None or not isinstance(user.get("email"), str):
        return None
    if not isinstance(user.get("created_at"), datetime):
        user["created_at"] = user["_id"].generation_time
    return user


@circuit_breaker()
def record_failed_login(email: str, network: str, failed_at: datetime) -> None:
    """Add a failed login and keep the newest ones. Does nothing for an unknown email."""
    failure = {"network": network, "failed_at": failed_at}
    # $slice needs $each. A negative number keeps the last elements.
    push = {"$each": [failure], "$slice": -MAX_LOGIN_FAILURES}
    # With a majority, a matching update would wait for replication, and others usually would not.
    # The duration of a 401 would then reveal whether the email is registered.
    users_w1 = users.with_options(write_concern=WriteConcern(1))
    users_w1.update_one(login_query(email), {"$push": {"login_failures": push}})


@circuit_breaker()
def has_session_since(user_id: str, network: str, since: datetime) -> bool:
    """Return whether the user has a session from the network with tokens issued after that time."""
    session = {"network": network, "issued_at": {"$gt": since}}
    query = {"_id": ObjectId(user_id), "refresh_tokens": {"$elemMatch": session}}
    return users.find_one(query, {"_id": 1}) is not None


@circuit_breaker()
def add_session(
    user_id: str, verified_hash: str, new_hash: str, session: Session, network: str
) -> bool:
    """Add a session, keep the newest ones, set the hash and drop the failed logins of the network.

    Return whether the user still exists with the verified hash. The query contains this hash, so
    that no session is added if the password was changed in the meantime.
    """
    query = {"_id": ObjectId(user_id), "password_hash": verified_hash}
    newest_sessions = {
        "$each": [{**session, "network": network}],
        "$sort": {"issued_at": 1},
        "$slice": -MAX_SESSIONS,
    }
    changes = {
        "$set": {"password_hash": new_hash},
        "$push": {"refresh_tokens": newest_sessions},
        "$pull": {"login_failures": {"network": network}},
    }
    return users.update_one(query, changes).matched_count == 1


@circuit_breaker()
def advance_session(user_id: str, next_session: Session) -> bool:
    """Store the next generation of a session if the previous one is current. Return whether it was.

    The query compares and the update sets in one step, so only one of two simultaneous refreshes
    advances the session.
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
    # Return only this one of all sessions.
    projection = {"refresh_tokens": {"$elemMatch": {"sid": sid}}}
    user = users.find_one(query, projection)
    return user["refresh_tokens"][0] if user else None


@circuit_breaker()
def delete_session(user_id: str, sid: str) -> Session | None:
    """Delete the session. Return it as it was, or None if it does not exist.

    Even if nothing matches, MongoDB waits until a majority of the servers has all earlier writes.
    Usually, it already has them. So a repeated logout is acknowledged only when the first one
    survives a failover.
    """
    query = {"_id": ObjectId(user_id), "refresh_tokens.sid": sid}
    projection = {"refresh_tokens": {"$elemMatch": {"sid": sid}}}
    removal = {"$pull": {"refresh_tokens": {"sid": sid}}}
    user = users.find_one_and_update(query, removal, projection)
    return user["refresh_tokens"][0] if user else None
