"""A WebSocket for browsers, which cannot send an Authorization header with it.

The first message is an access token. The connection is closed with code 4401 if the token is
missing or invalid, when it expires, and when its session ends, and with 4503 if the database is
unavailable.
"""

import asyncio
from contextlib import suppress

from fastapi import APIRouter, HTTPException, WebSocket, WebSocketDisconnect, WebSocketException
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials

from accounts.auth import User, get_current_user

TOKEN_DEADLINE = 5  # seconds
CHECK_INTERVAL = 60  # seconds, so a logout closes the connection within a minute

router = APIRouter()


async def receive_text(websocket: WebSocket, seconds: float) -> str | None:
    """Return the next message, or None if there is none within the seconds."""
    try:
        async with asyncio.timeout(seconds):
            return await websocket.receive_text()
    except TimeoutError:
        return None
    except KeyError:
        # Starlette's error for a binary message.
        raise WebSocketException(1003) from None


async def find_user(token: str) -> User:
    """Return the user of a valid access token, or close the connection."""
    credentials = HTTPAuthorizationCredentials(scheme="Bearer", credentials=token)
    try:
        # The query would block the event loop.
        return await run_in_threadpool(get_current_user, credentials)
    except HTTPException as error:
        raise WebSocketException(4000 + error.status_code) from None


@router.websocket("/echo")
async def echo(websocket: WebSocket) -> None:
    """Send each message back with the user's email."""
    await websocket.accept()
    with suppress(WebSocketDisconnect):
        token = await receive_text(websocket, TOKEN_DEADLINE) or ""
        await find_user(token)
        while True:
            message = await receive_text(websocket, CHECK_INTERVAL)
            user = await find_user(token)
            if message is not None:
                await websocket.send_text(f"{user.email}: {message}")
