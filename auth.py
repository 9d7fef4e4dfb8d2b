"""Passwords, tokens, sessions and the current user."""

import logging
import os
import secrets
import threading
import unicodedata
import uuid
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

import jwt
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from fastapi import Depends, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import PydanticCustomError

import db

logger = logging.getLogger(__name__)


# Settings


def read_secret_key() -> bytes:
    """Return the key that signs the tokens: JWT_SECRET_KEY, or a random one while the users are in memory."""
    key = os.fsencode(os.getenv("JWT_SECRET_KEY", ""))  # the bytes as they were set, of whatever encoding
    if not db.MONGO_URI:
        if key:
            db.refuse_to_start("MONGO_URI is missing beside JWT_SECRET_KEY; set both, or neither for users in memory.")
        return secrets.token_bytes(32)
    try:
        jwt.PyJWT({"enforce_minimum_key_length": True}).encode({}, key, "HS256")  # PyJWT checks a key when it signs
    except jwt.InvalidKeyError:
        db.refuse_to_start(
            "JWT_SECRET_KEY needs at least 32 random bytes (RFC 7518 section 3.2) and must be no public key; "
            'make one with: python3 -c "import secrets; print(secrets.token_urlsafe(48))"'
        )
    return key


def read_lifetime(name: str, default: str, unit: str) -> timedelta:
    """Return the lifetime that the named setting gives as a number of units ("minutes", "days")."""
    try:
        lifetime = timedelta(**{unit: float(os.getenv(name) or default)})
        now() + 2 * lifetime  # raises OverflowError when there is no such date, now or soon
        if lifetime > timedelta(0):
            return lifetime
    except (ValueError, OverflowError):
        pass
    db.refuse_to_start(f"{name} must be a positive number of {unit}, such as {default}.")


def now() -> datetime:
    """Return the time, in UTC. A test can set this clock back; PyJWT's own, which expires tokens, goes on."""
    return datetime.now(UTC)


SECRET_KEY = read_secret_key()
ACCESS_TOKEN_LIFETIME = read_lifetime("ACCESS_TOKEN_EXPIRE_MINUTES", "15", "minutes")
REFRESH_TOKEN_LIFETIME = read_lifetime("REFRESH_TOKEN_EXPIRE_DAYS", "7", "days")
REUSE_GRACE = timedelta(seconds=10)


# Refusals: HTTPExceptions, so that they answer alike in an app that includes the router


class InvalidToken(HTTPException):
    """A token was sent and is no good (RFC 6750 section 3.1); which way it is no good is not said."""

    def __init__(self):
        challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
        super().__init__(401, "The token is invalid, has expired or was revoked", challenge)


class Unavailable(HTTPException):
    """The service cannot do this now; Retry-After says in how many seconds to ask again."""

    def __init__(self, detail: str, retry_after: int):
        super().__init__(503, detail, {"Retry-After": str(retry_after)})


def database_unavailable(error: db.DatabaseError) -> Unavailable:
    """Return the refusal for a request that the database failed; only the kind of error is logged, no text of it."""
    logger.warning("MongoDB is unavailable: %s", type(error).__name__)
    return Unavailable("The database is unavailable; try again", retry_after=5)


# Passwords

MAX_PASSWORD_LENGTH = 128
MIN_PASSWORD_LENGTH = 8
PASSWORD_NEEDS = {  # Unicode's general categories
    "a lower-case letter": ("Ll",),
    "an upper-case letter": ("Lu",),
    "a digit": ("Nd",),
    "a symbol": ("P", "S", "Z"),
}


def normalize_password(password: str) -> str:
    """Return the password in NFC, the normalization of RFC 8265 section 4.2, so that every keyboard types the same.

    Raises PydanticCustomError beyond MAX_PASSWORD_LENGTH code points, counted after normalization, and for a lone
    surrogate, which JSON can spell and UTF-8 cannot.
    """
    password = unicodedata.normalize("NFC", password)
    try:
        password.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("string_unicode", "The password has a character that cannot be encoded") from None
    if len(password) > MAX_PASSWORD_LENGTH:
        raise PydanticCustomError("password_too_long", f"The password has more than {MAX_PASSWORD_LENGTH} characters")
    return password


def check_new_password(password: str) -> str:
    """Return the password normalized, or raise PydanticCustomError that names everything it lacks."""
    password = normalize_password(password)
    categories = {unicodedata.category(character) for character in password}
    lacks = [need for need, kinds in PASSWORD_NEEDS.items() if not any(c.startswith(kinds) for c in categories)]
    if len(password) < MIN_PASSWORD_LENGTH:
        lacks.insert(0, f"at least {MIN_PASSWORD_LENGTH} characters")
    if lacks:
        raise PydanticCustomError("weak_password", f"The password needs {', '.join(lacks)}")
    return password


# A hash takes 64 MiB and a fifth of a core-second (argon2-cffi's defaults: RFC 9106, second recommended option).
# So few are made at once, a few more wait, each in a thread of FastAPI's 40, and the rest are refused at once:
# a flood of logins finds a short queue, and every other request finds a thread.
hasher = PasswordHasher()
HASHES_AT_ONCE = min(os.cpu_count() or 1, 8)
HASHES_WAITING = 16
hashing = threading.Semaphore(HASHES_AT_ONCE)
places = threading.Semaphore(HASHES_AT_ONCE + HASHES_WAITING)

# Logging in with an unknown email verifies this one, whose password nobody knows: it takes the same time.
DUMMY_HASH = hasher.hash(secrets.token_urlsafe())


@contextmanager
def hash_queue():
    """Hold a place in the queue for hashing, or raise Unavailable without waiting when all are taken."""
    if not places.acquire(blocking=False):
        raise Unavailable("Too many logins at once; try again", retry_after=1)
    try:
        yield
    finally:
        places.release()


