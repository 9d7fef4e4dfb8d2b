"""Passwords, tokens, sessions and the current user."""

import asyncio
import ipaddress
import logging
import math
import os
import re
import secrets
import unicodedata
import uuid
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

import jwt
from argon2 import PasswordHasher
from argon2.exceptions import VerificationError
from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import PydanticCustomError
from pymongo.errors import PyMongoError

import db

logger = logging.getLogger("auth_jwt")


def read_secret_key() -> bytes:
    """Return JWT_SECRET_KEY, or a random key if users are kept in memory."""
    key = os.fsencode(os.getenv("JWT_SECRET_KEY", ""))
    if bool(key) != bool(db.MONGO_URI):
        db.refuse_to_start("Set both JWT_SECRET_KEY and MONGO_URI, or neither.")
    if not key:
        return secrets.token_bytes(32)
    try:
        # PyJWT checks a key when it is used.
        jwt.PyJWT({"enforce_minimum_key_length": True}).encode({}, key, "HS256")
    except jwt.InvalidKeyError:
        db.refuse_to_start("JWT_SECRET_KEY must be at least 32 random bytes and not a public key.")
    return key


def read_lifetime(name: str, default: str) -> int:
    """Return the setting as a positive whole number."""
    value = os.getenv(name) or default
    if not re.fullmatch("[1-9][0-9]{0,5}", value):
        db.refuse_to_start(f"{name} must be a whole number from 1 to 999999.")
    return int(value)


SECRET_KEY = read_secret_key()
LIFETIMES = {
    "access": timedelta(minutes=read_lifetime("ACCESS_TOKEN_EXPIRE_MINUTES", "15")),
    "refresh": timedelta(days=read_lifetime("REFRESH_TOKEN_EXPIRE_DAYS", "7")),
}
REUSE_GRACE = timedelta(seconds=10)
FREE_ATTEMPTS = 5
MAX_LOGIN_WAIT = 15 * 60  # seconds


def now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


class InvalidToken(HTTPException):
    """The token is invalid (RFC 6750 section 3.1)."""

    def __init__(self):
        challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
        super().__init__(401, "The token is invalid, has expired or was revoked", challenge)


class TryAgain(HTTPException):
    """A temporary error, with the seconds until a retry."""

    def __init__(self, status_code: int, detail: str, seconds: int):
        super().__init__(status_code, detail, {"Retry-After": str(seconds)})


def create_database_error(error: PyMongoError) -> HTTPException:
    """Return a 503 if the error is temporary, otherwise a 500."""
    if isinstance(error, db.DatabaseUnavailable):
        return TryAgain(503, "The database is unavailable; try again", seconds=2)
    logger.error("MongoDB returned an error: %s", db.get_error_name(error))
    if error.timeout or error.has_error_label("RetryableWriteError"):
        return TryAgain(503, "The database is busy; try again", seconds=2)
    return HTTPException(500, "Internal server error")


PASSWORD_RULES = {
    "at least 8 characters": lambda p: len(p) >= 8,
    "a lower-case letter": lambda p: any(map(str.islower, p)),
    "an upper-case letter": lambda p: any(map(str.isupper, p)),
    "a digit": lambda p: any(map(str.isdecimal, p)),
    "a symbol": lambda p: any(unicodedata.category(c)[0] in "PSZ" for c in p),
}

# Argon2id with 64 MiB and 3 passes, the second recommended option of RFC 9106.
hasher = PasswordHasher()
DUMMY_HASH = hasher.hash(secrets.token_urlsafe())


def normalize_password(password: str) -> str:
    """Return the password in Unicode NFC (RFC 8265). Raises PydanticCustomError."""
    password = unicodedata.normalize("NFC", password)
    if len(password) > 128:
        raise PydanticCustomError("password_too_long", "The password is longer than 128 characters")
    if re.search("[\ud800-\udfff]", password):
        raise PydanticCustomError("string_unicode", "The password contains a lone surrogate")
    return password


def check_new_password(password: str) -> str:
    """Return the normalized password. Raises PydanticCustomError if it is weak."""
    password = normalize_password(password)
    missing = [rule for rule, is_met in PASSWORD_RULES.items() if not is_met(password)]
    if missing:
        raise PydanticCustomError("weak_password", f"The password needs {', '.join(missing)}")
    return password


def get_login_wait(user: dict) -> float:
    """Return the seconds until a login is allowed (exponential lockout); 0 or less means now."""
    failed = user.get("failed_logins", {"count": 0})
    if failed["count"] < FREE_ATTEMPTS:
        return 0
    wait = min(2 ** (failed["count"] - FREE_ATTEMPTS), MAX_LOGIN_WAIT)
    return wait - (now() - failed["last"]).total_seconds()


def authenticate(email: str, password: str, client: str) -> str | None:
    """Return the user's id, or None if the email or password is wrong. Raises TryAgain."""
    user = db.find_user_by_email(email)
    if user is None:
        # An unknown email must take as long as a wrong password.
        user = {"_id": None, "password_hash": DUMMY_HASH}
    user_id, password_hash = str(user["_id"]), user["password_hash"]
    wait = get_login_wait(user)
    if wait > 0:
        logger.warning("authn_login_lock user=%s client=%s", user_id, client)
        raise TryAgain(429, "Too many failed logins; try again later", math.ceil(wait))
    try:
        hasher.verify(password_hash, password)
    # ValueError: not an Argon2 hash.
    except (VerificationError, ValueError):
        logger.warning("authn_login_fail user=%s client=%s", user_id, client)
        db.record_failed_login(email, now())
        return None
    if hasher.check_needs_rehash(password_hash):
        db.replace_password_hash(user_id, password_hash, hasher.hash(password))
    return user_id


