"""Tests of the login limit at its margins."""

from datetime import UTC, datetime, timedelta

import pytest
from argon2 import PasswordHasher

import auth
import db
from test_app import (
    ADDRESS,
    client_at,
    login,
    logout,
    refresh,
    register,
    stored_user,
)

MINUTE, HOUR, DAY = 60, 60 * 60, 24 * 60 * 60  # seconds


def addresses(number):
    return [
        f"203.0.113.{host}" if host < 256 else f"198.51.100.{host - 256}" for host in range(number)
    ]


def failure(network, seconds_ago):
    """Return a failed login as it is stored."""
    return {"network": network, "failed_at": datetime.now(UTC) - timedelta(seconds=seconds_ago)}


def store_failures(email, failures):
    db.users.update_one({"email": email}, {"$set": {"login_failures": failures}})


@pytest.mark.parametrize(
    ("ages", "wait"),
    [
        ([0.0] * 4, None),
        ([0] * 5, MINUTE),
        ([10, 20, 30, 40, 50], 10),
        ([10, 20, 30, 40, 60], None),
        ([50, 40, 30, 20, 10], 10),
        ([5, 10, 20, 30, 40, 50], 20),
        ([100] * 19, None),
        ([100] * 20, HOUR - 100),
        ([*[HOUR - 5] * 16, *[100] * 4], 5),
        ([*[HOUR - 5] * 15, *[0] * 5], MINUTE),
        ([HOUR] * 60, None),
        ([-1] * 60, None),
        ([-HOUR] * 60, None),
        ([-60, *[0] * 5], MINUTE),
        ([0] * 100, HOUR),
        ([*[HOUR - 5] * 95, *[0] * 5], MINUTE),
    ],
)
def test_the_wait_ends_when_the_oldest_failure_that_counts_expires(
    client, tokens, email, ages, wait
):
    # A failure is a little older when the login is checked.
    store_failures(email, [failure(ADDRESS, age + 0.01 if age else 0) for age in ages])
    response = login(client, email)
    assert response.status_code == (429 if wait else 200)
    assert response.headers.get("Retry-After") == (str(wait) if wait else None)


def test_a_login_is_allowed_exactly_after_retry_after(client, tokens, email, set_clock):
    for second in range(0, 50, 10):
        set_clock(seconds=second)
        assert login(client, email, "wrong").status_code == 401
    assert login(client, email).headers["Retry-After"] == "20"
    set_clock(seconds=59)
    assert login(client, email).headers["Retry-After"] == "1"
    set_clock(seconds=60)
    assert login(client, email, "wrong").status_code == 401
    assert login(client, email, "wrong").headers["Retry-After"] == "10"


def guess_for(hours, client, email, set_clock, owner):
    """Guess as often as Retry-After allows; the owner logs in every ten minutes.

    Return the times of the checked guesses in seconds, and the owner's status codes.
    """
    seconds, guesses, owner_statuses = 0, [], []
    while seconds < hours * HOUR:
        set_clock(seconds=seconds)
        response = login(client, email, "wrong")
        if response.status_code == 401:
            guesses.append(seconds)
            next_guess = seconds
        else:
            next_guess = seconds + int(response.headers["Retry-After"])
        while len(owner_statuses) * 600 <= next_guess:
            set_clock(seconds=len(owner_statuses) * 600)
            owner_statuses.append(login(owner, email).status_code)
        seconds = next_guess
    return guesses, owner_statuses


def test_a_stranger_who_guesses_for_four_hours_does_not_lock_the_owner_out(
    client, tokens, email, set_clock
):
    owner = client_at(client, "198.51.100.7")
    guesses, owner_statuses = guess_for(4, client, email, set_clock, owner)
    assert set(owner_statuses) == {200}
    assert len(owner_statuses) >= 24
    guesses_in_an_hour = [sum(t <= u < t + HOUR for u in guesses) for t in guesses]
    guesses_in_a_minute = [sum(t <= u < t + MINUTE for u in guesses) for t in guesses]
    assert (max(guesses_in_an_hour), max(guesses_in_a_minute)) == (20, 5)


def test_five_networks_together_close_an_account_to_new_networks(client, tokens, email, set_clock):
    statuses = []
    for minute in range(5):
        set_clock(minutes=minute)
        for number in range(20):
            stranger = client_at(client, f"203.0.113.{number // 4}")
            statuses.append(login(stranger, email, "wrong").status_code)
    assert statuses == [401] * 100
    assert login(client_at(client, "198.51.100.1"), email).status_code == 429
    assert login(client, email).status_code == 200


def test_many_networks_together_check_at_most_100_passwords_an_hour(
    client, tokens, email, set_clock
):
    owner = client_at(client, "192.0.2.1")
    assert login(owner, email).status_code == 200
    statuses = []
    for number, address in enumerate(addresses(260)):
        set_clock(seconds=number * 10)
        statuses.append(login(client_at(client, address), email, "wrong").status_code)
    assert statuses == [401] * 100 + [429] * 160
    assert login(owner, email).status_code == 200
    new_network = client_at(client, "192.0.2.2")
    wait = int(login(new_network, email).headers["Retry-After"])
    assert wait == HOUR - 2590
    set_clock(seconds=2590 + wait - 1)
    assert login(new_network, email).status_code == 429
    set_clock(seconds=2590 + wait)
    assert login(new_network, email).status_code == 200


