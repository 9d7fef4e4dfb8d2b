"""Tests of refresh and logout at their margins: reuse, its events, and clocks that differ."""

import pytest

from test_app import (
    ADDRESS,
    claims_of,
    client_at,
    is_invalid_token,
    logout,
    me,
    refresh,
    register,
    sign,
)

ELSEWHERE = "203.0.113.1"


def event(name, tokens, network=ADDRESS):
    sid = claims_of(tokens["refresh_token"])["sid"]
    return f"{name} user={tokens['user_id']} session={sid} network={network}"


# Reuse


@pytest.mark.parametrize("send", [refresh, logout])
def test_the_event_of_a_reuse_names_the_network_of_the_old_token(client, tokens, events, send):
    second = refresh(client, tokens["refresh_token"]).json()
    refresh(client, second["refresh_token"])
    send(client_at(client, ELSEWHERE), tokens["refresh_token"])
    assert events()[-1] == ("CRITICAL", event("authn_token_reuse", tokens, ELSEWHERE))


def test_the_event_of_a_reuse_in_the_grace_names_the_network_of_the_old_token(
    client, tokens, events
):
    refresh(client, tokens["refresh_token"])
    refresh(client_at(client, ELSEWHERE), tokens["refresh_token"])
    assert events()[-1] == ("INFO", event("authn_token_reuse_in_grace", tokens, ELSEWHERE))


@pytest.mark.parametrize(
    ("seconds", "level", "name"),
    [(59, "INFO", "authn_token_revoked"), (60, "CRITICAL", "authn_token_reuse")],
)
def test_a_logout_with_a_replaced_token_is_a_reuse_after_60_seconds(
    client, tokens, set_clock, events, seconds, level, name
):
    refresh(client, tokens["refresh_token"])
    set_clock(seconds=seconds)
    assert logout(client, tokens["refresh_token"]).status_code == 204
    assert events()[-1] == (level, event(name, tokens))


@pytest.mark.parametrize("send", [refresh, logout])
def test_an_expired_token_reveals_a_thief_who_has_refreshed_it(
    client, tokens, set_clock, events, send
):
    stolen = tokens
    for day in (0, 3, 6):
        set_clock(days=day)
        stolen = refresh(client, stolen["refresh_token"]).json()
    set_clock(days=8)
    send(client, tokens["refresh_token"])
    assert events()[-1] == ("CRITICAL", event("authn_token_reuse", tokens))
    assert is_invalid_token(refresh(client, stolen["refresh_token"]))


def test_a_reuse_of_a_session_that_has_ended_is_not_logged(client, tokens, events):
    newer = refresh(client, tokens["refresh_token"]).json()
    logout(client, newer["refresh_token"])
    before = events()
    logout(client, tokens["refresh_token"])
    refresh(client, tokens["refresh_token"])
    assert events() == before


@pytest.mark.parametrize("generation", [1, 5])
def test_a_token_of_a_generation_that_was_never_issued_ends_its_session(
    client, tokens, events, generation
):
    never_issued = sign(claims_of(tokens["refresh_token"]) | {"generation": generation})
    assert is_invalid_token(refresh(client, never_issued))
    assert is_invalid_token(me(client, tokens["access_token"]))
    # It is no older token, so it was not reused.
    assert events()[-1] == ("INFO", event("authn_token_revoked", tokens))


# Clocks that differ


@pytest.mark.parametrize(("seconds", "status"), [(-59, 200), (-60, 401)])
def test_a_replaced_token_is_in_the_grace_for_60_seconds_if_the_clock_was_set_back(
    client, tokens, set_clock, seconds, status
):
    refresh(client, tokens["refresh_token"])
    set_clock(seconds=seconds)
    assert refresh(client, tokens["refresh_token"]).status_code == status


def test_a_token_from_a_server_whose_clock_is_ahead_is_accepted(client, email, set_clock):
    set_clock(hours=1)
    tokens = register(client, email).json()
    set_clock(hours=0)
    assert me(client, tokens["access_token"]).status_code == 200
    assert refresh(client, tokens["refresh_token"]).status_code == 200
