"""Settings, passwords, the login limit, login, tokens, sessions, current user and hash queue."""

import ipaddress
import logging
import math
import re
import secrets
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import Annotated, Literal

import jwt
from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, VerifyMismatchError
from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, Field
from pydantic_core import PydanticCustomError

import db

# The names and levels of the security events follow OWASP's Logging Vocabulary.
logger = logging.getLogger("auth_jwt")


# Settings


def read_key() -> bytes:
    """Return the key that signs the tokens, which is random if users are kept in memory."""
    key = db.read_setting("JWT_SECRET_KEY").encode()
    if bool(key) != bool(db.MONGO_URI):
        db.abort_startup("Set both JWT_SECRET_KEY and MONGO_URI, or neither.")
    if not key:
        return secrets.token_bytes(32)
    try:
        # Signing checks that the key is long enough (RFC 7518 section 3.2) and is not a public key.
        jwt.PyJWT({"enforce_minimum_key_length": True}).encode({}, key, algorithm="HS256")
    except jwt.InvalidKeyError:
        db.abort_startup("JWT_SECRET_KEY must be at least 32 random bytes; see .env.example.")
    return key


def read_lifetime(name: str, default: str, maximum: int) -> int:
    """Return the setting as a positive whole number."""
    value = db.read_setting(name, default)
    if not re.fullmatch("[1-9][0-9]{0,5}", value) or int(value) > maximum:
        db.abort_startup(f"{name} must be a whole number from 1 to {maximum}.")
    return int(value)


SECRET_KEY = read_key()
# The maximum of each keeps dates within the years 1 to 9999, the limits of datetime.
ACCESS_TOKEN_LIFETIME = timedelta(
    minutes=read_lifetime("ACCESS_TOKEN_EXPIRE_MINUTES", "15", maximum=999_999)
)
REFRESH_TOKEN_LIFETIME = timedelta(
    days=read_lifetime("REFRESH_TOKEN_EXPIRE_DAYS", "7", maximum=99_999)
)


def now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


# Passwords

# Argon2id with 64 MiB and 3 passes, the second recommended option of RFC 9106.
hasher = PasswordHasher()

# The Unicode categories of punctuation, symbols and separators. A space is a separator.
SYMBOL_CATEGORIES = "PSZ"


def check_password_strength(password: str) -> str:
    """Return the password. Raises PydanticCustomError if it is weak."""
    rules = {
        "at least 8 characters": len(password) >= 8,
        "a lower-case letter": any(map(str.islower, password)),
        "an upper-case letter": any(map(str.isupper, password)),
        "a digit": any(map(str.isdecimal, password)),
        "a symbol": any(unicodedata.category(char)[0] in SYMBOL_CATEGORIES for char in password),
    }
    unmet = ", ".join(rule for rule, is_met in rules.items() if not is_met)
    if unmet:
        # Pydantic inserts {unmet} into the message.
        raise PydanticCustomError("weak_password", "The password needs {unmet}", {"unmet": unmet})
    return password


class Overloaded(HTTPException):
    """The error response when the hash queue is full, or no memory or thread is available."""

    def __init__(self) -> None:
        super().__init__(503, "The service is overloaded; try again", {"Retry-After": "1"})


# A hash takes 64 MiB and about 0.1 s. Two threads limit the memory and leave time for requests
# that need no hash. Further hashes wait in the executor, first come, first served.
hash_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="hash")


def hash_password(password: str) -> str:
    """Return the Argon2id hash of the password. Raises Overloaded."""
    try:
        return hash_threads.submit(hasher.hash, password).result()
    except (Argon2Error, MemoryError, RuntimeError) as error:
        # submit() raises RuntimeError if no thread can be started.
        logger.error("The service is overloaded: %r", error)
        raise Overloaded from None


# argon2-cffi raises the same exception for these reasons and for a damaged hash.
ARGON2_OVERLOAD_MESSAGES = ("Memory allocation error", "Threading failure")


def verify_password(password_hash: str, password: str) -> bool:
    """Return whether the password matches the hash. Raises Overloaded."""
    try:
        return hash_threads.submit(hasher.verify, password_hash, password).result()
    except VerifyMismatchError:
        return False
    except (MemoryError, RuntimeError) as error:
        logger.error("The service is overloaded: %r", error)
        raise Overloaded from None
    except (Argon2Error, ValueError) as error:
        if str(error) in ARGON2_OVERLOAD_MESSAGES:
            logger.error("The service is overloaded: %r", error)
            raise Overloaded from None
        # The hash is damaged or of another kind. A faster response than for an unknown email would
        # reveal that the email is registered.
        hash_password(password)
        return False


# The client's network


async def get_client_network(request: Request) -> str:
    """Return the client's IPv4 address or IPv6 /64 network, or "unknown".

    It is async because FastAPI would run a plain function in another thread.
    """
    try:
        address = ipaddress.ip_address(request.client.host if request.client else "")
    except ValueError:
        # uvicorn can take the host from X-Forwarded-For, which can contain any text.
        return "unknown"
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    # A customer usually has at least a /64 network, and could use a new address for each request.
    return str(ipaddress.IPv6Network((int(address), 64), strict=False).network_address)


