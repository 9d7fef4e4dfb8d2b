"""Registration, login, refresh, logout and the current user.

A login starts a session, which is stored with its user. A session has an id (sid) and a
generation, which counts its refreshes. Its two tokens are JWTs (RFC 7519) that contain the user's
id, the sid and the generation. By default, the access token authenticates requests for 15 minutes,
and the refresh token can be exchanged for two new tokens within 7 days. The result of such a
refresh depends on the generation in the token:

- The current generation: the session advances to the next generation in one atomic update, and the
  response contains the tokens of that generation.
- The previous generation, within a grace period of a minute: the response to the first refresh was
  probably lost, so the tokens of the current generation are sent again.
- Any other, such as the previous generation after the grace period: a replaced token was used
  again. It may be stolen, so the session ends (RFC 9700 section 4.14.2).

A refresh with an expired token ends the session as well. Each request with an access token looks
up its session, but does not compare the generation. So a logout is effective immediately, and a
refresh does not invalidate older access tokens.

Failed logins and simultaneous password hashes are limited, mainly per network. The network of a
client is its IPv4 address or its IPv6 /56 network.
"""

import ipaddress
import logging
import math
import secrets
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from threading import Condition, get_ident
from typing import Annotated, Literal

import jwt
from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, VerifyMismatchError
from argon2.profiles import RFC_9106_LOW_MEMORY
from fastapi import Depends, HTTPException
from fastapi.requests import HTTPConnection
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, Field
from pydantic_core import PydanticCustomError

import db

# The names and levels of security events follow OWASP's Logging Vocabulary, except for our own
# authn_token_reuse_in_grace.
logger = logging.getLogger("auth_jwt")


class Tokens(BaseModel):
    """The tokens of a session, and the id of its user."""

    user_id: str
    access_token: str
    refresh_token: str


class Claims(BaseModel, strict=True):
    """The claims of a token. sub is the user's id, exp is a Unix time in seconds."""

    type: Literal["access", "refresh"]
    sub: str = Field(pattern="^[0-9a-f]{24}$")
    sid: str = Field(pattern="^[0-9a-f]{32}$")
    generation: int = Field(ge=0, lt=2**31)
    exp: int


class User(BaseModel):
    """The public fields of a user. created_at is in UTC."""

    id: str
    email: str
    created_at: datetime


def now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


def register(email: str, password: str, network: str) -> Tokens:
    """Create a user and start their first session."""
    password_hash = hash_password(password, network)
    session = new_session()
    user_id = db.create_user(email, password_hash, session, network)
    if user_id is None:
        raise HTTPException(409, "This email is already registered")
    # OWASP's Logging Vocabulary makes this event a warning.
    logger.warning("user_created user=%s session=%s network=%s", user_id, session["sid"], network)
    return create_tokens(user_id, session)


def log_in(email: str, password: str, network: str) -> Tokens:
    """Start a session. A 401 does not reveal whether the email is registered.

    A 429 does, because failed logins are recorded only for registered emails.
    """
    user = db.find_user_by_email(email) or UNKNOWN_USER
    user_id, stored_hash = str(user["_id"]), user["password_hash"]
    check_login_limit(user, network)
    is_correct = verify_password(stored_hash, password, network)
    # Parallel guesses can all pass the first check. Check again after the hash, so that only those
    # within the limit can succeed.
    check_login_limit(db.find_user_by_email(email) or UNKNOWN_USER, network)
    if not is_correct:
        db.record_failed_login(email, network, now())
        logger.warning("authn_login_fail user=%s network=%s", user_id, network)
        raise HTTPException(401, "Wrong email or password", {"WWW-Authenticate": "Bearer"})
    # The parameters of the hasher may have changed since the password was hashed.
    needs_rehash = hasher.check_needs_rehash(stored_hash)
    new_hash = hash_password(password, network) if needs_rehash else stored_hash
    session = new_session()
    is_added = db.add_session(
        user_id, verified_hash=stored_hash, new_hash=new_hash, session=session, network=network
    )
    if not is_added:
        # The user was deleted or has another hash by now. Start over with the new state.
        return log_in(email, password, network)
    logger.info(
        "authn_login_success user=%s session=%s network=%s", user_id, session["sid"], network
    )
    return create_tokens(user_id, session)


