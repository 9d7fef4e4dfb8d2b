"""Passwords, login, tokens, sessions, the current user and the hash queue."""

import asyncio
import ipaddress
import logging
import math
import os
import re
import secrets
import unicodedata
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated

import jwt
from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, VerificationError
from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, Field
from pydantic_core import PydanticCustomError

import db

logger = logging.getLogger("auth_jwt")


SECRET_KEY = os.fsencode(os.getenv("JWT_SECRET_KEY", ""))
if bool(SECRET_KEY) != bool(db.MONGO_URI):
    db.abort_startup("Set both JWT_SECRET_KEY and MONGO_URI, or neither.")
SECRET_KEY = SECRET_KEY or secrets.token_bytes(32)
try:
    # PyJWT checks a key when it signs.
    jwt.PyJWT({"enforce_minimum_key_length": True}).encode({}, SECRET_KEY, "HS256")
except jwt.InvalidKeyError:
    db.abort_startup("JWT_SECRET_KEY must be at least 32 random bytes; see .env.example.")


def read_lifetime(name: str, default: str) -> int:
    """Return the setting as a positive whole number."""
    value = os.getenv(name) or default
    if not re.fullmatch("[1-9][0-9]{0,5}", value):
        db.abort_startup(f"{name} must be a whole number from 1 to 999999.")
    return int(value)


LIFETIMES = {
    "access": timedelta(minutes=read_lifetime("ACCESS_TOKEN_EXPIRE_MINUTES", "15")),
    "refresh": timedelta(days=read_lifetime("REFRESH_TOKEN_EXPIRE_DAYS", "7")),
}


def now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


class InvalidToken(HTTPException):
    """An error response to an invalid token (RFC 6750 section 3.1)."""

    def __init__(self) -> None:
        challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
        super().__init__(401, "The token is invalid, has expired or was revoked", challenge)


