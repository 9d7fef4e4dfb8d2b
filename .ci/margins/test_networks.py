"""Tests of the client's network, which the limits and the log use."""

import pytest
from fastapi import FastAPI, WebSocket
from fastapi.testclient import TestClient

import auth
from test_app import ADDRESS, client_at, login


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),  # IPv4, as a socket for IPv6 returns it
        ("2001:db8:0:100::1", "2001:db8:0:100::"),
        ("2001:db8:0:1ff:ffff::1", "2001:db8:0:100::"),
        ("2001:db8:0:200::1", "2001:db8:0:200::"),
        ("fe80::1%eth0", "fe80::"),
        ("fe80::1%\nforged", "fe80::"),
        ("192.0.2.1\nforged", "unknown"),
        ("host.example", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_log_contains_the_network_of_a_valid_address_or_unknown(
    client, email, events, address, network
):
    login(client_at(client, address), email)
    assert events()[-1][1] == f"authn_login_fail user=unknown network={network}"


def test_the_network_of_a_request_without_an_address_is_unknown(client, email, events):
    # For example through a Unix domain socket.
    anonymous_client = client_at(client, ADDRESS)
    anonymous_client._transport.client = None
    login(anonymous_client, email)
    assert events()[-1][1] == "authn_login_fail user=unknown network=unknown"


def test_the_addresses_of_an_ipv6_network_share_their_failures(client, tokens, email):
    for number in range(20):
        login(client_at(client, f"2001:db8:0:1{number:02}::1"), email, "wrong")
    assert login(client_at(client, "2001:db8:0:1ff::1"), email).status_code == 429
    assert login(client_at(client, "2001:db8:0:200::1"), email).status_code == 200


def test_a_websocket_route_of_another_app_can_use_the_network():
    host = FastAPI()

    @host.websocket("/network")
    async def send_network(socket: WebSocket, network: auth.ClientNetwork):
        await socket.accept()
        await socket.send_text(network)

    client = TestClient(host, client=("2001:db8:0:1ff::1", 50000))
    with client.websocket_connect("/network") as socket:
        assert socket.receive_text() == "2001:db8:0:100::"
