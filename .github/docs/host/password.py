"""A route that changes the password and ends all other sessions of the user."""

import logging

from bson import ObjectId
from fastapi import APIRouter
from pydantic import BaseModel, Field

from accounts import auth, db
from accounts.app import AuthRoute, Password, StrongPassword

logger = logging.getLogger("auth_jwt")

# Without AuthRoute, a 422 would quote the passwords.
router = APIRouter(route_class=AuthRoute, max_body_size=4 * 1024)


class PasswordChange(BaseModel):
    """The current password and a new one."""

    current_password: Password = Field(repr=False)
    new_password: StrongPassword = Field(repr=False)


@router.post("/password")
def change_password(
    body: PasswordChange, user: auth.CurrentUser, network: auth.ClientNetwork
) -> auth.Tokens:
    """Set the new password, end all other sessions and return the tokens of a new one."""
    password_hash = auth.hash_password(body.new_password, network)
    tokens = auth.log_in(user.email, body.current_password, network)
    sid = auth.read_token(tokens.refresh_token, "refresh").sid
    # An operator who resets the password or disables the user ends all sessions. Then this query
    # matches nothing, and the operator's change stays.
    query = {"_id": ObjectId(user.id), "refresh_tokens.sid": sid}
    changes = {
        "$set": {"password_hash": password_hash},
        "$pull": {"refresh_tokens": {"sid": {"$ne": sid}}},
    }
    with db.circuit_breaker():
        is_changed = db.users.update_one(query, changes).matched_count == 1
    if not is_changed:
        raise auth.InvalidToken
    logger.info("authn_password_change user=%s session=%s network=%s", user.id, sid, network)
    return tokens
