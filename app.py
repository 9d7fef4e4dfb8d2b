"""Models, routes and the standalone application."""

import asyncio
import logging
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


# Request bodies


def to_nfc(value: object) -> object:
    """Return text in Unicode NFC (RFC 8265), other values unchanged."""
    return unicodedata.normalize("NFC", value) if isinstance(value, str) else value


def normalize_email(email: str) -> str:
    """Return the email in lower case and in Unicode NFC, the form in which it is stored."""
    return unicodedata.normalize("NFC", email.lower())


Email = Annotated[
    EmailStr,
    AfterValidator(normalize_email),
    Field(examples=["alice@example.com"]),
]
# Pydantic runs a BeforeValidator first, so max_length counts the characters of the NFC form.
Password = Annotated[
    str,
    Field(max_length=128, repr=False, examples=["MyS3cret@1"]),
    BeforeValidator(to_nfc),
]
StrongPassword = Annotated[Password, AfterValidator(auth.check_password_strength)]


class Credentials(BaseModel):
    """An email and a password."""

    email: Email
    password: Password


class NewCredentials(Credentials):
    """An email and a password: 8 to 128 characters, upper and lower case, a digit and a symbol."""

    password: StrongPassword


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


REJECTION_DELAY = 0.5  # seconds


class AuthRoute(APIRoute):
    """A route that omits the input from a 422, delays a rejection and forbids caching."""

    # FastAPI calls this once per route, for the function that handles the requests.
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_safely(request: Request) -> Response:
            try:
                response = await handle(request)
            except RequestValidationError as error:
                # The input can be a password.
                details = [{key: e[key] for key in ("loc", "msg", "type")} for e in error.errors()]
                raise RequestValidationError(details) from None
            except auth.Overloaded:
                # Clients that retry immediately would keep the event loop busy.
                await asyncio.sleep(REJECTION_DELAY)
                raise
            response.headers["Cache-Control"] = "no-store"  # RFC 6749 section 5.1
            return response

        return handle_safely


# Routes


@asynccontextmanager
async def prepare_database(_: FastAPI) -> AsyncIterator[None]:
    """Prepare the database before the first request of an app that includes the router."""
    if db.ENV_FILE:
        logger.info("Settings that are missing from the environment are read from %s.", db.ENV_FILE)
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
    max_body_size=8 * 1024,  # bytes; requires FastAPI 0.164
    generate_unique_id_function=lambda route: route.name,
    # A 413 can be plain text.
    responses=errors(503) | {413: {}},
)


@router.post("/register", status_code=201, responses=errors(400, 409))
def register(credentials: NewCredentials, network: auth.ClientNetwork) -> auth.Tokens:
    """Create a user and start their first session."""
    with auth.place_in_hash_queue(network):
        password_hash = auth.hash_password(credentials.password)
    session = auth.create_session()
    user_id = db.create_user(credentials.email, password_hash, session, network)
    if user_id is None:
        raise HTTPException(409, "This email is already registered")
    # OWASP's Logging Vocabulary makes this event a warning.
    logger.warning("user_created user=%s session=%s network=%s", user_id, session["sid"], network)
    return auth.create_tokens(user_id, session)


@router.post("/login", responses=errors(400, 401, 429))
def login(credentials: Credentials, network: auth.ClientNetwork) -> auth.Tokens:
    """Start a session."""
    with auth.place_in_hash_queue(network):
        user_id, password_hash = auth.authenticate(credentials.email, credentials.password, network)
    session = auth.create_session()
    if not db.add_session(user_id, password_hash, session, network):
        # The user was deleted or has another password since the old one was verified.
        raise auth.WrongCredentials
    logger.info(
        "authn_login_success user=%s session=%s network=%s", user_id, session["sid"], network
    )
    return auth.create_tokens(user_id, session)


@router.get("/me", response_model=auth.User, responses=errors(401))
def me(user: auth.CurrentUser) -> Response:
    """Return the current user."""
    # FastAPI would validate the model again, in another thread.
    return Response(user.model_dump_json(), media_type="application/json")


@router.post("/refresh", responses=errors(400, 401))
def refresh(body: RefreshToken) -> auth.Tokens:
    """Exchange a refresh token for a new pair of tokens."""
    return auth.rotate_session(body.refresh_token)


@router.post("/logout", status_code=204, responses=errors(400, 401))
def logout(body: RefreshToken) -> Response:
    """End a session."""
    claims = auth.read_token(body.refresh_token, "refresh", allow_expired=True)
    auth.revoke_session(claims)
    return Response(status_code=204)


# The standalone application. An app that includes the router does not use this part.

ORIGIN_PATTERN = re.compile(r"[a-z-]+://[a-z0-9._:\[\]-]+")


def read_cors_origins() -> list[str]:
    """Return the origins of browser front ends as a list."""
    setting = db.read_setting("CORS_ORIGINS")
    return [origin.strip() for origin in setting.split(",")] if setting else []


CORS_ORIGINS = read_cors_origins()


def configure_standalone() -> None:
    """Configure logging unless it is configured already, and check CORS_ORIGINS."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # Not checked on import: an app that only includes the router does not use CORS_ORIGINS.
    if not all(map(ORIGIN_PATTERN.fullmatch, CORS_ORIGINS)):
        db.abort_startup("CORS_ORIGINS must list origins such as http://localhost:5173.")


@asynccontextmanager
async def start_standalone(_: FastAPI) -> AsyncIterator[None]:
    """Configure the application before its first request."""
    configure_standalone()
    yield


app = FastAPI(title="auth-jwt", lifespan=start_standalone)
# The lifespan of the router runs after that of the application.
app.include_router(router)
if CORS_ORIGINS:
    app.add_middleware(
        CORSMiddleware,
        allow_origins=CORS_ORIGINS,
        allow_methods=["GET", "POST"],
        # Tracing tools add their own headers.
        allow_headers=["*"],
        expose_headers=["Retry-After", "WWW-Authenticate"],
    )

if __name__ == "__main__":
    # The lifespans do this, too. But a sys.exit() in a lifespan also prints a traceback.
    configure_standalone()
    db.prepare_collection()
    # Responses are faster, even in an outage. Docker kills the process after 10 seconds.
    uvicorn.run(app, port=5000, timeout_graceful_shutdown=8)
