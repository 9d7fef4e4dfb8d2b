"""A property test that compares the sessions of a user with a model."""

import logging
import uuid
from typing import NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import db
import test_app
from test_app import claims_of

MINUTE, DAY = 60, 24 * 60 * 60  # seconds
MAX_SESSIONS = 2  # instead of 20, so that a few logins exceed it


class Issued(NamedTuple):
    """The tokens in a response, their session, its generation and the time of their issue."""

    tokens: dict
    sid: str
    generation: int
    issued_at: int


class Session(NamedTuple):
    generation: int
    issued_at: int  # the time of the login or the last refresh


class Model:
    """The sessions of a user by their sid, and the time in seconds.

    me, refresh and logout return the expected status code and whether a reuse is logged.
    """

    def __init__(self):
        self.sessions, self.now = {}, 0

    def login(self, sid):
        if len(self.sessions) == MAX_SESSIONS:
            oldest = min(self.sessions, key=lambda sid: self.sessions[sid].issued_at)
            del self.sessions[oldest]
        self.sessions[sid] = Session(0, self.now)

    def me(self, token):
        is_valid = token.sid in self.sessions and self.now < token.issued_at + 15 * MINUTE
        return (200 if is_valid else 401), False

    def refresh(self, token):
        session = self.sessions.get(token.sid)
        if session and self.now < token.issued_at + 7 * DAY:
            if token.generation == session.generation:
                self.sessions[token.sid] = Session(session.generation + 1, self.now)
                return 200, False
            if self.is_in_grace(token, session):
                return 200, False
        _, is_reuse = self.logout(token)
        return 401, is_reuse

    def logout(self, token):
        session = self.sessions.pop(token.sid, None)
        is_replaced = session is not None and token.generation < session.generation
        return 204, is_replaced and not self.is_in_grace(token, session)

    def is_in_grace(self, token, session):
        is_previous = token.generation == session.generation - 1
        return is_previous and self.now < session.issued_at + MINUTE


class Step(NamedTuple):
    """A pause, and then a request with one of the latest tokens, of which the newest has age 1.

    An older token can belong to another session, or it is a replaced one, which may be stolen.
    """

    pause: int
    request: str
    age: int


# Without a pause, two sessions could have the same time, and either could be the oldest one.
PAUSES = [1] * 6 + [10, 59, 60] * 2 + [15 * MINUTE - 1, 15 * MINUTE, 4 * DAY, 7 * DAY - 1, 7 * DAY]
REQUESTS = ["login"] * 2 + ["logout"] + ["me"] * 2 + ["refresh"] * 5
AGES = [1, 1, 1, 2, 2, 3, 4]
STEP = st.builds(Step, *map(st.sampled_from, (PAUSES, REQUESTS, AGES)))


@settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=st.lists(STEP, min_size=15, max_size=30))
def test_sessions_behave_like_the_model(client, set_clock, caplog, monkeypatch, steps):
    monkeypatch.setattr(db, "MAX_SESSIONS", MAX_SESSIONS)
    email = f"{uuid.uuid4().hex}@example.com"
    model, issued = Model(), []

    def start_session(response):
        model.login(claims_of(response.json()["refresh_token"])["sid"])
        add_issued(response)

    def add_issued(response):
        claims = claims_of(response.json()["refresh_token"])
        session = model.sessions[claims["sid"]]
        assert claims["generation"] == session.generation
        issued.append(Issued(response.json(), claims["sid"], *session))

    set_clock()
    start_session(test_app.register(client, email))
    for step in steps:
        model.now += step.pause
        set_clock(seconds=model.now)
        caplog.clear()
        is_reuse = False
        if step.request == "login":
            start_session(test_app.login(client, email))
        else:
            token = issued[-step.age :][0]
            text = token.tokens["access_token" if step.request == "me" else "refresh_token"]
            response = getattr(test_app, step.request)(client, text)
            status, is_reuse = getattr(model, step.request)(token)
            assert response.status_code == status
            if (step.request, status) == ("refresh", 200):
                add_issued(response)
        critical = [r.getMessage() for r in caplog.records if r.levelno == logging.CRITICAL]
        assert [message.split()[0] for message in critical] == ["authn_token_reuse"] * is_reuse
        stored = db.users.find_one({"email": email})["refresh_tokens"]
        assert {session["sid"]: session["generation"] for session in stored} == {
            sid: session.generation for sid, session in model.sessions.items()
        }
