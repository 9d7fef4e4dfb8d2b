"""Tests of the login limit at its margins."""

import uuid
from datetime import timedelta

import pytest
from argon2 import PasswordHasher
from bson import ObjectId
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import auth
import db
from test_app import ADDRESS, client_at, login, logout, refresh, register, stored_user

HOUR = 60 * 60  # seconds
STRANGER = "192.0.2.7"  # a network in which the user has no session
OTHER_NETWORKS = [f"203.0.113.{number}" for number in range(100)]


@pytest.fixture
def stranger(client):
    return client_at(client, STRANGER)


def store_failures(tokens, networks_and_ages):
    """Replace the failed logins of a user. The ages are in seconds."""
    failures = [
        {"network": network, "failed_at": auth.now() - timedelta(seconds=age)}
        for network, age in networks_and_ages
    ]
    user = {"_id": ObjectId(tokens["user_id"])}
    db.users.update_one(user, {"$set": {"login_failures": failures}})


def reach_limit_of_all_networks(tokens):
    store_failures(tokens, [(network, 10) for network in OTHER_NETWORKS])


def retry_after(response):
    """Return the wait of a 429 in seconds, or 0 for another response."""
    return int(response.headers["Retry-After"]) if response.status_code == 429 else 0


# The wait

# The ages of the failures of one network in seconds, and the wait.
ONE_NETWORK = {
    "19 failures": ([10] * 19, 0),
    "20 failures": ([10] * 20, HOUR - 10),
    "25 failures, of which the 20th newest counts": ([*range(25)], HOUR - 19),
    "in another order": ([*range(25)][::-1], HOUR - 19),
    "100 failures": ([0] * 100, HOUR),
    "one leaves the period in a second": ([10] * 19 + [HOUR - 1], 1),
    "one has left the period": ([10] * 19 + [HOUR], 0),
    "all have left the period": ([HOUR] * 100, 0),
    "a fraction of a second is rounded up": ([HOUR - 0.5] * 20, 1),
    "a clock was set back by a second": ([-1] * 20, HOUR + 1),
    "a clock was set back by almost an hour": ([1 - HOUR] * 20, 2 * HOUR - 1),
    "a clock was set back by an hour": ([-HOUR] * 100, 0),
}


@pytest.mark.parametrize(("ages", "wait"), ONE_NETWORK.values(), ids=ONE_NETWORK.keys())
def test_a_network_waits_until_its_20th_newest_failure_is_an_hour_old(
    client, tokens, email, set_clock, ages, wait
):
    store_failures(tokens, [(ADDRESS, age) for age in ages])
    assert retry_after(login(client, email)) == wait


# The ages of the stranger's failures, those of one failure in each other network, and the wait.
ALL_NETWORKS = {
    "99 failures": ([], [10] * 99, 0),
    "100 failures": ([], [10] * 100, HOUR - 10),
    "100 failures, one of which is the stranger's": ([10], [10] * 99, HOUR - 10),
    "one leaves the period in a second": ([], [10] * 99 + [HOUR - 1], 1),
    "one has left the period": ([], [10] * 99 + [HOUR], 0),
    "one is an hour in the future": ([], [10] * 99 + [-HOUR], 0),
    "the stranger's own limit is reached for longer": ([0] * 20, [HOUR - 10] * 80, HOUR),
}


@pytest.mark.parametrize(
    ("own_ages", "other_ages", "wait"), ALL_NETWORKS.values(), ids=ALL_NETWORKS.keys()
)
def test_a_stranger_waits_until_the_100th_newest_failure_of_all_networks_is_an_hour_old(
    stranger, tokens, email, set_clock, own_ages, other_ages, wait
):
    failures = list(zip(OTHER_NETWORKS, other_ages, strict=False))
    store_failures(tokens, failures + [(STRANGER, age) for age in own_ages])
    assert retry_after(login(stranger, email)) == wait


def is_limited(failures, has_session, now):
    """Return whether a login from ADDRESS gets a 429. A failure is a network and a time."""
    recent = [network for network, time in failures if now < time + HOUR]
    return recent.count(ADDRESS) >= 20 or (len(recent) >= 100 and not has_session)


times = st.integers(-HOUR, -HOUR + 60) | st.integers(-HOUR, 0) | st.integers(-60, 0)


@settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    own_times=st.lists(times, min_size=15, max_size=25),
    number_of_others=st.sampled_from([0, 75, 80, 100]),
    has_session=st.booleans(),
)
def test_a_login_is_allowed_exactly_when_retry_after_has_passed(
    client, stranger, set_clock, own_times, number_of_others, has_session
):
    set_clock()
    email = f"{uuid.uuid4().hex}@example.com"
    tokens = register(client if has_session else stranger, email).json()
    failures = [("198.51.100.1", -HOUR + 1 + 30 * number) for number in range(number_of_others)]
    failures += [(ADDRESS, time) for time in own_times]
    failures = failures[-100:]
    store_failures(tokens, [(network, -time) for network, time in failures])
    ends = [0] + [time + HOUR for _, time in failures]
    wait = min(end for end in ends if not is_limited(failures, has_session, end))
    if wait > 0:
        for seconds in (0, wait - 1):
            set_clock(seconds=seconds)
            assert retry_after(login(client, email)) == wait - seconds
    set_clock(seconds=wait)
    assert login(client, email, "wrong").status_code == 401