def test_the_session_of_a_network_still_counts_after_a_refresh(client, tokens, email, set_clock):
    failures = [failure(address, 10) for address in addresses(100)]
    db.users.update_one({"email": email}, {"$set": {"login_failures": failures}})
    assert login(client_at(client, "192.0.2.2"), email).status_code == 429
    newest = refresh(client_at(client, "192.0.2.2"), tokens["refresh_token"]).json()
    assert login(client_at(client, "192.0.2.2"), email).status_code == 429
    assert login(client_at(client, ADDRESS), email).status_code == 200
    for session in (newest, login(client, email).json(), login(client, email).json()):
        logout(client, session["refresh_token"])
    db.users.update_one({"email": email}, {"$set": {"refresh_tokens": []}})
    assert login(client, email).status_code == 429


def test_an_expired_session_does_not_exempt_its_network(client, tokens, email, set_clock):
    set_clock(days=7, seconds=-1)
    now = datetime.now(UTC)
    failed_at = now + timedelta(days=7, seconds=-10)
    store_failures(email, [{"network": n, "failed_at": failed_at} for n in addresses(100)])
    assert login(client, email, "wrong").status_code == 401
    set_clock(days=7, seconds=1)
    assert login(client, email).status_code == 429


def test_sessions_are_only_looked_up_when_all_networks_reached_the_limit(
    client, tokens, email, monkeypatch
):
    looked_up = []
    has_session_since = db.has_session_since

    def record(*args):
        looked_up.append(args)
        return has_session_since(*args)

    monkeypatch.setattr(db, "has_session_since", record)
    store_failures(email, [failure(address, 10) for address in addresses(99)])
    assert login(client, email, "wrong").status_code == 401
    assert looked_up == []
    assert login(client, email).status_code == 200
    assert len(looked_up) == 1


@pytest.mark.parametrize(
    ("address", "same_network", "other_network"),
    [
        ("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2"),
        ("::ffff:192.0.2.1", "192.0.2.1", "::ffff:192.0.2.2"),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::2", "fe81::1"),
        ("a\nforged line", "", "192.0.2.1"),
    ],
)
def test_the_addresses_of_a_network_share_its_failures(
    client, tokens, email, address, same_network, other_network
):
    for _ in range(5):
        login(client_at(client, address), email, "wrong")
    assert login(client_at(client, same_network), email).status_code == 429
    assert login(client_at(client, other_network), email).status_code == 200


@pytest.mark.parametrize(
    ("address", "logged"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:0:1::1", "2001:db8:0:1::"),
        ("fe80::1%\nforged", "fe80::"),
        ("192.0.2.1\nforged", "unknown"),
        ("host.example", "unknown"),
        ("", "unknown"),
    ],
)
def test_a_log_line_contains_a_valid_address_or_unknown(client, email, events, address, logged):
    login(client_at(client, address), email)
    assert events()[-1][1] == f"authn_login_fail user=unknown network={logged}"


@pytest.fixture
def locked(client, tokens, email):
    """The tokens of a user who has to wait after five wrong passwords."""
    for _ in range(5):
        login(client, email, "wrong")
    return tokens


def test_a_login_beyond_the_limit_hashes_nothing_and_does_not_prolong_the_wait(
    client, set_clock, locked, email, blocked_hasher
):
    for _ in range(3):
        assert login(client, email, "wrong").status_code == 429
    assert blocked_hasher.peak == 0
    assert len(stored_user(locked)["login_failures"]) == 5
    blocked_hasher.unblock.set()
    set_clock(seconds=60)
    assert login(client, email).status_code == 200


def test_a_locked_account_does_not_affect_other_accounts(client, locked, email):
    register(client, "other-" + email)
    assert login(client, "other-" + email).status_code == 200
    assert login(client, "unknown-" + email).status_code == 401


def test_the_newest_100_failures_are_kept(client, tokens, email):
    old = [failure("192.0.2.1", 2 * HOUR) for _ in range(100)]
    db.users.update_one({"email": email}, {"$set": {"login_failures": old}})
    login(client, email, "wrong")
    networks = [failure["network"] for failure in stored_user(tokens)["login_failures"]]
    assert networks == ["192.0.2.1"] * 99 + [ADDRESS]


def test_wrong_passwords_for_an_unknown_email_are_never_limited(client, email):
    assert {login(client, email).status_code for _ in range(12)} == {401}
    assert register(client, email).status_code == 201
    assert login(client, email).status_code == 200


def test_login_verifies_a_hash_of_the_same_cost_for_an_unknown_email(
    client, email, default_hasher, monkeypatch
):
    verified = []

    class Hasher(PasswordHasher):
        def verify(self, hash, password):
            verified.append(hash)
            return super().verify(hash, password)

    monkeypatch.setattr(auth, "hasher", Hasher())
    login(client, email)
    assert [hash.split("$")[1:4] for hash in verified] == [["argon2id", "v=19", "m=65536,t=3,p=4"]]


def test_login_also_records_a_failure_for_an_unknown_email(client, tokens, email, monkeypatch):
    recorded = []
    monkeypatch.setattr(db, "record_failed_login", lambda *args: recorded.append(args[:2]))
    login(client, email, "wrong")
    login(client, "unknown-" + email, "wrong")
    assert recorded == [(email, ADDRESS), ("unknown-" + email, ADDRESS)]
