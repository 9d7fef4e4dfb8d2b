"""A collection of your own, in the database of the users."""

from bson import ObjectId
from fastapi import APIRouter
from pydantic import BaseModel, Field

from accounts import db
from accounts.auth import CurrentUser

lists = db.users.database["lists"]

router = APIRouter(prefix="/lists")


class NewList(BaseModel):
    """The name of a list."""

    name: str = Field(max_length=100)


# These are plain `def` routes, because a query in an `async def` route would block the event loop.


@router.post("", status_code=201)
def create_list(new_list: NewList, user: CurrentUser) -> None:
    """Store a list of the current user."""
    with db.circuit_breaker():
        lists.insert_one({"owner": ObjectId(user.id), "name": new_list.name})


@router.get("")
def show_lists(user: CurrentUser) -> list[str]:
    """Return the names of the current user's lists."""
    with db.circuit_breaker():
        # find() itself sends no query. The loop does.
        return [document["name"] for document in lists.find({"owner": ObjectId(user.id)})]


def delete_orphaned_lists() -> int:
    """Delete the lists of users who no longer exist, and return the number of lists."""
    # The owners come first, so that the lists of a user who registers meanwhile stay.
    owners = lists.distinct("owner")
    existing_owners = db.users.distinct("_id", {"_id": {"$in": owners}})
    deleted_owners = set(owners) - set(existing_owners)
    return lists.delete_many({"owner": {"$in": list(deleted_owners)}}).deleted_count