# Hashing is expensive, so the number of concurrent hashes is limited.
MAX_CONCURRENT_HASHES = 2
HASH_QUEUE_SIZE = 16  # including those that hash
REJECTION_DELAY = 0.5  # seconds, to slow down a flood
hash_queue = []


def get_network(host: str) -> str:
    """Return the /64 network of an IPv6 host, or the host."""
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        return host
    return host if address.ipv4_mapped else str(int(address) >> 64)


async def join_hash_queue(request: Request):
    """Hold a place in the queue until the route function returns. Yield the client's address.

    A network that holds as many places as are free is rejected, so that others find one (dynamic
    threshold, Choudhury and Hahne 1998). Runs on the event loop, so needs no lock. Raises TryAgain.
    """
    host = request.client.host if request.client else "unknown"
    network = get_network(host)
    if hash_queue.count(network) >= HASH_QUEUE_SIZE - len(hash_queue):
        await asyncio.sleep(REJECTION_DELAY)
        raise TryAgain(503, "Too many logins at once; try again", seconds=1)
    hash_queue.append(network)
    try:
        yield host
    finally:
        hash_queue.remove(network)


async def wait_for_hash_slot(client: Annotated[str, Depends(join_hash_queue, scope="function")]):
    """Yield the client's address. FastAPI does the waiting: see max_concurrency below."""
    yield client


HashingClient = Annotated[
    str, Depends(wait_for_hash_slot, scope="function", max_concurrency=MAX_CONCURRENT_HASHES)
]


class Claims(BaseModel, strict=True):
    """The claims of a token (RFC 7519 section 4)."""

    type: Literal["access", "refresh"]
    sub: str = Field(pattern="^[0-9a-f]{24}$")
    sid: str = Field(pattern="^[0-9a-f]{32}$")
    generation: int = Field(ge=0, lt=2**31)
    iat: int
    exp: int
    jti: str


def create_token(token_type: str, user_id: str, session: db.Session) -> str:
    """Return a signed token for this generation of the session."""
    claims = {
        "type": token_type,
        "sub": user_id,
        "sid": session["sid"],
        "generation": session["generation"],
        "iat": session["issued_at"],
        "exp": session["issued_at"] + LIFETIMES[token_type],
        "jti": uuid.uuid4().hex,
    }
    return jwt.encode(claims, SECRET_KEY, "HS256")


def read_token(token_type: str, token: str) -> Claims:
    """Return the claims of a valid token of this type (RFC 8725). Raises InvalidToken."""
    try:
        # Clocks differ, so a future iat is accepted.
        payload = jwt.decode(token, SECRET_KEY, ["HS256"], {"verify_iat": False})
        claims = Claims.model_validate(payload)
    # UnicodeEncodeError: a lone surrogate.
    except (jwt.InvalidTokenError, ValidationError, UnicodeEncodeError):
        raise InvalidToken from None
    if claims.type != token_type:
        raise InvalidToken
    return claims


def create_session() -> db.Session:
    """Return a new session, not yet stored."""
    return {"sid": uuid.uuid4().hex, "generation": 0, "issued_at": now()}


def rotate_session(refresh_token: str) -> tuple[str, db.Session]:
    """Return the user's id and the rotated session. Raises InvalidToken.

    Within REUSE_GRACE, the replaced token gets the same generation again, because a response can
    get lost. Any other reuse counts as theft and ends the session (RFC 9700 section 4.14.2).
    """
    claims = read_token("refresh", refresh_token)
    rotated = {"sid": claims.sid, "generation": claims.generation + 1, "issued_at": now()}
    current = db.advance_session(claims.sub, rotated)
    if current is None:
        raise InvalidToken
    # 0 if this call has rotated the session.
    age = rotated["issued_at"] - current["issued_at"]
    if current["generation"] == rotated["generation"] and age < REUSE_GRACE:
        return claims.sub, current
    if db.delete_session(claims.sub, claims.sid):
        logger.critical("authn_token_reuse user=%s session=%s", claims.sub, claims.sid)
    raise InvalidToken


def revoke_session(refresh_token: str) -> None:
    """End the session of a refresh token, even a used one. Raises InvalidToken."""
    claims = read_token("refresh", refresh_token)
    deleted = db.delete_session(claims.sub, claims.sid)
    if deleted is None:
        raise InvalidToken
    if deleted:
        logger.info("authn_token_revoked user=%s session=%s", claims.sub, claims.sid)


class User(BaseModel):
    """The current user. created_at is in UTC."""

    id: str
    email: str
    created_at: datetime


def get_current_user(token: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]) -> User:
    """Return the user of the access token in the header. Raises InvalidToken."""
    claims = read_token("access", token.credentials)
    try:
        user = db.find_user_by_session(claims.sub, claims.sid)
    # The routes of an embedding app do not use AuthRoute.
    except PyMongoError as error:
        raise create_database_error(error) from None
    if user is None:
        raise InvalidToken
    return User(id=claims.sub, email=user["email"], created_at=user["created_at"])


CurrentUser = Annotated[User, Depends(get_current_user)]