def hash_password(password: str) -> str:
    """Return the Argon2id hash of a normalized password. Raises Unavailable when the queue is full."""
    with hash_queue(), hashing:
        return hasher.hash(password)


def authenticate(email: str, password: str) -> str | None:
    """Return the id of the user with this email and password, or None, in the same time whichever was wrong.

    A hash with older parameters is replaced. Raises Unavailable when the queue is full, before anything is looked up.
    """
    with hash_queue():
        user = db.find_user_by_email(email)
        password_hash = (user or {}).get("password_hash") or DUMMY_HASH
        try:
            with hashing:
                hasher.verify(password_hash, password)
        except (VerificationError, InvalidHashError):
            return None
        user_id = str(user["_id"])  # there is a user, since nothing verifies against DUMMY_HASH
        if hasher.check_needs_rehash(password_hash):
            with hashing:
                new_hash = hasher.hash(password)
            db.replace_password_hash(user_id, password_hash, new_hash)
        return user_id


# Tokens and sessions


class Claims(BaseModel, strict=True):
    """What every token of ours must say, and in which types; sub, iat, exp and jti are RFC 7519's (section 4.1)."""

    sub: Annotated[str, Field(pattern="^[0-9a-f]{24}$")]  # the user's id
    iat: int
    exp: int
    jti: str
    sid: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]  # the session's id


class AccessClaims(Claims):
    """An access token's claims; the type keeps it from passing for the other kind (RFC 8725 section 3.12)."""

    type: Literal["access"]


class RefreshClaims(Claims):
    """A refresh token's claims, with the generation of the session that it belongs to."""

    type: Literal["refresh"]
    generation: Annotated[int, Field(ge=0, lt=2**31)]


def create_token(user_id: str, sid: str, type: str, issued_at: datetime, expires_at: datetime, **more) -> str:
    """Return a signed token with these claims and more, and an id of its own."""
    claims = {"sub": user_id, "type": type, "iat": issued_at, "exp": expires_at, "jti": uuid.uuid4().hex, "sid": sid}
    return jwt.encode(claims | more, SECRET_KEY, "HS256")


def create_access_token(user_id: str, sid: str) -> str:
    """Return an access token for the user's session, valid for ACCESS_TOKEN_LIFETIME from now."""
    issued_at = now()
    return create_token(user_id, sid, "access", issued_at, issued_at + ACCESS_TOKEN_LIFETIME)


def create_refresh_token(user_id: str, session: db.Session) -> str:
    """Return the refresh token that the session describes."""
    times = session["issued_at"], session["expires_at"]
    return create_token(user_id, session["sid"], "refresh", *times, generation=session["generation"])


def read_token(token: str, kind: type[Claims]) -> Claims:
    """Return the claims of a token of this kind. Raises InvalidToken for every other string.

    The algorithm is ours and not the token's choice (RFC 8725 section 3.1).
    """
    try:
        return kind.model_validate(jwt.decode(token, SECRET_KEY, ["HS256"]))
    except (jwt.InvalidTokenError, ValidationError, UnicodeEncodeError):  # the last for a lone surrogate in the string
        raise InvalidToken from None


def new_session(sid: str | None = None, generation: int = 0) -> db.Session:
    """Return a session that starts now, or the next generation of the one with this sid."""
    issued_at = now()
    expires_at = issued_at + REFRESH_TOKEN_LIFETIME
    return {"sid": sid or uuid.uuid4().hex, "generation": generation, "issued_at": issued_at, "expires_at": expires_at}


def rotate_session(refresh_token: str) -> tuple[str, db.Session]:
    """Return the user's id and the session's next generation, in exchange for the token of the current one.

    A token replaced less than REUSE_GRACE ago gets the current generation once more: a response was lost, or a
    second tab asked. Any older one was stolen, or is being used by whom it was stolen from; that cannot be told
    apart, so the session ends (RFC 9700 section 4.14.2). Raises InvalidToken for that and for every other string.
    """
    claims = read_token(refresh_token, RefreshClaims)
    replacement = new_session(claims.sid, claims.generation + 1)
    if db.rotate_session(claims.sub, replacement):
        return claims.sub, replacement
    current = db.find_session(claims.sub, claims.sid)
    if current and current["generation"] == claims.generation + 1 and now() - current["issued_at"] < REUSE_GRACE:
        return claims.sub, current
    db.end_session(claims.sub, claims.sid)
    raise InvalidToken


def revoke_session(refresh_token: str) -> None:
    """End the session of this token, whichever generation it is of; one that has ended already is no error.

    Raises InvalidToken for a string that is no such token, and when the user is gone.
    """
    claims = read_token(refresh_token, RefreshClaims)
    if not db.end_session(claims.sub, claims.sid):
        raise InvalidToken


# The current user


class User(BaseModel):
    """The user as everyone may see them; created_at is in UTC."""

    id: Annotated[str, Field(examples=["6b02ea3faef37c8dd9090d5f"])]
    email: Annotated[str, Field(examples=["alice@example.com"])]
    created_at: datetime


def get_current_user(credentials: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]) -> User:
    """Return the user whose access token came in the Authorization header (RFC 6750 section 2.1).

    Raises InvalidToken, also once the user is deleted or the session has ended, and Unavailable.
    """
    claims = read_token(credentials.credentials, AccessClaims)
    try:
        user = db.find_user_in_session(claims.sub, claims.sid)
    except db.DatabaseError as error:
        raise database_unavailable(error) from None
    if user is None:
        raise InvalidToken
    return User(id=claims.sub, email=user["email"], created_at=user["created_at"])


CurrentUser = Annotated[User, Depends(get_current_user)]