ClientNetwork = Annotated[str, Depends(get_client_network)]


# Login limit


class TooManyFailedLogins(HTTPException):
    """The error response to a login that has to wait."""

    def __init__(self, wait: timedelta) -> None:
        retry_after = str(math.ceil(wait.total_seconds()))
        detail = "Too many failed logins; try again later"
        super().__init__(429, detail, {"Retry-After": retry_after})


MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)


def get_time_until_below_limit(
    failures: list[db.Document], limit: int, period: timedelta
) -> timedelta:
    """Return the time until fewer than `limit` of the failures are younger than `period`."""
    ages = sorted(now() - failure["failed_at"] for failure in failures)
    # The age is negative if a clock was set back. A failure far in the future is ignored.
    # Otherwise, a clock that was a day ahead for a moment could lock the user out for a day.
    recent_ages: list[timedelta] = [age for age in ages if abs(age) < period]
    if len(recent_ages) < limit:
        return timedelta(0)
    # Fewer than `limit` failures are left when the one at this position is too old.
    decisive_age = recent_ages[limit - 1]
    return period - decisive_age


def check_login_limit(user: db.Document, network: str) -> None:
    """Raise TooManyFailedLogins if a login of the user from this network has to wait.

    A failure counts mainly for its own network, so that a stranger cannot lock out the user. The
    limit for all networks is for attackers with many addresses (NIST SP 800-63B-4 section 3.2.2).
    """
    failures = user.get("login_failures", [])
    own_failures = [failure for failure in failures if failure["network"] == network]
    wait = max(
        get_time_until_below_limit(own_failures, limit=5, period=MINUTE),
        get_time_until_below_limit(own_failures, limit=20, period=HOUR),
    )
    overall_wait = get_time_until_below_limit(failures, limit=db.MAX_LOGIN_FAILURES, period=HOUR)
    if overall_wait > wait:
        # Networks with a live session of the user are exempt.
        start_of_live_sessions = now() - REFRESH_TOKEN_LIFETIME
        if not db.has_session_since(str(user["_id"]), network, start_of_live_sessions):
            wait = overall_wait
    if wait > timedelta(0):
        logger.warning("authn_login_lock user=%s network=%s", user["_id"], network)
        raise TooManyFailedLogins(wait)


# Login


class WrongCredentials(HTTPException):
    """The error response to a wrong email or password. It does not reveal which one is wrong."""

    def __init__(self) -> None:
        super().__init__(401, "Wrong email or password", {"WWW-Authenticate": "Bearer"})


# An unknown email must take as long as a wrong password. Otherwise, the response time would reveal
# which emails are registered.
UNKNOWN_USER: db.Document = {
    "_id": "unknown",
    "password_hash": hasher.hash(secrets.token_urlsafe()),
}


def authenticate(email: str, password: str, network: str) -> tuple[str, str]:
    """Return the user's id and the password hash that was verified.

    Raises WrongCredentials, TooManyFailedLogins or Overloaded.
    """
    # Repeated only if another request replaces the password hash at the same time.
    while True:
        user = db.find_user_by_email(email) or UNKNOWN_USER
        check_login_limit(user, network)
        user_id, password_hash = str(user["_id"]), user["password_hash"]
        is_correct = verify_password(password_hash, password)
        # Other guesses may have reached the limit while this one waited for its hash.
        current_user = db.find_user_by_email(email) or UNKNOWN_USER
        check_login_limit(current_user, network)
        if not is_correct:
            db.record_failed_login(email, network, now())
            logger.warning("authn_login_fail user=%s network=%s", user_id, network)
            raise WrongCredentials
        if not hasher.check_needs_rehash(password_hash):
            return user_id, password_hash
        # The hash was made with other parameters than those of today.
        new_hash = hash_password(password)
        if db.replace_password_hash(user_id, password_hash, new_hash):
            return user_id, new_hash


# Tokens


class Claims(BaseModel, strict=True):
    """The claims of a token (RFC 7519). exp is a Unix time in seconds."""

    type: Literal["access", "refresh"]
    sub: str = Field(pattern="^[0-9a-f]{24}$")
    sid: str = Field(pattern="^[0-9a-f]{32}$")
    generation: int = Field(ge=0, lt=2**31)
    exp: int


class Tokens(BaseModel):
    """An access token, and a refresh token for the next pair."""

    user_id: str
    access_token: str
    refresh_token: str


class InvalidToken(HTTPException):
    """The error response to an invalid token (RFC 6750 section 3.1)."""

    def __init__(self) -> None:
        challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
        super().__init__(401, "The token is invalid, has expired or was revoked", challenge)


def create_tokens(user_id: str, session: db.Session) -> Tokens:
    """Return signed tokens for this generation of the session."""
    claims = {"sub": user_id, "sid": session["sid"], "generation": session["generation"]}
    issued_at = session["issued_at"]
    access_claims = claims | {"type": "access", "exp": issued_at + ACCESS_TOKEN_LIFETIME}
    refresh_claims = claims | {"type": "refresh", "exp": issued_at + REFRESH_TOKEN_LIFETIME}
    return Tokens(
        user_id=user_id,
        access_token=jwt.encode(access_claims, SECRET_KEY, algorithm="HS256"),
        refresh_token=jwt.encode(refresh_claims, SECRET_KEY, algorithm="HS256"),
    )


