"""The routes (me, register, login, refresh, logout), what they take and what they answer."""

import gc
import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, EmailStr, Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

import auth
import db
from auth import CurrentUser, User

logger = logging.getLogger(__name__)
MAX_BODY_SIZE = 8 * 1024  # bytes; the largest body that is of use has about half


# What comes in


def normalize_email(value: str, validate: Callable[[str], str]) -> str:
    """Return a valid email in lower case. Raises PydanticCustomError, since EmailStr's own message quotes the input."""
    try:
        return validate(value).lower()
    except ValidationError:
        raise PydanticCustomError("email_invalid", "This is not a valid email address") from None


class Credentials(BaseModel):
    """An email, in any letter case, and a password."""

    email: Annotated[EmailStr, WrapValidator(normalize_email), Field(examples=["alice@example.com"])]
    password: Annotated[str, AfterValidator(auth.normalize_password), Field(examples=["MyS3cret@1"])]


class NewCredentials(Credentials):
    """The same, with a password of 8 to 128 characters: a lower-case and an upper-case letter, a digit, a symbol."""

    password: Annotated[str, AfterValidator(auth.check_new_password), Field(examples=["MyS3cret@1"])]


class RefreshToken(BaseModel):
    """A refresh token: the newest of its session; to log out, an older one will do."""

    refresh_token: Annotated[str, Field(examples=["eyJhbGciOiJIUzI1NiIs…"])]


# What goes out


class Tokens(BaseModel):
    """A pair of tokens of one session: the access token for the Authorization header, the other for the next pair."""

    user_id: Annotated[str, Field(examples=["6b02ea3faef37c8dd9090d5f"])]
    access_token: Annotated[str, Field(examples=["eyJhbGciOiJIUzI1NiIs…"])]
    refresh_token: Annotated[str, Field(examples=["eyJhbGciOiJIUzI1NiIs…"])]


class Refusal(BaseModel):
    """Why a request was refused."""

    detail: str


class Problem(BaseModel):
    """One thing that is wrong with a body: where, what, and of which type; never what was sent."""

    loc: list[str | int]
    msg: str
    type: str


class Problems(BaseModel):
    """All that is wrong with a body."""

    detail: list[Problem]


def documented(status: int, description: str, model: type[BaseModel] = Refusal, **headers: str) -> dict:
    """Return what the OpenAPI document says of one refusal; headers are given with an example each."""
    described = {name.replace("_", "-"): {"schema": {"type": "string"}, "example": headers[name]} for name in headers}
    return {status: {"description": description, "model": model, "headers": described}}


UNAVAILABLE = documented(503, "Too many logins at once, or no database", Retry_After="5")
BAD_BODY = documented(413, f"Over {MAX_BODY_SIZE} bytes") | documented(422, "A malformed body or field", Problems)
BAD_BODY[413]["content"] = {"text/plain": {}}  # Starlette's own answer, when the length was announced
INVALID_TOKEN = documented(401, "No valid token", WWW_Authenticate='Bearer error="invalid_token"')


# What holds for every route, also in an app that includes the router


class AuthRoute(APIRoute):
    """A route that keeps what it was sent out of its refusals, and its successes out of caches."""

    def get_route_handler(self) -> Callable:
        """Return FastAPI's handler of the route, wrapped."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                response = await handle(request)
            except RequestValidationError as error:  # FastAPI would send back the whole body, password and all
                problems = [{key: problem[key] for key in ("loc", "msg", "type")} for problem in error.errors()]
                raise HTTPException(422, problems) from None
            except db.DatabaseError as error:
                raise auth.database_unavailable(error) from None
            except HTTPException as error:
                if error.status_code != 400:  # FastAPI's, for a body that is in no known encoding or nested too deep
                    raise
                problem = {"loc": ["body"], "msg": "The body is not valid JSON", "type": "json_invalid"}
                raise HTTPException(422, [problem]) from None
            response.headers["Cache-Control"] = "no-store"  # RFC 6749 section 5.1
            return response

        return answer


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Prepare the collection before the first request."""
    db.create_index()
    if not db.MONGO_URI:
        logger.warning(
            "auth-jwt keeps its users in memory: all of them are gone when this process stops. "
            "To keep them, set MONGO_URI and JWT_SECRET_KEY, as .env.example shows."
        )
    yield


