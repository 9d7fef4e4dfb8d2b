"""The users: one MongoDB collection, and everything that the service asks of it.

A user is {_id, email, password_hash, created_at, refresh_tokens: [Session, …]}; times are aware and in UTC.
A question or a change raises DatabaseError when MongoDB refuses it or does not answer in about TIMEOUT_MS.
"""

import atexit
import os
import re
import sys
import threading
import warnings
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, TypedDict

import pymongo
from bson import ObjectId
from dotenv import load_dotenv
from pymongo import MongoClient, ReadPreference, WriteConcern
from pymongo.errors import DuplicateKeyError
from pymongo.errors import PyMongoError as DatabaseError


def refuse_to_start(reason: str) -> NoReturn:
    """Print the reason as one line and exit with 3, which tells `uvicorn --workers` not to try again."""
    print(f"auth-jwt cannot start: {reason}", file=sys.stderr)
    sys.exit(3)


try:
    load_dotenv(Path(__file__).with_name(".env"), encoding="utf-8-sig")
except (OSError, ValueError):
    refuse_to_start(".env cannot be read; save it as plain text in UTF-8.")

MONGO_URI = os.getenv("MONGO_URI")
MONGO_DB_NAME = os.getenv("MONGO_DB_NAME") or "auth_db"
TIMEOUT_MS = 2500  # for an operation, from finding a server to the last retry
SESSIONS_KEPT = 20


class Session(TypedDict):
    """One login of a user: it describes the session's current refresh token without being one."""

    sid: str
    generation: int
    issued_at: datetime
    expires_at: datetime


def open_users():
    """Return the collection in MongoDB; nothing is sent before its first use.

    A write is acknowledged once it is in the journal of a majority of the servers, so none that was acknowledged
    is lost with a process or a primary. Reads ask the primary: a session that has ended is ended at once.
    """
    if not re.fullmatch("[A-Za-z0-9_-]{1,63}", MONGO_DB_NAME):
        refuse_to_start("MONGO_DB_NAME is no name for a database; use up to 63 letters, digits, - and _.")
    try:
        if not re.match(r"mongodb(\+srv)?://", MONGO_URI):
            raise ValueError
        MONGO_URI.encode()  # raises ValueError for bytes that are no UTF-8
        with warnings.catch_warnings(action="error"):  # PyMongo only warns of an option that it does not understand
            client = MongoClient(MONGO_URI, connect=False, tz_aware=True, timeoutMS=TIMEOUT_MS)
        atexit.register(client.close)
        return client[MONGO_DB_NAME].get_collection(
            "users", read_preference=ReadPreference.PRIMARY, write_concern=WriteConcern("majority", j=True)
        )
    except (DatabaseError, OSError, ValueError, TypeError, Warning):  # their texts may quote the URI, password and all
        refuse_to_start(
            "MONGO_URI is malformed; write mongodb://user:password@host:port or mongodb+srv://user:password@host, "
            "percent-encode special characters in user and password, and check the options behind the question mark "
            "and the files that they name."
        )


def open_users_in_memory():
    """Return a mongomock collection whose operations are atomic, as MongoDB's are on one document."""
    import mongomock

    collection = mongomock.MongoClient(tz_aware=True)[MONGO_DB_NAME]["users"]
    lock = threading.Lock()

    def one_at_a_time(operation):
        @wraps(operation)
        def locked(*args, **kwargs):
            with lock:
                return operation(*args, **kwargs)

        return locked

    for operation in (collection.insert_one, collection.find_one, collection.update_one):
        setattr(collection, operation.__name__, one_at_a_time(operation))
    return collection


users = open_users() if MONGO_URI else open_users_in_memory()


def create_index() -> None:
    """Make emails unique. The first thing that MongoDB is asked: raises RuntimeError when there is no usable one."""
    try:
        with pymongo.timeout(8):  # seconds; the first connection may be a slow one, and an index takes its time
            users.create_index("email", unique=True)
    except DatabaseError as error:
        # Raised, so that it is the last line of uvicorn's traceback; refuse_to_start would print it above that.
        raise RuntimeError(
            f"auth-jwt cannot start: no usable MongoDB at MONGO_URI ({type(error).__name__}); "
            "see that it runs, that the address is right and that its user may write to MONGO_DB_NAME."
        ) from None


def create_user(email: str, password_hash: str, session: Session) -> str | None:
    """Store a user with their first session and return the new id, or None if the email is taken."""
    user = {
        "email": email,
        "password_hash": password_hash,
        "created_at": session["issued_at"],
        "refresh_tokens": [session],
    }
    try:
        return str(users.insert_one(user).inserted_id)
    except DuplicateKeyError:
        return None


def find_user_by_email(email: str) -> dict[str, Any] | None:
    """Return the user's _id and password_hash, or None."""
    return users.find_one({"email": email}, {"password_hash": 1})


def find_user_in_session(user_id: str, sid: str) -> dict[str, Any] | None:
    """Return the user's email and created_at, or None if the user is gone or the session has ended."""
    return users.find_one({"_id": ObjectId(user_id), "refresh_tokens.sid": sid}, {"email": 1, "created_at": 1})


def replace_password_hash(user_id: str, old_hash: str, new_hash: str) -> None:
    """Put the new hash in the old one's place, unless that was replaced in the meantime."""
    users.update_one({"_id": ObjectId(user_id), "password_hash": old_hash}, {"$set": {"password_hash": new_hash}})


def add_session(user_id: str, session: Session) -> bool:
    """Add a session, the newest SESSIONS_KEPT stay; return False if the user is gone."""
    newest = {"$each": [session], "$slice": -SESSIONS_KEPT}
    return users.update_one({"_id": ObjectId(user_id)}, {"$push": {"refresh_tokens": newest}}).matched_count == 1


def find_session(user_id: str, sid: str) -> Session | None:
    """Return the session, or None if it has ended or the user is gone."""
    user = users.find_one({"_id": ObjectId(user_id), "refresh_tokens.sid": sid}, {"refresh_tokens": 1})
    return user and next(session for session in user["refresh_tokens"] if session["sid"] == sid)


def rotate_session(user_id: str, session: Session) -> bool:
    """Store this generation of the session if the one before it is the current one; return whether it was.

    The condition and the change are one operation: of any number of callers, one succeeds.
    """
    previous = {"sid": session["sid"], "generation": session["generation"] - 1}
    return (
        users.update_one(
            {"_id": ObjectId(user_id), "refresh_tokens": {"$elemMatch": previous}},
            {"$set": {"refresh_tokens.$": session}},
        ).matched_count
        == 1
    )


def end_session(user_id: str, sid: str) -> bool:
    """End the session if it still stands; return False if the user is gone."""
    return users.update_one({"_id": ObjectId(user_id)}, {"$pull": {"refresh_tokens": {"sid": sid}}}).matched_count == 1
