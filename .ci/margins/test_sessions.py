"""Property tests that compare sessions and the login limit with models.

They run in memory or on the MongoDB server at TEST_MONGO_URI, like test_app.py.
"""

import logging
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import jwt
import pytest
from bson import ObjectId
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import auth
import db
import test_app
from test_app import AnyDatetime, claims_of, client_at, login, me, stored_user

HOME, ELSEWHERE = "192.0.2.1", "192.0.2.2"
MINUTE, HOUR, DAY = 60, 60 * 60, 24 * 60 * 60  # seconds
MAX_SESSIONS = 2  # instead of 20, so that a few logins exceed it
COMMON = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Clock(datetime, metaclass=AnyDatetime):
    """A clock that stands still unless a test sets it, in seconds since its start."""

    start = datetime(2030, 1, 1, tzinfo=UTC)
    seconds = 0

    @classmethod
    def now(cls, tz=None):
        return cls.start + timedelta(seconds=cls.seconds)


@pytest.fixture
def clock(monkeypatch):
    """The clock of auth.py and of PyJWT."""
    monkeypatch.setattr(auth, "now", Clock.now)
    monkeypatch.setattr(jwt.api_jwt, "datetime", Clock)
    monkeypatch.setattr(Clock, "seconds", 0)
    return Clock


@pytest.fixture
def http(client, clock):
    """A client in each network."""
    return {network: client_at(client, network) for network in (HOME, ELSEWHERE)}


# Sessions


class Token(NamedTuple):
    """The tokens of one response, and when they were issued."""

    sid: str
    generation: int
    issued_at: int
    body: dict


class Model:
    """The sessions of a user, each as [generation, time of the login or the last refresh].

    A method returns the expected status, generation of the new tokens and whether a theft is
    logged.
    """

    def __init__(self):
        self.sessions = {}

    def login(self, sid, now):
        if len(self.sessions) == MAX_SESSIONS:
            del self.sessions[min(self.sessions, key=lambda sid: self.sessions[sid][1])]
        self.sessions[sid] = [0, now]

    def refresh(self, token, now):
        if token.sid in self.sessions and now < token.issued_at + 7 * DAY:
            session = self.sessions[token.sid]
            if token.generation == session[0]:
                session[:] = [session[0] + 1, now]
                return 200, session[0], False
            if self.is_in_grace(token, now):
                return 200, session[0], False
        return 401, None, self.logout(token, now)[2]

    def logout(self, token, now):
        is_newest = token.generation == self.sessions.get(token.sid, [token.generation])[0]
        is_theft = not is_newest and not self.is_in_grace(token, now)
        self.sessions.pop(token.sid, None)
        return 204, None, is_theft

    def me(self, token, now):
        is_valid = token.sid in self.sessions and now < token.issued_at + 15 * MINUTE
        return 200 if is_valid else 401, None, False

    def is_in_grace(self, token, now):
        generation, refreshed_at = self.sessions[token.sid]
        return token.generation == generation - 1 and now < refreshed_at + 60


class Sessions(RuleBasedStateMachine):
    """The owner's clients and thieves. Each is a list of the tokens that it has got."""

    # The time since the last request. It is never 0: no two sessions are refreshed at once.
    short_pause = st.sampled_from([1, 1, 10, 59, 60])
    long_pause = st.sampled_from([15 * MINUTE - 1, 15 * MINUTE, 4 * DAY, 7 * DAY - 1, 7 * DAY])
    pause = short_pause | short_pause | short_pause | long_pause
    client = st.sampled_from([1, 1, 1, 2, 2, 3, 4])  # 1 is the newest client
    age = st.sampled_from([1, 1, 2, 3])  # 1 is the newest token of the client
    network = st.sampled_from([HOME, ELSEWHERE])

    def __init__(self, http, caplog):
        super().__init__()
        self.http, self.caplog, self.model = http, caplog, Model()
        self.networks, self.clients = {}, []
        caplog.clear()
        Clock.seconds = 0
        self.email = f"{uuid.uuid4().hex}@example.com"
        response = test_app.register(http[HOME], self.email)
        self.user = {"_id": ObjectId(response.json()["user_id"])}
        self.start_session(response, 201, HOME)

    def start_session(self, response, status, network):
        assert response.status_code == status
        sid = claims_of(response.json()["refresh_token"])["sid"]
        assert sid not in self.networks
        self.networks[sid] = network
        self.model.login(sid, Clock.seconds)
        self.clients.append([Token(sid, 0, Clock.seconds, response.json())])

    @precondition(lambda self: len(self.clients) < 10)
    @rule(network=network, pause=pause)
    def login(self, network, pause):
        Clock.seconds += pause
        self.start_session(test_app.login(self.http[network], self.email), 200, network)

    @precondition(lambda self: len(self.clients) < 10)
    @rule(victim=client)
    def steal(self, victim):
        self.clients.append(self.clients[-victim:][0].copy())

    @rule(client=client, pause=pause, network=network)
    def refresh(self, client, pause, network):
        self.send("refresh", client, 1, pause, network)

    @rule(client=client, age=st.sampled_from([2, 3]), pause=pause)
    def refresh_with_a_replaced_token(self, client, age, pause):
        self.send("refresh", client, age, pause)

    @rule(client=client, age=age, pause=pause)
    def logout(self, client, age, pause):
        self.send("logout", client, age, pause)

    @rule(client=client, age=age, pause=st.sampled_from([1, 1, 15 * MINUTE - 1, 15 * MINUTE]))
    def me(self, client, age, pause):
        self.send("me", client, age, pause)

    def send(self, route, client, age, pause, network=HOME):
        """Send a token, and compare the response and the log with the model."""
        Clock.seconds += pause
        tokens = self.clients[-client:][0]
        token = tokens[-age:][0]
        text = token.body["access_token" if route == "me" else "refresh_token"]
        response = getattr(test_app, route)(self.http[network], text)
        status, generation, is_theft = getattr(self.model, route)(token, Clock.seconds)
        critical = [r.getMessage() for r in self.caplog.records if r.levelno == logging.CRITICAL]
        self.caplog.clear()
        reuse = f"authn_token_reuse user={self.user['_id']} session={token.sid}"
        assert (response.status_code, critical) == (status, [reuse] * is_theft)
        if generation is not None:
            claims = claims_of(response.json()["refresh_token"])
            assert (claims["sid"], claims["generation"]) == (token.sid, generation)
            issued_at = self.model.sessions[token.sid][1]
            tokens.append(Token(token.sid, generation, issued_at, response.json()))

    @invariant()
    def stored_sessions_are_those_of_the_model(self):
        stored = db.users.find_one(self.user)["refresh_tokens"]
        assert {s["sid"]: (s["generation"], s["network"]) for s in stored} == {
            sid: (generation, self.networks[sid])
            for sid, (generation, _) in self.model.sessions.items()
        }