def refresh(refresh_token: str, network: str) -> Tokens:
    """Exchange a refresh token for two new tokens, or end its session."""
    claims = read_token(refresh_token, "refresh", allow_expired=True)
    is_expired = claims.exp <= now().timestamp()
    if not is_expired:
        next_session = db.Session(sid=claims.sid, generation=claims.generation + 1, issued_at=now())
        if db.advance_session(claims.sub, next_session):
            return create_tokens(claims.sub, next_session)
        session = db.find_session(claims.sub, claims.sid)
        if session and was_just_replaced(claims, session):
            logger.info(
                "authn_token_reuse_in_grace user=%s session=%s network=%s",
                claims.sub,
                claims.sid,
                network,
            )
            # The session does not advance again. If the first response arrives after all, its
            # tokens are valid.
            return create_tokens(claims.sub, session)
    end_session(claims, network)
    raise InvalidToken


def log_out(refresh_token: str, network: str) -> None:
    """End the session of a refresh token, even if the token is replaced or expired."""
    claims = read_token(refresh_token, "refresh", allow_expired=True)
    end_session(claims, network)


# If another app includes the router, its own HTTPBearer scheme must not collide with this one.
bearer = HTTPBearer(scheme_name="AccessToken", description="Paste an access_token.")


def get_current_user(token: Annotated[HTTPAuthorizationCredentials, Depends(bearer)]) -> User:
    """Return the user whose access token is in the Authorization header. Raises InvalidToken."""
    claims = read_token(token.credentials, "access")
    user = db.find_user_by_session(claims.sub, claims.sid)
    if user is None:
        raise InvalidToken
    return User(id=claims.sub, email=user["email"], created_at=user["created_at"])


CurrentUser = Annotated[User, Depends(get_current_user)]


# Sessions


def new_session() -> db.Session:
    """Return a session that is not stored yet."""
    return db.Session(sid=secrets.token_hex(16), generation=0, issued_at=now())


def was_just_replaced(claims: Claims, session: db.Session) -> bool:
    """Return whether the token is of the previous generation and in its grace period."""
    is_previous = claims.generation == session["generation"] - 1
    # The difference can be negative, because the clocks of two servers can differ.
    return is_previous and abs(now() - session["issued_at"]) < timedelta(minutes=1)


def end_session(claims: Claims, network: str) -> None:
    """Delete the session of a refresh token if it exists, and log it.

    A replaced token is logged as reuse, except in its grace period. Then a client may be logging
    out with it because the response to its refresh was lost.
    """
    session = db.delete_session(claims.sub, claims.sid)
    if session is None:
        return
    is_replaced = claims.generation < session["generation"]
    if is_replaced and not was_just_replaced(claims, session):
        level, event = logging.CRITICAL, "authn_token_reuse"
    else:
        level, event = logging.INFO, "authn_token_revoked"
    logger.log(level, "%s user=%s session=%s network=%s", event, claims.sub, claims.sid, network)


# Tokens


def read_key() -> bytes:
    """Return the key that signs the tokens, which is random if users are kept in memory."""
    key = db.read_setting("JWT_SECRET_KEY").encode()
    if bool(key) != bool(db.MONGO_URI):
        db.abort_startup("Set both JWT_SECRET_KEY and MONGO_URI, or neither.")
    if key and len(key) < 32:
        # RFC 7518 section 3.2.
        db.abort_startup("JWT_SECRET_KEY must have at least 32 bytes.")
    return key or secrets.token_bytes(32)


def read_lifetime(name: str, default: str) -> int:
    """Return the setting, a whole number from 1 to 99999. Its name contains the unit."""
    value = db.read_setting(name, default)
    # Far larger numbers would overflow datetime.
    if not (value.isascii() and value.isdigit() and 1 <= int(value) <= 99_999):
        db.abort_startup(f"{name} must be a whole number from 1 to 99999.")
    return int(value)


