"""Example tests: with a registered user, and with a replaced one."""

from datetime import UTC, datetime

from fastapi.testclient import TestClient

from accounts.auth import User, get_current_user
from main import app

client = TestClient(app)


def test_mine_with_a_registered_user():
    alice = {"email": "alice@example.com", "password": "MyS3cret@1"}
    token = client.post("/auth/register", json=alice).json()["access_token"]
    response = client.get("/mine", headers={"Authorization": f"Bearer {token}"})
    assert response.json() == {"owner": "alice@example.com"}


def test_mine_with_a_replaced_user(monkeypatch):
    bob = User(id="1", email="bob@example.com", created_at=datetime.now(UTC))
    monkeypatch.setitem(app.dependency_overrides, get_current_user, lambda: bob)
    assert client.get("/mine").json() == {"owner": "bob@example.com"}
