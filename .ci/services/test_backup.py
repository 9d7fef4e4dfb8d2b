"""Tests of a service whose collection is restored from a backup."""

import pytest
from helpers import new_email


@pytest.fixture
def restore(users):
    """A function that takes a backup, and returns one that restores it without its indexes."""

    def take_backup():
        documents = list(users.find())

        def restore():
            users.drop()
            users.insert_many(documents)

        return restore

    return take_backup


def test_a_restored_backup_contains_sessions_that_were_ended(service, restore):
    tokens = service.register(new_email()).body
    restore_backup = restore()
    assert service.logout(tokens["refresh_token"]).status == 204
    assert service.me(tokens["access_token"]).status == 401
    restore_backup()
    assert service.me(tokens["access_token"]).status == 200


def test_a_registration_creates_the_index_of_a_restored_collection(mongod, service, restore):
    email = new_email()
    service.register(email)
    restore()()
    assert service.register(email).status == 409
    assert mongod.has_unique_index()