SECRET_KEY = read_key()
# Fail at the start if PyJWT refuses the key, for example because it has the format PEM or JWK.
jwt.encode({}, SECRET_KEY, algorithm="HS256")
ACCESS_TOKEN_LIFETIME = timedelta(minutes=read_lifetime("ACCESS_TOKEN_EXPIRE_MINUTES", "15"))
REFRESH_TOKEN_LIFETIME = timedelta(days=read_lifetime("REFRESH_TOKEN_EXPIRE_DAYS", "7"))


class InvalidToken(HTTPException):
    """The 401 response to an invalid token (RFC 6750 section 3.1)."""

    def __init__(self) -> None:
        challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
        super().__init__(401, "The token is invalid, has expired or was revoked", challenge)


def create_tokens(user_id: str, session: db.Session) -> Tokens:
    """Return the tokens of this generation of the session.

    They are not stored. A repeated call signs the same ones, because exp depends on issued_at.
    """
    return Tokens(
        user_id=user_id,
        access_token=sign("access", user_id, session, ACCESS_TOKEN_LIFETIME),
        refresh_token=sign("refresh", user_id, session, REFRESH_TOKEN_LIFETIME),
    )


def sign(token_type: str, user_id: str, session: db.Session, lifetime: timedelta) -> str:
    """Return a signed token."""
    claims = {
        "type": token_type,
        "sub": user_id,
        "sid": session["sid"],
        "generation": session["generation"],
        "exp": session["issued_at"] + lifetime,
    }
    return jwt.encode(claims, SECRET_KEY, algorithm="HS256")


# Longer than any token that the service issues.
MAX_TOKEN_LENGTH = 300


def read_token(token: str, token_type: str, allow_expired: bool = False) -> Claims:
    """Return the claims of a valid token of this type. Raises InvalidToken."""
    # PyJWT parses the header before it checks the signature. A long, deeply nested header can
    # overflow the stack of a thread and end the process, for example with musl on Alpine Linux.
    if len(token) > MAX_TOKEN_LENGTH:
        raise InvalidToken
    try:
        payload = jwt.decode(
            token, SECRET_KEY, algorithms=["HS256"], options={"verify_exp": not allow_expired}
        )
        claims = Claims.model_validate(payload)
    except (jwt.InvalidTokenError, ValueError):
        # Pydantic's ValidationError is a ValueError. So is the UnicodeEncodeError of a surrogate.
        raise InvalidToken from None
    if claims.type != token_type:
        raise InvalidToken
    return claims


# Passwords

# The Unicode categories of punctuation, symbols and separators. A space is a separator.
SYMBOL_CATEGORIES = {"P", "S", "Z"}


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


# Argon2id with 64 MiB, 3 passes and 4 lanes, the second recommended option of RFC 9106.
hasher = PasswordHasher.from_parameters(RFC_9106_LOW_MEMORY)

# The hash is verified if an email is unknown, so that the response takes as long as for a wrong
# password.
UNKNOWN_USER: db.Document = {
    "_id": "unknown",
    "password_hash": hasher.hash(secrets.token_urlsafe()),
}


def hash_password(password: str, network: str) -> str:
    """Return the Argon2id hash of the password. Raises Overloaded."""
    with hold_hash_slot(network):
        return hasher.hash(password)


def verify_password(password_hash: str, password: str, network: str) -> bool:
    """Return whether the password matches the Argon2id hash. Raises Overloaded."""
    with hold_hash_slot(network):
        try:
            return hasher.verify(password_hash, password)
        except VerifyMismatchError:
            return False


class Overloaded(HTTPException):
    """The 503 response if the network gets no slot for a hash, or if Argon2 fails."""

    def __init__(self) -> None:
        super().__init__(503, "The service is overloaded; try again", {"Retry-After": "1"})


# The hashes that wait or run in this process.
MAX_HASH_SLOTS = 16
# A hash takes 64 MiB and about 0.1 s. Running two at a time limits the memory, and leaves processor
# time for requests that need no hash.
MAX_RUNNING_HASHES = 2

