"""Models, routes and the application."""

import logging
import os
import re
import unicodedata
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, BeforeValidator, EmailStr, Field

import auth
import db

logger = logging.getLogger("auth_jwt")


def to_nfc(value: object) -> object:
    """Return text in Unicode NFC (RFC 8265), other values unchanged."""
    return unicodedata.normalize("NFC", value) if isinstance(value, str) else value


Email = Annotated[
    EmailStr,
    AfterValidator(lambda email: to_nfc(email.lower())),
    Field(examples=["alice@example.com"]),
]
Password = Annotated[
    str,
    Field(max_length=128, repr=False, examples=["MyS3cret@1"]),
    BeforeValidator(to_nfc),
]


class Credentials(BaseModel):
    """An email and a password."""

    email: Email
    password: Password


class NewCredentials(Credentials):
    """An email and a password: 8 to 128 characters, upper and lower case, a digit and a symbol."""

    password: Annotated[Password, AfterValidator(auth.check_password_strength)]


class RefreshToken(BaseModel):
    """A refresh token. Logout also accepts a replaced or expired one."""

    refresh_token: str = Field(repr=False)


class Error(BaseModel):
    """The body of an error response."""

    detail: str


JSON_ERROR: dict[str, Any] = {"model": Error}


class AuthRoute(APIRoute):
    """A route that removes input from a 422, converts errors and forbids caching on success."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        original_handler = super().get_route_handler()

        async def route_handler(request: Request) -> Response:
            try:
                with auth.convert_errors():
                    response = await original_handler(request)
            except RequestValidationError as error:
                # The input can be a password.
                errors = [{key: e[key] for key in ("loc", "msg", "type")} for e in error.errors()]
                raise RequestValidationError(errors) from None
            response.headers["Cache-Control"] = "no-store"  # RFC 6749 section 5.1
            return response

        return route_handler


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Prepare the database before the first request."""
    db.prepare_collection()
    if not db.MONGO_URI:
        logger.warning("Users are kept in memory, separately in each worker.")
        logger.warning("Set MONGO_URI and JWT_SECRET_KEY to keep them.")
    yield


router = APIRouter(
    prefix="/auth",
    tags=["auth"],
    route_class=AuthRoute,
    lifespan=lifespan,
    max_body_size=8 * 1024,  # bytes
    generate_unique_id_function=lambda route: route.name,
    responses={413: {}, 503: JSON_ERROR},  # a 413 can be plain text
)


@router.post(
    "/register",
    status_code=201,
    dependencies=auth.LIMIT_HASHING,
    responses={400: JSON_ERROR, 409: JSON_ERROR},
)
def register(credentials: NewCredentials, network: auth.ClientNetwork) -> auth.Tokens:
    """Create a user and start their first session."""
    password_hash = auth.hasher.hash(credentials.password)
    session = auth.create_session()
    user_id = db.create_user(credentials.email, password_hash, session, network)
    if user_id is None:
        raise HTTPException(409, "This email is already registered")
    logger.warning("user_created user=%s session=%s network=%s", user_id, session["sid"], network)
    return auth.create_tokens(user_id, session)


@router.post(
    "/login",
    dependencies=auth.LIMIT_HASHING,
    responses={400: JSON_ERROR, 401: JSON_ERROR, 429: JSON_ERROR},
)
def login(credentials: Credentials, network: auth.ClientNetwork) -> auth.Tokens:
    """Start a session."""
    user_id = auth.authenticate(credentials.email, credentials.password, network)
    session = auth.create_session()
    if user_id is None or not db.add_session(user_id, session, network):
        raise HTTPException(401, "Wrong email or password", {"WWW-Authenticate": "Bearer"})
    logger.info(
        "authn_login_success user=%s session=%s network=%s", user_id, session["sid"], network
    )
    return auth.create_tokens(user_id, session)


@router.get("/me", response_model=auth.User, responses={401: JSON_ERROR})
def me(user: auth.CurrentUser) -> Response:
    """Return the current user."""
    # Avoids a second validation in another thread.
    return Response(user.model_dump_json(), media_type="application/json")


@router.post("/refresh", responses={400: JSON_ERROR, 401: JSON_ERROR})
def refresh(body: RefreshToken) -> auth.Tokens:
    """Exchange a refresh token for a new pair of tokens."""
    return auth.rotate_session(body.refresh_token)


@router.post("/logout", status_code=204, responses={400: JSON_ERROR, 401: JSON_ERROR})
def logout(body: RefreshToken) -> Response:
    """End a session."""
    claims = auth.read_token("refresh", body.refresh_token, verify_exp=False)
    auth.revoke_session(claims)
    return Response(status_code=204)


app = FastAPI(title="auth-jwt")
app.include_router(router)

if CORS_ORIGINS := os.getenv("CORS_ORIGINS"):
    origins = [origin.strip() for origin in CORS_ORIGINS.split(",")]
    if not all(re.fullmatch(r"[a-z-]+://[a-z0-9._:\[\]-]+", o) for o in origins):
        db.abort_startup("CORS_ORIGINS must list origins such as http://localhost:5173.")
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization"],
        expose_headers=["Retry-After", "WWW-Authenticate"],
    )

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # A failure in the lifespan would also print a traceback.
    db.prepare_collection()
    uvicorn.run(app, port=5000)
