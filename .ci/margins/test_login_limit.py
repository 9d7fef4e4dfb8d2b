"""Tests of the login limit at its margins."""

from datetime import timedelta

import pytest
from argon2 import PasswordHasher
from bson import ObjectId

import auth
import db
from test_app import ADDRESS, client_at, login, logout, refresh, register, stored_user

MINUTE, HOUR = 60, 60 * 60  # seconds
STRANGER = "192.0.2.7"  # in a network in which the user has no session


@pytest.fixture
def stranger(client):
    return client_at(client, STRANGER)


def addresses(number):
    return [f"203.0.{host // 256}.{host % 256}" for host in range(number)]


def store_failures(tokens, ages):
    """Store failed logins of a user, as pairs of a network and an age in seconds."""
    failures = [
        {"network": network, "failed_at": auth.now() - timedelta(seconds=age)}
        for network, age in ages
    ]
    user = {"_id": ObjectId(tokens["user_id"])}
    db.users.update_one(user, {"$set": {"login_failures": failures}})


def store_failures_of_100_networks(tokens, age=10):
    store_failures(tokens, [(network, age) for network in addresses(100)])


def retry_after(response):
    """Return the wait of a 429 in seconds, or None for another response."""
    return int(response.headers["Retry-After"]) if response.status_code == 429 else None


# The windows


@pytest.mark.parametrize(
    ("ages", "wait"),
    [
        # At most five in a minute.
        ([0] * 4, None),
        ([0] * 5, MINUTE),
        ([10, 20, 30, 40, 50], 10),
        ([50, 10, 40, 20, 30], 10),
        ([5, 10, 20, 30, 40, 50], 20),
        ([10, 20, 30, 40, 59], 1),
        ([10, 20, 30, 40, 60], None),
        ([59.5] * 5, 1),
        ([0.5] * 5, MINUTE),
        # At most twenty in an hour.
        ([100] * 19, None),
        ([100] * 20, HOUR - 100),
        ([*[100] * 19, HOUR - 1], 1),
        ([*[100] * 19, HOUR], None),
        ([*[HOUR - 5] * 16, *[100] * 4], 5),
        ([*[HOUR - 5] * 15, *[0] * 5], MINUTE),
        ([*[HOUR - 90] * 15, *[0] * 5], 90),
        ([HOUR] * 60, None),
        ([0] * 100, HOUR),
        # A clock was set back.
        ([-1] * 4, None),
        ([-1] * 5, MINUTE + 1),
        ([-1, 0, 0, 0, 0], MINUTE),
        ([0, 0, 0, 0, -59], MINUTE),
        ([0, 0, 0, 0, -MINUTE], None),
        ([-30] * 5, 90),
        ([-MINUTE] * 19, None),
        ([-MINUTE] * 20, HOUR + 60),
        ([1 - HOUR] * 20, 2 * HOUR - 1),
        ([-HOUR] * 60, None),
        ([-24 * HOUR] * 100, None),
    ],
)
def test_the_wait_ends_when_the_oldest_failure_that_counts_leaves_the_window(
    stranger, tokens, email, set_clock, ages, wait
):
    store_failures(tokens, [(STRANGER, age) for age in ages])
    assert retry_after(login(stranger, email)) == wait


@pytest.mark.parametrize(
    ("own_ages", "other_ages", "wait"),
    [
        ([], [10] * 99, None),
        ([], [10] * 100, HOUR - 10),
        ([10], [10] * 99, HOUR - 10),
        ([], [*[10] * 99, HOUR - 1], 1),
        ([], [*[10] * 99, HOUR], None),
        ([], [*[10] * 99, -1], HOUR - 10),
        ([], [*[10] * 99, -HOUR], None),
        ([0] * 5, [10] * 95, HOUR - 10),
        ([0] * 5, [HOUR - 5] * 95, MINUTE),
        ([0] * 20, [10] * 80, HOUR),
    ],
)
def test_failures_of_all_networks_count_in_the_window_of_an_hour(
    stranger, tokens, email, set_clock, own_ages, other_ages, wait
):
    failures = list(zip(addresses(100), other_ages, strict=False))
    store_failures(tokens, failures + [(STRANGER, age) for age in own_ages])
    assert retry_after(login(stranger, email)) == wait


def test_a_login_is_allowed_exactly_after_retry_after(client, tokens, email, set_clock):
    for second in range(0, 50, 10):
        set_clock(seconds=second)
        assert login(client, email, "wrong").status_code == 401
    assert retry_after(login(client, email)) == 20
    set_clock(seconds=59)
    assert retry_after(login(client, email)) == 1
    set_clock(seconds=60)
    assert login(client, email, "wrong").status_code == 401
    assert retry_after(login(client, email, "wrong")) == 10