# The id and the network of each thread that hashes or waits, in the order of arrival.
hash_slots: dict[int, str] = {}
hash_slots_changed = Condition()


@contextmanager
def hold_hash_slot(network: str) -> Iterator[None]:
    """Take a slot, wait until the hash may run, and keep the slot until it ends. Raises Overloaded.

    A network gets another slot only while it holds fewer slots than are free. With 16 slots, the
    first network gets at most 8, the next ones 4, 2, 1 and 1. So a flood from one network leaves
    slots for others.
    """
    thread = get_ident()
    with hash_slots_changed:
        free_slots = MAX_HASH_SLOTS - len(hash_slots)
        own_slots = list(hash_slots.values()).count(network)
        if own_slots >= free_slots:
            raise Overloaded
        hash_slots[thread] = network
    try:
        with hash_slots_changed:
            # A semaphore would not guarantee the order of arrival.
            hash_slots_changed.wait_for(lambda: thread in list(hash_slots)[:MAX_RUNNING_HASHES])
        yield
    except (Argon2Error, MemoryError) as error:
        # Argon2 got no memory or no thread, or a stored hash is damaged. verify_password handles a
        # wrong password itself.
        logger.error("The service is overloaded: %r", error)
        raise Overloaded from None
    finally:
        with hash_slots_changed:
            del hash_slots[thread]
            hash_slots_changed.notify_all()


# Login limit

LIMIT_PERIOD = timedelta(hours=1)
MAX_FAILURES_PER_NETWORK = 20


def check_login_limit(user: db.Document, network: str) -> None:
    """Raise a 429 if the user has had too many failed logins within an hour.

    The limits are 20 from this network, and 100 from all networks (NIST SP 800-63B-4 section
    3.2.2). The second one exempts a network from which the user has started a session that has not
    expired.
    """
    # A failure far in the future is due to a wrong clock, and must not lock the user out.
    recent_failures = [
        failure
        for failure in user.get("login_failures", [])
        if abs(now() - failure["failed_at"]) < LIMIT_PERIOD
    ]
    own_failures = [failure for failure in recent_failures if failure["network"] == network]
    wait = get_wait(own_failures, MAX_FAILURES_PER_NETWORK)
    wait_for_all = get_wait(recent_failures, db.MAX_LOGIN_FAILURES)
    if wait_for_all > wait:
        # A session that was last refreshed before this time has expired.
        unexpired_since = now() - REFRESH_TOKEN_LIFETIME
        if not db.has_session_since(str(user["_id"]), network, unexpired_since):
            wait = wait_for_all
    if wait > timedelta(0):
        logger.warning("authn_login_lock user=%s network=%s", user["_id"], network)
        retry_after = str(math.ceil(wait.total_seconds()))
        detail = "Too many failed logins; try again later"
        raise HTTPException(429, detail, {"Retry-After": retry_after})


def get_wait(recent_failures: list[db.Document], limit: int) -> timedelta:
    """Return the time until fewer than `limit` of the failures are within LIMIT_PERIOD."""
    if len(recent_failures) < limit:
        return timedelta(0)
    times: list[datetime] = sorted(failure["failed_at"] for failure in recent_failures)
    # Once this failure is older than LIMIT_PERIOD, only the limit - 1 newer ones are left.
    return times[-limit] + LIMIT_PERIOD - now()


# The client's network


async def get_client_network(connection: HTTPConnection) -> str:
    """Return the client's IPv4 address, the first address of its IPv6 /56 network, or "unknown".

    uvicorn must trust the X-Forwarded-For of a proxy. Otherwise, the proxy counts as the client.
    """
    # The function is async because FastAPI would run a plain one in another thread.
    try:
        address = ipaddress.ip_address(connection.client.host if connection.client else "")
    except ValueError:
        # uvicorn can take the host from X-Forwarded-For, which can contain any text.
        return "unknown"
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    # A customer usually has a /56 network (RIPE-690), and could use any address in it.
    return str(ipaddress.IPv6Network((int(address), 56), strict=False).network_address)


ClientNetwork = Annotated[str, Depends(get_client_network)]