def test_sessions_behave_like_the_model(http, caplog, monkeypatch):
    monkeypatch.setattr(db, "MAX_SESSIONS", MAX_SESSIONS)
    run_state_machine_as_test(
        lambda: Sessions(http, caplog),
        settings=settings(COMMON, max_examples=120, stateful_step_count=30),
    )


# The login limit


def is_blocked(failures, has_session, now):
    """Return whether a login from HOME gets a 429. A failure is (network, time)."""

    def count(network, period):
        return sum(network in (None, n) and 0 <= now - time < period for n, time in failures)

    if count(HOME, MINUTE) >= 5 or count(HOME, HOUR) >= 20:
        return True
    return count(None, HOUR) >= 100 and not has_session


time_of_failure = st.integers(-HOUR, -HOUR + 60) | st.integers(-HOUR, 0) | st.integers(-60, 0)
times_of_failures = st.integers(0, 25).flatmap(
    lambda size: st.lists(time_of_failure, min_size=size, max_size=size)
)


@settings(COMMON, max_examples=100)
@given(own=times_of_failures, others=st.sampled_from([0, 75, 100]), has_session=st.booleans())
def test_a_client_may_log_in_exactly_when_retry_after_has_passed(http, own, others, has_session):
    Clock.seconds = 0
    start = Clock.now()
    failures = [(ELSEWHERE, -HOUR + 1 + 30 * n) for n in range(others)]
    failures = (failures + [(HOME, time) for time in own])[-100:]
    wait = next(s for s in range(HOUR + 1) if not is_blocked(failures, has_session, s))
    email = f"{uuid.uuid4().hex}@example.com"
    test_app.register(http[HOME if has_session else ELSEWHERE], email)
    stored = [{"network": n, "failed_at": start + timedelta(seconds=t)} for n, t in failures]
    db.users.update_one({"email": email}, {"$set": {"login_failures": stored}})
    for Clock.seconds in {0, max(0, wait - 1)} - {wait}:
        response = test_app.login(http[HOME], email)
        assert response.status_code == 429
        assert int(response.headers["Retry-After"]) == wait - Clock.seconds
    Clock.seconds = wait
    assert test_app.login(http[HOME], email, "wrong").status_code == 401


# Sessions beyond the limit


def test_a_login_never_ends_the_session_that_it_adds(client, tokens, email, set_clock):
    for _ in range(19):
        assert login(client, email).status_code == 200
    # The clock of this server is slow.
    set_clock(days=-3)
    newest = login(client, email).json()
    assert len(stored_user(tokens)["refresh_tokens"]) == 20
    assert me(client, newest["access_token"]).status_code == 200


def test_simultaneous_logins_never_leave_more_than_20_sessions(client, tokens, email):
    user_id, password_hash = tokens["user_id"], stored_user(tokens)["password_hash"]

    def add_session(_):
        return db.add_session(user_id, password_hash, auth.create_session(), HOME)

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(add_session, range(60)))
    assert len(stored_user(tokens)["refresh_tokens"]) == 20
