"""Request bodies, routes and the standalone application. auth.py explains sessions and tokens."""

import asyncio
import logging
import unicodedata
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, Field, validate_email

import auth
import db

logger = logging.getLogger("auth_jwt")


# Request bodies


def to_nfc(text: str) -> str:
    """Return the text in Unicode NFC, so that equivalent texts compare equal (RFC 8265)."""
    return unicodedata.normalize("NFC", text)


def normalize_email(email: str) -> str:
    """Return a valid email as it is stored, in lower case and in NFC."""
    _, valid_email = validate_email(email)
    return to_nfc(valid_email.lower())


# The length is checked first, because the validators are slow for a long text.
Email = Annotated[
    str,
    Field(max_length=254, examples=["alice@example.com"], json_schema_extra={"format": "email"}),
    AfterValidator(normalize_email),
]
Password = Annotated[
    str,
    Field(max_length=128, examples=["MyS3cret@1"]),
    AfterValidator(to_nfc),
]
StrongPassword = Annotated[Password, AfterValidator(auth.check_password_strength)]


class Credentials(BaseModel):
    """An email and a password."""

    email: Email
    password: Password = Field(repr=False)


class NewCredentials(Credentials):
    """An email and a new password.

    The password has 8 to 128 characters, including a lower-case letter, an upper-case letter, a
    digit and a symbol or space.
    """

    password: StrongPassword = Field(repr=False)


class RefreshToken(BaseModel):
    """A refresh token. Logout also accepts a replaced or expired one."""

    refresh_token: str = Field(repr=False)


# Responses


class Error(BaseModel):
    """The body of an error response."""

    detail: str


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI descriptions of these error responses."""
    return {status: {"model": Error} for status in statuses}


REJECTION_DELAY = 1.0  # seconds, as in the Retry-After of auth.Overloaded


class AuthRoute(APIRoute):
    """A route for credentials and tokens.

    - A 422 omits the input, which can be a password.
    - A 503 for overload is delayed, so that a client that ignores Retry-After can send only one
      request per second on a connection.
    - A successful response has Cache-Control: no-store (RFC 6749 section 5.1).
    """

    # FastAPI calls this once per route, and keeps the function that it returns.
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_request(request: Request) -> Response:
            try:
                response = await handle(request)
            except RequestValidationError as error:
                details = [{key: e[key] for key in ("loc", "msg", "type")} for e in error.errors()]
                raise RequestValidationError(details) from None
            except auth.Overloaded:
                await asyncio.sleep(REJECTION_DELAY)
                raise
            response.headers["Cache-Control"] = "no-store"
            return response

        return handle_request


# Routes


@asynccontextmanager
async def prepare_database(_: FastAPI) -> AsyncIterator[None]:
    """Prepare the database before the first request of an app that includes the router."""
    if db.ENV_FILE:
        logger.info("Settings that are not in the environment are read from %s.", db.ENV_FILE)
    if not db.MONGO_URI:
        logger.warning("Users are kept in memory, separately in each worker.")
        logger.warning("Set MONGO_URI and JWT_SECRET_KEY to keep them.")
    db.prepare_collection()
    yield


router = APIRouter(
    prefix="/auth",
    tags=["auth"],
    route_class=AuthRoute,
    lifespan=prepare_database,
    # Bytes. A JSON escape takes 6 per character, or 12 above U+FFFF. So an ASCII email and a
    # password take at most 254 * 6 + 128 * 12 = 3,060. The parameter needs FastAPI 0.164.
    max_body_size=4 * 1024,
    generate_unique_id_function=lambda route: route.name,
    # A 413 can be plain text, so it has no model. The routes add 400, which FastAPI sends if it
    # cannot decode the body.
    responses=errors(503) | {413: {}},
)


@router.post("/register", status_code=201, responses=errors(400, 409))
def register(credentials: NewCredentials, network: auth.ClientNetwork) -> auth.Tokens:
    """Create a user and start their first session."""
    return auth.register(credentials.email, credentials.password, network)


@router.post("/login", responses=errors(400, 401, 429))
def login(credentials: Credentials, network: auth.ClientNetwork) -> auth.Tokens:
    """Start a session."""
    return auth.log_in(credentials.email, credentials.password, network)


@router.get("/me", response_model=auth.User, responses=errors(401))
def me(user: auth.CurrentUser) -> Response:
    """Return the current user."""
    # FastAPI would validate a model a second time, in another thread.
    return Response(user.model_dump_json(), media_type="application/json")


@router.post("/refresh", responses=errors(400, 401))
def refresh(body: RefreshToken, network: auth.ClientNetwork) -> auth.Tokens:
    """Exchange a refresh token for two new tokens."""
    return auth.refresh(body.refresh_token, network)


@router.post("/logout", status_code=204, response_class=Response, responses=errors(400, 401))
def logout(body: RefreshToken, network: auth.ClientNetwork) -> None:
    """End a session."""
    auth.log_out(body.refresh_token, network)


# The standalone application. An app that includes the router does not use this part.


def configure_logging() -> None:
    """Log with time and level unless logging is configured already."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")


@asynccontextmanager
async def start_standalone(_: FastAPI) -> AsyncIterator[None]:
    """Configure logging before the lifespan of the router, which logs messages."""
    configure_logging()
    yield


app = FastAPI(title="auth-jwt", lifespan=start_standalone)
app.include_router(router)

CORS_ORIGINS = db.read_setting("CORS_ORIGINS")
if CORS_ORIGINS:
    app.add_middleware(
        CORSMiddleware,
        allow_origins=[origin.strip().rstrip("/") for origin in CORS_ORIGINS.split(",")],
        allow_methods=["GET", "POST"],
        # Tracing tools add their own headers, such as traceparent.
        allow_headers=["*"],
        expose_headers=["Retry-After", "WWW-Authenticate"],
    )

if __name__ == "__main__":
    # The lifespans do this as well, but there a failed start also prints a traceback.
    configure_logging()
    db.prepare_collection()
    uvicorn.run(
        app,
        port=5000,
        workers=1,  # regardless of WEB_CONCURRENCY, which some platforms set
        timeout_graceful_shutdown=8,  # seconds, after which open requests are cancelled
    )