router = APIRouter(prefix="/auth", tags=["auth"], route_class=AuthRoute, lifespan=lifespan)


# The routes


def create_tokens(user_id: str, session: db.Session) -> Tokens:
    """Return the pair of tokens that the session stands for now."""
    return Tokens(
        user_id=user_id,
        access_token=auth.create_access_token(user_id, session["sid"]),
        refresh_token=auth.create_refresh_token(user_id, session),
    )


# Routes are tried in their order, so the one that is asked most comes first.
@router.get("/me", response_model=User, responses=UNAVAILABLE | INVALID_TOKEN)
def me(user: CurrentUser) -> Response:
    """Answer who the bearer of the access token is."""
    # A ready answer: a User would be validated once more, and in one more thread.
    return Response(user.model_dump_json(), media_type="application/json")


@router.post(
    "/register",
    status_code=201,
    max_body_size=MAX_BODY_SIZE,
    responses=UNAVAILABLE | BAD_BODY | documented(409, "The email is registered"),
)
def register(credentials: NewCredentials) -> Tokens:
    """Create a user, and start a session."""
    password_hash = auth.hash_password(credentials.password)
    session = auth.new_session()
    user_id = db.create_user(credentials.email, password_hash, session)
    if user_id is None:
        raise HTTPException(409, "This email is registered")
    return create_tokens(user_id, session)


@router.post(
    "/login",
    max_body_size=MAX_BODY_SIZE,
    responses=UNAVAILABLE | BAD_BODY | documented(401, "Wrong email or password", WWW_Authenticate="Bearer"),
)
def login(credentials: Credentials) -> Tokens:
    """Start a session of an existing user."""
    user_id = auth.authenticate(credentials.email, credentials.password)
    session = auth.new_session()
    if user_id is None or not db.add_session(user_id, session):
        raise HTTPException(401, "Wrong email or password", {"WWW-Authenticate": "Bearer"})
    return create_tokens(user_id, session)


@router.post("/refresh", max_body_size=MAX_BODY_SIZE, responses=UNAVAILABLE | BAD_BODY | INVALID_TOKEN)
def refresh(body: RefreshToken) -> Tokens:
    """Exchange a refresh token for a new pair."""
    return create_tokens(*auth.rotate_session(body.refresh_token))


@router.post(
    "/logout",
    status_code=204,
    response_class=Response,
    max_body_size=MAX_BODY_SIZE,
    responses=UNAVAILABLE | BAD_BODY | INVALID_TOKEN,
)
def logout(body: RefreshToken) -> None:
    """End the session, and with it all of its tokens."""
    auth.revoke_session(body.refresh_token)


# What holds for this app alone


@asynccontextmanager
async def tune_interpreter(_: FastAPI) -> AsyncIterator[None]:
    """Have the threads interrupt each other less and the garbage collector skip what the imports have made."""
    sys.setswitchinterval(0.02)  # seconds; a turn in a request is shorter than Python's default of 0.005
    gc.freeze()
    yield


# FastAPI's telemetry lets whatever processor is set up read whole requests, passwords included.
app = FastAPI(
    title="auth-jwt",
    summary="Registers users, logs them in and knows them by their tokens",
    lifespan=tune_interpreter,
    telemetry={"tracing": False, "metrics": False, "logs": False},
)
app.include_router(router)

if __name__ == "__main__":
    print("auth-jwt: try it at http://127.0.0.1:5000/docs", flush=True)
    uvicorn.run(app, host="127.0.0.1", port=5000)