@contextmanager
def convert_errors() -> Iterator[None]:
    """Convert errors to a 503 if a retry can succeed, and other database errors to a 500."""
    retry_after = {"Retry-After": "2"}
    try:
        yield
    except db.DatabaseUnavailable:
        raise HTTPException(503, "The database is unavailable; try again", retry_after) from None
    except db.DatabaseError as error:
        logger.error("MongoDB returned an error: %s", error)
        raise HTTPException(500, "Internal server error") from None
    except (Argon2Error, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and str(error) != "can't start new thread":
            raise
        logger.error("The service is overloaded: %r", error)
        raise HTTPException(503, "The service is overloaded; try again", retry_after) from None


# Argon2id with 64 MiB and 3 passes, the second recommended option of RFC 9106.
hasher = PasswordHasher()


def check_password_strength(password: str) -> str:
    """Return the password. Raises PydanticCustomError if it is weak."""
    rules = {
        "at least 8 characters": len(password) >= 8,
        "a lower-case letter": any(map(str.islower, password)),
        "an upper-case letter": any(map(str.isupper, password)),
        "a digit": any(map(str.isdecimal, password)),
        "a symbol": any(unicodedata.category(char)[0] in "PSZ" for char in password),
    }
    unmet = ", ".join(rule for rule, is_met in rules.items() if not is_met)
    if unmet:
        raise PydanticCustomError("weak_password", "The password needs {unmet}", {"unmet": unmet})
    return password


FREE_FAILURES = 4
HOUR = 60 * 60  # seconds


def get_login_wait(user: db.Document, network: str) -> float:
    """Return the seconds until the network may log in; 0 or less means now.

    From its fifth failed login within an hour, a network waits 1, 2, 4, 8 … seconds. After 100
    from all networks, only networks with a session may log in.
    """
    recent = sorted(
        (age, failure["network"])
        for failure in user.get("login_failures", [])
        # An age is negative if a clock was set back.
        if 0 <= (age := (now() - failure["failed_at"]).total_seconds()) < HOUR
    )
    # Newest first. Wait n ends 2**n s after own[0], or when its failure expires.
    own = [age for age, source in recent if source == network]
    waits = [min(2**n - own[0], HOUR - age) for n, age in enumerate(own[FREE_FAILURES:])]
    # find_user_by_email returns only a session of this network.
    if len(recent) == db.MAX_LOGIN_FAILURES and not user.get("refresh_tokens"):
        waits.append(HOUR - recent[-1][0])
    return max(waits, default=0)


# An unknown email must take as long as a wrong password.
UNKNOWN_USER = {"_id": "unknown", "password_hash": hasher.hash(secrets.token_urlsafe())}


def authenticate(email: str, password: str, network: str) -> str | None:
    """Return the user's id, or None if the email or password is wrong. Raises a 429."""
    user = db.find_user_by_email(email, network) or UNKNOWN_USER
    user_id, password_hash = str(user["_id"]), str(user.get("password_hash"))
    wait = get_login_wait(user, network)
    if wait > 0:
        logger.warning("authn_login_lock user=%s network=%s", user_id, network)
        retry_after = {"Retry-After": str(math.ceil(wait))}
        raise HTTPException(429, "Too many failed logins; try again later", retry_after)
    try:
        hasher.verify(password_hash, password)
    except (VerificationError, ValueError) as error:
        # Argon2 lacked memory or a thread.
        if str(error) in ("Memory allocation error", "Threading failure"):
            raise
        db.record_failed_login(email, network, now())
        logger.warning("authn_login_fail user=%s network=%s", user_id, network)
        return None
    if hasher.check_needs_rehash(password_hash):
        db.replace_password_hash(user_id, password_hash, hasher.hash(password))
    return user_id


class Claims(BaseModel, strict=True):
    """The claims of a token (RFC 7519). exp is a Unix time in seconds."""

    type: str
    sub: str = Field(pattern="^[0-9a-f]{24}$")
    sid: str = Field(pattern="^[0-9a-f]{32}$")
    generation: int = Field(ge=0, lt=2**31)
    exp: int


class Tokens(BaseModel):
    """An access token, and a refresh token for the next pair."""

    user_id: str
    access_token: str
    refresh_token: str


def create_tokens(user_id: str, session: db.Session) -> Tokens:
    """Return signed tokens for this generation of the session."""
    claims = {"sub": user_id, "sid": session["sid"], "generation": session["generation"]}
    tokens = {}
    for token_type, lifetime in LIFETIMES.items():
        payload = claims | {"type": token_type, "exp": session["issued_at"] + lifetime}
        tokens[f"{token_type}_token"] = jwt.encode(payload, SECRET_KEY, "HS256")
    return Tokens(user_id=user_id, **tokens)


def read_token(token_type: str, token: str, verify_exp: bool = True) -> Claims:
    """Return the claims of a valid HS256 token of this type (RFC 8725). Raises InvalidToken."""
    try:
        payload = jwt.decode(token, SECRET_KEY, ["HS256"], {"verify_exp": verify_exp})
        claims = Claims.model_validate(payload)
    except (jwt.InvalidTokenError, ValueError):
        raise InvalidToken from None
    if claims.type != token_type:
        raise InvalidToken
    return claims


REUSE_GRACE = timedelta(seconds=60)


def create_session() -> db.Session:
    """Return a new session, not yet stored."""
    return db.Session(sid=secrets.token_hex(16), generation=0, issued_at=now())


def is_within_grace(claims: Claims, session: db.Session) -> bool:
    """Return whether the token was replaced once, less than REUSE_GRACE ago."""
    age = abs(now() - session["issued_at"])
    return session["generation"] == claims.generation + 1 and age < REUSE_GRACE


def rotate_session(refresh_token: str) -> Tokens:
    """Return the tokens of the next generation. Raises InvalidToken.

    A client that lost a response can repeat its token within REUSE_GRACE. Any other replaced or
    expired token may be stolen and revokes the session.
    """
    claims = read_token("refresh", refresh_token, verify_exp=False)
    if claims.exp > now().timestamp():
        session = db.Session(sid=claims.sid, generation=claims.generation + 1, issued_at=now())
        if db.advance_session(claims.sub, session):
            return create_tokens(claims.sub, session)
        stored = db.find_session(claims.sub, claims.sid)
        if stored and is_within_grace(claims, stored):
            logger.info("authn_token_reuse_in_grace user=%s session=%s", claims.sub, claims.sid)
            return create_tokens(claims.sub, stored)
    revoke_session(claims)
    raise InvalidToken


def revoke_session(claims: Claims) -> None:
    """Delete the session of a refresh token if it exists."""
    session = db.find_session(claims.sub, claims.sid)
    if session is None or not db.delete_session(claims.sub, claims.sid):
        return
    if session["generation"] > claims.generation and not is_within_grace(claims, session):
        # The token may be stolen (RFC 9700 section 4.14.2).
        logger.critical("authn_token_reuse user=%s session=%s", claims.sub, claims.sid)
    else:
        logger.info("authn_token_revoked user=%s session=%s", claims.sub, claims.sid)


class User(BaseModel):
    """The current user. created_at is in UTC."""

    id: str
    email: str
    created_at: datetime


bearer = HTTPBearer(description="Paste an access_token.")


def get_current_user(token: Annotated[HTTPAuthorizationCredentials, Depends(bearer)]) -> User:
    """Return the user of the access token in the header. Raises InvalidToken."""
    claims = read_token("access", token.credentials)
    # The routes of an embedding app do not convert errors.
    with convert_errors():
        user = db.find_user_by_session(claims.sub, claims.sid)
    if user is None:
        raise InvalidToken
    return User(id=claims.sub, email=user["email"], created_at=user["created_at"])


CurrentUser = Annotated[User, Depends(get_current_user)]


HASH_SLOTS = 2
HASH_QUEUE_SIZE = 16
REJECTION_DELAY = 0.5  # seconds, to slow a flood
hash_queue: list[str] = []  # the network of each request


async def get_client_network(request: Request) -> str:
    """Return the client's IPv4 address or IPv6 /64 network, or "unknown"."""
    try:
        address = ipaddress.ip_address(request.client.host if request.client else "")
    except ValueError:  # X-Forwarded-For can be forged.
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or ipaddress.IPv6Address(int(address) >> 64 << 64)
    return str(address)


ClientNetwork = Annotated[str, Depends(get_client_network)]


async def join_hash_queue(network: ClientNetwork) -> AsyncIterator[None]:
    """Hold a place in the queue until the route function returns. Raises a 503.

    A network may take a place while it holds fewer places than are free, so that one network
    cannot fill the queue.
    """
    if hash_queue.count(network) >= HASH_QUEUE_SIZE - len(hash_queue):
        await asyncio.sleep(REJECTION_DELAY)
        raise HTTPException(503, "Too many requests at once; try again", {"Retry-After": "1"})
    hash_queue.append(network)
    try:
        yield
    finally:
        hash_queue.remove(network)


async def wait_for_hash_slot() -> AsyncIterator[None]:
    """Hold one of the HASH_SLOTS until the route function returns."""
    yield  # max_concurrency delays the call.


# For routes that hash passwords. Waiting requests use no thread.
LIMIT_HASHING = [
    Depends(join_hash_queue, scope="function"),
    Depends(wait_for_hash_slot, scope="function", max_concurrency=HASH_SLOTS),
]
