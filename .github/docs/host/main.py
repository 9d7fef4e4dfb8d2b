"""An example host: the router of the service, a route of its own and the recipes."""

import logging

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

import cookies
import lists
import optional_user
import password
import web_socket
from accounts.app import router
from accounts.auth import CurrentUser

# By default, Python logs only warnings and errors, without a time.
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

app = FastAPI()
app.include_router(router)
app.include_router(optional_user.router)
app.include_router(password.router)
app.include_router(cookies.router)
app.include_router(web_socket.router)
app.include_router(lists.router)

# CORS_ORIGINS applies only to the standalone service.
app.add_middleware(
    CORSMiddleware,
    allow_origins=cookies.ORIGINS,
    allow_credentials=True,  # only for cookies
    allow_methods=["*"],
    allow_headers=["*"],
    expose_headers=["Retry-After", "WWW-Authenticate"],
)


@app.get("/mine")
def mine(user: CurrentUser) -> dict[str, str]:
    """Return the email of the current user."""
    return {"owner": user.email}
