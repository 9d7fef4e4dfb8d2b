"""Passwords, login, tokens, sessions, the current user and the hash queue."""

import asyncio
import ipaddress
import logging
import math
import os
import re
import secrets
import unicodedata
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

import jwt
from argon2 import PasswordHasher
from argon2.exceptions import HashingError, VerificationError
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
        db.refuse_to_start("JWT_SECRET_KEY must be 32 random bytes or more; see .env.example.")
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


def now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


class InvalidToken(HTTPException):
    """The token is invalid (RFC 6750 section 3.1)."""

    def __init__(self) -> None:
        challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
        super().__init__(401, "The token is invalid, has expired or was revoked", challenge)


class TryAgain(HTTPException):
    """A temporary error, with the seconds until a retry."""

    def __init__(self, status_code: int, detail: str, seconds: int) -> None:
        super().__init__(status_code, detail, {"Retry-After": str(seconds)})


def convert_database_error(error: PyMongoError) -> HTTPException:
    """Return the error response: 503 if the same request can succeed later, otherwise 500."""
    if isinstance(error, db.DatabaseUnavailable):
        return TryAgain(503, "The database is unavailable; try again", seconds=2)
    logger.error("MongoDB returned an error: %s", db.get_error_name(error))
    return HTTPException(500, "Internal server error")


# Argon2id with 64 MiB and 3 passes, the second recommended option of RFC 9106.
hasher = PasswordHasher()
DUMMY_HASH = hasher.hash(secrets.token_urlsafe())


def normalize_password(password: object) -> object:
    """Return the password in Unicode NFC (RFC 8265). Pydantic rejects what is not a string."""
    return unicodedata.normalize("NFC", password) if isinstance(password, str) else password


def check_password_strength(password: str) -> str:
    """Return the password. Raises PydanticCustomError if it is weak."""
    rules = {
        "at least 8 characters": len(password) >= 8,
        "a lower-case letter": any(map(str.islower, password)),
        "an upper-case letter": any(map(str.isupper, password)),
        "a digit": any(map(str.isdecimal, password)),
        # Unicode punctuation, symbols and spaces.
        "a symbol": any(unicodedata.category(character)[0] in "PSZ" for character in password),
    }
    if not all(rules.values()):
        missing = ", ".join(rule for rule, is_met in rules.items() if not is_met)
        raise PydanticCustomError(
            "weak_password", "The password needs {missing}", {"missing": missing}
        )
    return password


def verify_password(password_hash: str, password: str) -> bool:
    """Return whether the password matches. Raises HashingError if that cannot be computed."""
    try:
        return hasher.verify(password_hash, password)
    except VerificationError as error:
        # argon2-cffi raises the same exception for a malformed hash.
        if str(error) in ("Memory allocation error", "Threading failure"):
            raise HashingError(str(error)) from None
        return False
    except ValueError:  # not an Argon2 hash
        return False


FREE_LOGIN_FAILURES = 4
FAILURE_LIFETIME = 60 * 60  # seconds


def get_login_wait(user: db.Document, network: str) -> float:
    """Return the seconds until a client in the network may try to log in; 0 or less means now.

    The fifth failed login of a network starts a wait of one second, and each further one doubles
    it. After MAX_LOGIN_FAILURES of all networks, only those that have a session may try. Each
    failure counts for an hour.
    """
    ages = [
        ((now() - failure["failed_at"]).total_seconds(), failure["network"])
        for failure in user.get("login_failures", [])
    ]
    # An age is negative if a clock was set back.
    recent = sorted((age, source) for age, source in ages if 0 <= age < FAILURE_LIFETIME)
    own = [age for age, source in recent if source == network]
    waits = [
        min(2**n - own[0], FAILURE_LIFETIME - age)
        for n, age in enumerate(own[FREE_LOGIN_FAILURES:])
    ]
    if len(recent) == db.MAX_LOGIN_FAILURES and not user.get("refresh_tokens"):
        waits.append(FAILURE_LIFETIME - recent[-1][0])
    return max(waits, default=0)


def authenticate(email: str, password: str, network: str) -> str | None:
    """Return the user's id, or None if the email or password is wrong. Raises TryAgain."""
    user = db.find_user_by_email(email, network)
    if user is None:
        # An unknown email must take as long as a wrong password.
        verify_password(DUMMY_HASH, password)
        db.record_failed_login(email, network, now())
        logger.warning("authn_login_fail user=unknown network=%s", network)
        return None
    user_id, password_hash = str(user["_id"]), str(user.get("password_hash"))
    wait = get_login_wait(user, network)
    if wait > 0:
        logger.warning("authn_login_lock user=%s network=%s", user_id, network)
        raise TryAgain(429, "Too many failed logins; try again later", math.ceil(wait))
    if not verify_password(password_hash, password):
        db.record_failed_login(email, network, now())
        logger.warning("authn_login_fail user=%s network=%s", user_id, network)
        return None
    if hasher.check_needs_rehash(password_hash):
        db.replace_password_hash(user_id, password_hash, hasher.hash(password))
    return user_id


class Claims(BaseModel, strict=True):
    """The claims of a token (RFC 7519 section 4). exp is in seconds since 1970."""

    type: Literal["access", "refresh"]
    sub: str = Field(pattern="^[0-9a-f]{24}$")
    sid: str = Field(pattern="^[0-9a-f]{32}$")
    generation: int = Field(ge=0, lt=2**31)
    exp: int