def test_the_newest_100_failures_are_kept(client, tokens, email):
    store_failures(tokens, [(STRANGER, 2 * HOUR)] * 100)
    login(client, email, "wrong")
    networks = [failure["network"] for failure in stored_user(tokens)["login_failures"]]
    assert networks == [STRANGER] * 99 + [ADDRESS]


def test_a_login_beyond_the_limit_hashes_nothing_and_does_not_prolong_the_wait(
    client, tokens, email, set_clock, monkeypatch
):
    store_failures(tokens, [(ADDRESS, 0)] * 20)
    with monkeypatch.context() as patch:
        patch.setattr(auth, "hasher", None)
        set_clock(minutes=59)
        assert [retry_after(login(client, email, "wrong")) for _ in range(3)] == [60] * 3
    assert len(stored_user(tokens)["login_failures"]) == 20
    set_clock(minutes=60)
    assert login(client, email).status_code == 200


# Guessing


def test_a_stranger_who_guesses_for_four_hours_does_not_lock_the_user_out(
    client, stranger, tokens, email, set_clock
):
    guesses, logins = [], []
    for minute in range(0, 4 * 60, 2):
        set_clock(minutes=minute)
        guesses.append(login(stranger, email, "wrong").status_code)
        if minute % 20 == 0:
            logins.append(login(client, email).status_code)
    assert guesses.count(401) == 4 * 20
    assert set(logins) == {200}


def test_five_networks_together_close_an_account_to_networks_without_a_session(
    client, stranger, tokens, email
):
    for address in OTHER_NETWORKS[:5]:
        guesses = [login(client_at(client, address), email, "wrong") for _ in range(20)]
        assert {guess.status_code for guess in guesses} == {401}
    assert login(stranger, email).status_code == 429
    assert login(client, email).status_code == 200


# Networks with a session are exempt from the limit of all networks


def test_a_session_does_not_exempt_its_network_from_its_own_limit(client, tokens, email):
    others = [(network, 10) for network in OTHER_NETWORKS[:80]]
    store_failures(tokens, others + [(ADDRESS, 10)] * 20)
    assert login(client, email).status_code == 429


def test_a_session_exempts_the_network_of_its_login_and_not_that_of_its_refresh(
    client, stranger, tokens, email
):
    reach_limit_of_all_networks(tokens)
    assert refresh(stranger, tokens["refresh_token"]).status_code == 200
    assert login(stranger, email).status_code == 429
    assert login(client, email).status_code == 200


def test_a_session_that_was_ended_does_not_exempt_its_network(client, tokens, email):
    reach_limit_of_all_networks(tokens)
    logout(client, tokens["refresh_token"])
    assert login(client, email).status_code == 429


@pytest.mark.parametrize(("seconds", "status"), [(-1, 200), (0, 429)])
def test_a_session_exempts_its_network_for_7_days_from_its_last_refresh(
    client, tokens, email, set_clock, seconds, status
):
    set_clock(days=6)
    refresh(client, tokens["refresh_token"])
    set_clock(days=13, seconds=seconds)
    reach_limit_of_all_networks(tokens)
    assert login(client, email).status_code == status


def test_a_live_session_elsewhere_does_not_exempt_the_network_of_an_expired_one(
    client, stranger, email, set_clock
):
    tokens = register(stranger, email).json()
    set_clock(days=8)
    assert login(client, email).status_code == 200
    reach_limit_of_all_networks(tokens)
    assert login(stranger, email).status_code == 429


def test_a_session_of_another_user_does_not_exempt_its_network(stranger, tokens, email):
    assert register(stranger, "other-" + email).status_code == 201
    reach_limit_of_all_networks(tokens)
    assert login(stranger, email).status_code == 429


# Unknown emails


def test_failed_logins_with_an_unknown_email_are_not_limited(client, email):
    assert {login(client, email).status_code for _ in range(21)} == {401}
    assert register(client, email).status_code == 201
    assert login(client, email).status_code == 200


def test_a_login_with_an_unknown_email_verifies_a_hash_of_the_same_cost(
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


def test_a_login_with_an_unknown_email_runs_the_query_that_records_a_failure(
    client, email, monkeypatch
):
    recorded = []
    monkeypatch.setattr(db, "record_failed_login", lambda email, *_: recorded.append(email))
    login(client, email)
    assert recorded == [email]
