"""A route for visitors with or without an access token."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from accounts.auth import InvalidToken, User, get_current_user

# The same name and description as those of the service, which share one entry in /docs.
optional_bearer = HTTPBearer(
    scheme_name="AccessToken", description="Paste an access_token.", auto_error=False
)


def get_optional_user(
    request: Request,
    token: Annotated[HTTPAuthorizationCredentials | None, Depends(optional_bearer)],
) -> User | None:
    """Return the current user, or None if the request has no Authorization header."""
    if "Authorization" not in request.headers:
        return None
    if token is None:
        raise InvalidToken
    return get_current_user(token)


OptionalUser = Annotated[User | None, Depends(get_optional_user)]

router = APIRouter()


@router.get("/greeting")
def greet(user: OptionalUser) -> dict[str, str]:
    """Greet the user by email, or an anonymous visitor."""
    return {"greeting": f"Hello {user.email}" if user else "Hello"}
