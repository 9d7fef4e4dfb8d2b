"""Settings and a fixture for the tests of a project with the package `accounts`."""

import os

# Before the first import of `accounts`: keep users in memory, whatever .env contains.
os.environ["MONGO_URI"] = os.environ["JWT_SECRET_KEY"] = ""

import pytest

from accounts import db


@pytest.fixture(autouse=True)
def empty_database():
    """Start each test without users and other documents."""
    assert not db.MONGO_URI, "The tests would delete all users."
    db.users.database.client.drop_database(db.users.database)
