"""The HTTP interface: models, routes and the application."""

import logging
import os
import re
import unicodedata
from contextlib import asynccontextmanager
from typing import Annotated

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, EmailStr, Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError
from pymongo.errors import PyMongoError
from starlette.exceptions import HTTPException

import auth
import db

logger = logging.getLogger("auth_jwt")


def normalize_email(value: str, validate) -> str:
    """Return the email in lower case and NFC. Raises PydanticCustomError."""
    try:
        return unicodedata.normalize("NFC", validate(value).lower())
    except ValidationError:
        # EmailStr's own message quotes the input.
        raise PydanticCustomError("email_invalid", "This is not a valid email address") from None


Email = Annotated[EmailStr, WrapValidator(normalize_email), Field(examples=["alice@example.com"])]
ExamplePassword = Field(examples=["MyS3cret@1"])


class NewCredentials(BaseModel):
    """An email and a password: 8 to 128 characters, upper and lower case, a digit and a symbol."""

    email: Email
    password: Annotated[str, AfterValidator(auth.check_new_password), ExamplePassword]


class Credentials(BaseModel):
    """An email and a password."""

    email: Email
    password: Annotated[str, AfterValidator(auth.normalize_password), ExamplePassword]


class RefreshToken(BaseModel):
    """A refresh token: the newest to refresh, any to log out."""

    refresh_token: str


class Tokens(BaseModel):
    """An access token, and a refresh token for the next pair."""

    user_id: str
    access_token: str
    refresh_token: str


def create_tokens(user_id: str, session: db.Session) -> Tokens:
    """Return the pair of tokens for the session."""
    access_token = auth.create_token("access", user_id, session)
    refresh_token = auth.create_token("refresh", user_id, session)
    return Tokens(user_id=user_id, access_token=access_token, refresh_token=refresh_token)


class AuthRoute(APIRoute):
    """A route whose errors do not quote the input and whose successes are not cached."""

    def get_route_handler(self):
        original_handler = super().get_route_handler()

        async def route_handler(request: Request) -> Response:
            try:
                response = await original_handler(request)
            except RequestValidationError as error:
                # FastAPI's own response quotes the password.
                errors = [{key: e[key] for key in ("loc", "msg", "type")} for e in error.errors()]
                raise HTTPException(422, errors) from None
            except PyMongoError as error:
                raise auth.create_database_error(error) from None
            # FastAPI raises Starlette's HTTPException for a body that it cannot parse.
            except HTTPException as error:
                if error.status_code != 400:
                    raise
                detail = {"loc": ["body"], "msg": "This is not valid JSON", "type": "json_invalid"}
                raise HTTPException(422, [detail]) from None
            response.headers["Cache-Control"] = "no-store"  # RFC 6749 section 5.1
            return response

        return route_handler


@asynccontextmanager
async def lifespan(_: FastAPI):
    """Prepare the database before the first request."""
    db.prepare_collection()
    if not db.MONGO_URI:
        logger.warning("Users are kept in memory and lost at exit. Set MONGO_URI to keep them.")
    yield


router = APIRouter(
    prefix="/auth",
    tags=["auth"],
    route_class=AuthRoute,
    lifespan=lifespan,
    responses={503: {}},
)
BODY_LIMIT = 8 * 1024  # bytes


@router.post("/register", status_code=201, max_body_size=BODY_LIMIT, responses={409: {}, 413: {}})
def register(credentials: NewCredentials, client: auth.HashingClient) -> Tokens:
    """Create a user and start their first session."""
    password_hash = auth.hasher.hash(credentials.password)
    session = auth.create_session()
    user_id = db.create_user(credentials.email, password_hash, session)
    if user_id is None:
        raise HTTPException(409, "This email is registered")
    logger.warning("user_created user=%s session=%s client=%s", user_id, session["sid"], client)
    return create_tokens(user_id, session)


@router.post("/login", max_body_size=BODY_LIMIT, responses={401: {}, 413: {}, 429: {}})
def login(credentials: Credentials, client: auth.HashingClient) -> Tokens:
    """Start a session."""
    user_id = auth.authenticate(credentials.email, credentials.password, client)
    session = auth.create_session()
    if user_id is None or not db.add_session(user_id, session):
        raise HTTPException(401, "Wrong email or password", {"WWW-Authenticate": "Bearer"})
    logger.info("authn_login_success user=%s session=%s client=%s", user_id, session["sid"], client)
    return create_tokens(user_id, session)


@router.get("/me", response_model=auth.User, responses={401: {}})
def me(user: auth.CurrentUser) -> Response:
    """Return the current user."""
    # FastAPI would validate a User again, in another thread.
    return Response(user.model_dump_json(), media_type="application/json")


@router.post("/refresh", max_body_size=BODY_LIMIT, responses={401: {}, 413: {}})
def refresh(body: RefreshToken) -> Tokens:
    """Exchange a refresh token for a new pair of tokens."""
    user_id, session = auth.rotate_session(body.refresh_token)
    return create_tokens(user_id, session)


@router.post("/logout", status_code=204, max_body_size=BODY_LIMIT, responses={401: {}, 413: {}})
def logout(body: RefreshToken) -> Response:
    """End a session."""
    auth.revoke_session(body.refresh_token)
    return Response(status_code=204)


app = FastAPI(title="auth-jwt")
app.include_router(router)

CORS_ORIGINS = os.getenv("CORS_ORIGINS")
if CORS_ORIGINS:
    origins = [origin.strip() for origin in CORS_ORIGINS.split(",")]
    if not all(re.fullmatch(r"[a-z][a-z0-9+.-]*://[a-z0-9._:\[\]-]+", o) for o in origins):
        db.refuse_to_start("CORS_ORIGINS must list origins such as http://localhost:5173.")
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type"],
        expose_headers=["Retry-After", "WWW-Authenticate"],
    )

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    print("auth-jwt: open http://127.0.0.1:5000/docs")
    uvicorn.run(app, host="127.0.0.1", port=5000)
