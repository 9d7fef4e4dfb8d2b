"""Convert the emails of an existing collection to the form in which the service stores them.

It may run while the service runs, and again. An email that it cannot convert is reported by the
_id of its user, and lets it exit with status 1.

In the folder of the service: PYTHONPATH=. .venv/bin/python .github/docs/convert_emails.py
Beside a package's db.py: python -m accounts.convert_emails
"""

import sys

import pymongo
from pymongo.errors import DuplicateKeyError

import app
import db


def convert_emails() -> list[str]:
    """Convert all emails. Return a text for each one that is impossible to convert."""
    try:
        # Without the index, two users could get the same email.
        db.ensure_unique_index()
    except DuplicateKeyError:
        return [f"{ids}: the emails are equal, or absent" for ids in find_equal_emails()]
    # Other programs can store a list of emails.
    query = {"email": {"$type": "string", "$not": {"$type": "array"}}}
    return [text for user in db.users.find(query, {"email": 1}) if (text := convert_email(user))]


def find_equal_emails() -> list[str]:
    """Return the _ids of all users with the same email, as one text for each email."""
    group = {"_id": "$email", "ids": {"$push": "$_id"}}
    stages: list[db.Document] = [{"$group": group}, {"$match": {"ids.1": {"$exists": True}}}]
    return [", ".join(map(str, each["ids"])) for each in db.users.aggregate(stages)]


def convert_email(user: db.Document) -> str | None:
    """Convert the email of the user. Return a text if that is impossible."""
    old_email = user["email"]
    try:
        email = app.normalize_email(old_email)
    except ValueError:
        return f"{user['_id']}: the email is invalid"
    if email == old_email:
        return None
    try:
        # The user can have been given another email in the meantime.
        db.users.update_one({"_id": user["_id"], "email": old_email}, {"$set": {"email": email}})
    except DuplicateKeyError:
        others = ", ".join(map(str, db.users.distinct("_id", {"email": email})))
        return f"{user['_id']}: the converted email is that of {others}"
    return None


def main() -> None:
    """Convert all emails and print those that remain."""
    if not db.MONGO_URI:
        sys.exit("Set MONGO_URI and JWT_SECRET_KEY to those of the service.")
    # Without a limit for the time of a query. None would mean the limit of the service.
    with pymongo.timeout(0):
        texts = convert_emails()
    print(*texts, f"{len(texts)} emails in {db.users.full_name} cannot be converted", sep="\n")
    sys.exit(1 if texts else 0)


if __name__ == "__main__":
    main()