# Longer than any token that the service issues.
MAX_TOKEN_LENGTH = 300


def read_token(token: str, token_type: str, allow_expired: bool = False) -> Claims:
    """Return the claims of a valid token of this type (RFC 8725). Raises InvalidToken."""
    # PyJWT parses the header before it checks the signature. The parser is recursive, and a long
    # header could overflow the stack of a thread, which is small on Alpine. That ends the process.
    if len(token) > MAX_TOKEN_LENGTH:
        raise InvalidToken
    try:
        payload = jwt.decode(
            token,
            SECRET_KEY,
            algorithms=["HS256"],
            options={"verify_exp": not allow_expired},
        )
        claims = Claims.model_validate(payload)
    # Pydantic's ValidationError is a ValueError.
    except (jwt.InvalidTokenError, ValueError):
        raise InvalidToken from None
    if claims.type != token_type:
        raise InvalidToken
    return claims


# Sessions

REUSE_GRACE = timedelta(seconds=60)


def create_session() -> db.Session:
    """Return a new session, not yet stored."""
    return db.Session(sid=secrets.token_hex(16), generation=0, issued_at=now())


def is_within_grace(claims: Claims, session: db.Session) -> bool:
    """Return whether the token was replaced once, less than REUSE_GRACE ago."""
    was_replaced_once = session["generation"] == claims.generation + 1
    # The difference is negative if a clock was set back.
    return was_replaced_once and abs(now() - session["issued_at"]) < REUSE_GRACE


def rotate_session(refresh_token: str) -> Tokens:
    """Return the tokens of the next generation. Raises InvalidToken.

    A client that lost a response can repeat its token within REUSE_GRACE. Any other replaced or
    expired token may be stolen and revokes the session (RFC 9700 section 4.14.2).
    """
    claims = read_token(refresh_token, "refresh", allow_expired=True)
    is_expired = claims.exp <= now().timestamp()
    if is_expired:
        revoke_session(claims)
        raise InvalidToken
    next_session = db.Session(sid=claims.sid, generation=claims.generation + 1, issued_at=now())
    if db.advance_session(claims.sub, next_session):
        return create_tokens(claims.sub, next_session)
    stored_session = db.find_session(claims.sub, claims.sid)
    if stored_session and is_within_grace(claims, stored_session):
        logger.info("authn_token_reuse_in_grace user=%s session=%s", claims.sub, claims.sid)
        # Another generation would make the tokens of the lost response look stolen if the client
        # received them after all.
        return create_tokens(claims.sub, stored_session)
    revoke_session(claims)
    raise InvalidToken


def revoke_session(claims: Claims) -> None:
    """Delete the session of a refresh token if it exists."""
    session = db.find_session(claims.sub, claims.sid)
    # Even if there is no session, an earlier deletion may not have reached a majority of the
    # servers yet. The update waits for that, or the session could return when a server fails.
    was_deleted = db.delete_session(claims.sub, claims.sid)
    if session is None or not was_deleted:
        return
    was_replaced = session["generation"] > claims.generation
    if was_replaced and not is_within_grace(claims, session):
        logger.critical("authn_token_reuse user=%s session=%s", claims.sub, claims.sid)
    else:
        logger.info("authn_token_revoked user=%s session=%s", claims.sub, claims.sid)


# Current user


class User(BaseModel):
    """The current user. created_at is in UTC."""

    id: str
    email: str
    created_at: datetime


bearer = HTTPBearer(description="Paste an access_token.")


def get_current_user(token: Annotated[HTTPAuthorizationCredentials, Depends(bearer)]) -> User:
    """Return the user whose access token is in the Authorization header. Raises InvalidToken."""
    claims = read_token(token.credentials, "access")
    user = db.find_user_by_session(claims.sub, claims.sid)
    if user is None:
        raise InvalidToken
    return User(id=claims.sub, email=user["email"], created_at=user["created_at"])


CurrentUser = Annotated[User, Depends(get_current_user)]


# Hash queue

HASH_QUEUE_SIZE = 16
hash_queue: list[str] = []  # the network of each request
hash_queue_lock = Lock()


@contextmanager
def place_in_hash_queue(network: str) -> Iterator[None]:
    """Hold a place in the hash queue of this process. Never waits; raises Overloaded.

    A network gets a place only while it holds fewer places than are free. Otherwise, a flood from
    one network would lock out all others. A request waits for its hash in one of AnyIO's threads,
    40 by default.
    """
    with hash_queue_lock:
        free_places = HASH_QUEUE_SIZE - len(hash_queue)
        if hash_queue.count(network) >= free_places:
            raise Overloaded
        hash_queue.append(network)
    try:
        yield
    finally:
        with hash_queue_lock:
            hash_queue.remove(network)