def test_the_newest_100_failures_are_kept(client, tokens, email, set_clock):
    store_failures(tokens, [("192.0.2.1", 2 * HOUR)] * 100)
    login(client, email, "wrong")
    networks = [failure["network"] for failure in stored_user(tokens)["login_failures"]]
    assert networks == ["192.0.2.1"] * 99 + [ADDRESS]


# Guessing


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
            next_guess = seconds + retry_after(response)
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


def test_five_networks_together_close_an_account_to_new_networks(
    client, stranger, tokens, email, set_clock
):
    statuses = []
    for minute in range(5):
        set_clock(minutes=minute)
        for number in range(20):
            guesser = client_at(client, f"203.0.113.{number // 4}")
            statuses.append(login(guesser, email, "wrong").status_code)
    assert statuses == [401] * 100
    assert login(stranger, email).status_code == 429
    assert login(client, email).status_code == 200


def test_many_networks_together_check_at_most_100_passwords_an_hour(
    client, stranger, tokens, email, set_clock
):
    statuses = []
    for number, address in enumerate(addresses(260)):
        set_clock(seconds=number * 10)
        statuses.append(login(client_at(client, address), email, "wrong").status_code)
    assert statuses == [401] * 100 + [429] * 160
    assert login(client, email).status_code == 200
    wait = retry_after(login(stranger, email))
    assert wait == HOUR - 2590
    set_clock(seconds=2590 + wait - 1)
    assert login(stranger, email).status_code == 429
    set_clock(seconds=2590 + wait)
    assert login(stranger, email).status_code == 200


# Networks with a session


def test_a_session_does_not_exempt_its_network_from_its_own_limits(
    client, tokens, email, set_clock
):
    failures = [(network, 10) for network in addresses(95)]
    store_failures(tokens, failures + [(ADDRESS, 0)] * 5)
    assert retry_after(login(client, email)) == MINUTE


def test_a_session_counts_for_the_network_of_its_login_after_a_refresh(
    client, stranger, tokens, email
):
    store_failures_of_100_networks(tokens)
    assert refresh(stranger, tokens["refresh_token"]).status_code == 200
    assert login(stranger, email).status_code == 429
    assert login(client, email).status_code == 200


def test_a_session_that_has_ended_does_not_exempt_its_network(client, tokens, email):
    store_failures_of_100_networks(tokens)
    logout(client, tokens["refresh_token"])
    assert login(client, email).status_code == 429


@pytest.mark.parametrize(("seconds", "status"), [(-1, 401), (0, 429)])
def test_a_session_that_has_expired_does_not_exempt_its_network(
    client, email, set_clock, seconds, status
):
    tokens = register(client, email).json()
    set_clock(days=7, seconds=seconds)
    store_failures_of_100_networks(tokens)
    assert login(client, email, "wrong").status_code == status


def test_a_session_exempts_its_network_for_7_days_from_its_last_refresh(client, email, set_clock):
    tokens = register(client, email).json()
    set_clock(days=6)
    refresh(client, tokens["refresh_token"])
    set_clock(days=12)
    store_failures_of_100_networks(tokens)
    assert login(client, email).status_code == 200


def test_a_live_session_elsewhere_does_not_exempt_the_network_of_an_expired_one(
    client, stranger, email, set_clock
):
    tokens = register(stranger, email).json()
    set_clock(days=8)
    assert login(client, email).status_code == 200
    store_failures_of_100_networks(tokens)
    assert login(stranger, email).status_code == 429
    assert login(client, email).status_code == 200


def test_a_session_of_another_user_does_not_exempt_its_network(stranger, tokens, email):
    assert register(stranger, "other-" + email).status_code == 201
    store_failures_of_100_networks(tokens)
    assert login(stranger, email).status_code == 429


def test_sessions_are_only_looked_up_when_all_networks_have_reached_the_limit(
    client, tokens, email, monkeypatch
):
    looked_up = []
    has_session_since = db.has_session_since

    def record(*args):
        looked_up.append(args)
        return has_session_since(*args)

    monkeypatch.setattr(db, "has_session_since", record)
    store_failures(tokens, [(network, 10) for network in addresses(99)])
    assert login(client, email, "wrong").status_code == 401
    assert looked_up == []
    assert login(client, email).status_code == 200
    assert len(looked_up) == 2  # before and after the hash


# Addresses


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


# A login that has to wait


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


def test_the_right_password_resets_the_limit_of_its_network(client, tokens, email):
    for _ in range(3):
        attempts = [login(client, email, "wrong") for _ in range(4)] + [login(client, email)]
        assert [response.status_code for response in attempts] == [401] * 4 + [200]


# Unknown emails


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