def create_token(token_type: str, user_id: str, session: db.Session) -> str:
    """Return a signed token for this generation of the session."""
    claims = {
        "type": token_type,
        "sub": user_id,
        "sid": session["sid"],
        "generation": session["generation"],
        "exp": session["issued_at"] + LIFETIMES[token_type],
    }
    return jwt.encode(claims, SECRET_KEY, "HS256")


def read_token(token_type: str, token: str, verify_exp: bool = True) -> Claims:
    """Return the claims of a valid token of this type (RFC 8725). Raises InvalidToken."""
    try:
        payload = jwt.decode(token, SECRET_KEY, ["HS256"], {"verify_exp": verify_exp})
        claims = Claims.model_validate(payload)
    # UnicodeEncodeError: a lone surrogate.
    except (jwt.InvalidTokenError, ValidationError, UnicodeEncodeError):
        raise InvalidToken from None
    if claims.type != token_type:
        raise InvalidToken
    return claims


REUSE_GRACE = timedelta(seconds=60)


def create_session() -> db.Session:
    """Return a new session, not yet stored."""
    return {"sid": secrets.token_hex(16), "generation": 0, "issued_at": now()}


def may_be_retry(claims: Claims, session: db.Session) -> bool:
    """Return whether the token was replaced so recently that the client may lack the new one."""
    age = now() - session["issued_at"]
    return session["generation"] == claims.generation + 1 and age < REUSE_GRACE


def rotate_session(refresh_token: str) -> tuple[str, db.Session]:
    """Return the user's id and the session in its next generation. Raises InvalidToken.

    A client that did not receive the response sends the replaced token again. That is accepted
    for REUSE_GRACE and returns the same generation. Any other reuse revokes the session.
    """
    # Also an expired token can reveal that a thief has refreshed the session.
    claims = read_token("refresh", refresh_token, verify_exp=False)
    session: db.Session | None
    session = {"sid": claims.sid, "generation": claims.generation + 1, "issued_at": now()}
    if claims.exp > session["issued_at"].timestamp():
        if db.advance_session(claims.sub, session):
            return claims.sub, session
        session = db.find_session(claims.sub, claims.sid)
        if session and may_be_retry(claims, session):
            logger.info("authn_token_reuse_in_grace user=%s session=%s", claims.sub, claims.sid)
            return claims.sub, session
    revoke_session(refresh_token)
    raise InvalidToken


def revoke_session(refresh_token: str) -> None:
    """Delete the session of a refresh token, even a replaced or expired one. Raises InvalidToken.

    If the token was replaced, two clients may have used it, of which one is a thief (RFC 9700
    section 4.14.2).
    """
    claims = read_token("refresh", refresh_token, verify_exp=False)
    session = db.delete_session(claims.sub, claims.sid)
    if session is None:
        return
    if session["generation"] > claims.generation and not may_be_retry(claims, session):
        logger.critical("authn_token_reuse user=%s session=%s", claims.sub, claims.sid)
    else:
        logger.info("authn_token_revoked user=%s session=%s", claims.sub, claims.sid)


class User(BaseModel):
    """The current user. created_at is in UTC."""

    id: str
    email: str
    created_at: datetime


bearer = HTTPBearer(description="Paste the access_token from the response to a login.")


def get_current_user(token: Annotated[HTTPAuthorizationCredentials, Depends(bearer)]) -> User:
    """Return the user of the access token in the header. Raises InvalidToken."""
    claims = read_token("access", token.credentials)
    try:
        user = db.find_user_by_session(claims.sub, claims.sid)
    # The routes of an embedding app do not use AuthRoute.
    except PyMongoError as error:
        raise convert_database_error(error) from None
    if user is None:
        raise InvalidToken
    return User(id=claims.sub, email=user["email"], created_at=user["created_at"])


CurrentUser = Annotated[User, Depends(get_current_user)]


# The hash queue limits the cost of hashing, and shares it among the networks.

MAX_CONCURRENT_HASHES = 2
HASH_QUEUE_SIZE = 16  # including those that hash
REJECTION_DELAY = 0.5  # seconds, to slow down a flood
hash_queue: list[str] = []  # the network of each request


async def get_client_network(request: Request) -> str:
    """Return the client's IPv4 address, or the first address of its IPv6 /64 network.

    Return "unknown" for what is not an address, such as a forged X-Forwarded-For header.
    """
    try:
        address = ipaddress.ip_address(request.client.host if request.client else "")
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(address) >> 64 << 64))


ClientNetwork = Annotated[str, Depends(get_client_network)]


async def join_hash_queue(network: ClientNetwork) -> AsyncIterator[None]:
    """Hold a place in the queue until the route function returns. Raises TryAgain.

    A network may take a place while it holds fewer places than are free, so a flood from one
    network leaves half of the queue to others.
    """
    # There is no await between the check and the append, so no lock is needed.
    if hash_queue.count(network) >= HASH_QUEUE_SIZE - len(hash_queue):
        await asyncio.sleep(REJECTION_DELAY)
        raise TryAgain(503, "Too many logins at once; try again", seconds=1)
    hash_queue.append(network)
    try:
        yield
    finally:
        hash_queue.remove(network)


async def wait_for_hash_slot() -> AsyncIterator[None]:
    """Hold a slot until the route function returns. FastAPI limits how many are held."""
    yield


# For routes that hash passwords. Waiting requests use no thread.
HASH_QUEUE = [
    Depends(join_hash_queue, scope="function"),
    Depends(wait_for_hash_slot, scope="function", max_concurrency=MAX_CONCURRENT_HASHES),
]
