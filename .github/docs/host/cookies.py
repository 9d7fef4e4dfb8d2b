"""Sessions in cookies, which the page's scripts cannot read.

After a 401, a page sends POST /session/refresh and repeats its request.
"""

from typing import Annotated

from fastapi import APIRouter, Cookie, Depends, HTTPException, Response
from fastapi.requests import HTTPConnection
from fastapi.security import HTTPAuthorizationCredentials

from accounts import auth
from accounts.app import AuthRoute, Credentials, NewCredentials

ORIGINS = ["http://localhost:5173"]  # of all pages that may use the cookies

# A browser accepts a __Host- cookie only from this host, with Secure and the path /.
ACCESS_COOKIE = "__Host-access_token"
REFRESH_COOKIE = "__Host-refresh_token"
OPTIONS = {"secure": True, "httponly": True, "samesite": "lax"}


async def check_origin(connection: HTTPConnection) -> None:
    """Raise a 403 unless the request is a GET, or a page of ORIGINS has sent it.

    SameSite=Lax keeps the cookies from other sites, but not from other subdomains and ports of
    the same site.
    """
    # A WebSocket has no method.
    is_get = connection.scope.get("method") == "GET"
    if not is_get and connection.headers.get("Origin") not in ORIGINS:
        raise HTTPException(403, "This origin may not use the cookies")


def get_cookie_user(
    _: Annotated[None, Depends(check_origin)],
    access_token: Annotated[str, Cookie(alias=ACCESS_COOKIE)] = "",
) -> auth.User:
    """Return the user whose access token is in the cookie."""
    token = HTTPAuthorizationCredentials(scheme="Bearer", credentials=access_token)
    return auth.get_current_user(token)


CookieUser = Annotated[auth.User, Depends(get_cookie_user)]
RefreshToken = Annotated[str, Cookie(alias=REFRESH_COOKIE)]


def set_cookies(response: Response, tokens: auth.Tokens) -> None:
    """Send the tokens as cookies, which last as long as the refresh token."""
    max_age = int(auth.REFRESH_TOKEN_LIFETIME.total_seconds())
    response.set_cookie(ACCESS_COOKIE, tokens.access_token, max_age, **OPTIONS)
    response.set_cookie(REFRESH_COOKIE, tokens.refresh_token, max_age, **OPTIONS)


router = APIRouter(
    prefix="/session",
    route_class=AuthRoute,
    dependencies=[Depends(check_origin)],
    max_body_size=4 * 1024,
)


@router.get("")
def show_session(user: CookieUser) -> auth.User:
    """Return the current user."""
    return user


@router.post("/register", status_code=204)
def register(credentials: NewCredentials, network: auth.ClientNetwork, response: Response) -> None:
    """Create a user and start their first session."""
    set_cookies(response, auth.register(credentials.email, credentials.password, network))


@router.post("/login", status_code=204)
def log_in(credentials: Credentials, network: auth.ClientNetwork, response: Response) -> None:
    """Start a session."""
    set_cookies(response, auth.log_in(credentials.email, credentials.password, network))


@router.post("/refresh", status_code=204)
def refresh(
    network: auth.ClientNetwork, response: Response, refresh_token: RefreshToken = ""
) -> None:
    """Replace both tokens."""
    set_cookies(response, auth.refresh(refresh_token, network))


@router.post("/logout", status_code=204)
def log_out(
    network: auth.ClientNetwork, response: Response, refresh_token: RefreshToken = ""
) -> None:
    """End the session and delete the cookies."""
    auth.log_out(refresh_token, network)
    response.delete_cookie(ACCESS_COOKIE, **OPTIONS)
    response.delete_cookie(REFRESH_COOKIE, **OPTIONS)
