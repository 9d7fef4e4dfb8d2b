"""Tests that execute the README's bash blocks, and check the links of all documents."""

import os
import re
import signal
import subprocess

import pytest
from helpers import ROOT, listens, wait_until

README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / ".github").rglob("*.md"))]
# .ci/run executes TEST. A block that is added to the README has to be executed as well.
RUN, USE, DECODE, TEST = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def service():
    """The service, started on port 5000 as in the README."""
    # An empty variable hides the one in .env.
    settings = dict.fromkeys(["MONGO_URI", "JWT_SECRET_KEY", "CORS_ORIGINS"], "")
    process = subprocess.Popen(
        ["bash", "-c", RUN], cwd=ROOT, env=os.environ | settings, start_new_session=True
    )
    try:
        wait_until(lambda: listens(5000), 120)
        assert process.poll() is None
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(15)


def test_the_commands_print_what_the_readme_shows(service):
    commands = USE + DECODE
    printed = subprocess.check_output(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=ROOT, text=True
    )
    expected = re.findall(r"^# → (.*)$", commands, re.MULTILINE)
    lines = printed.splitlines()
    assert len(lines) == len(expected) == 6
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(re.escape(pattern).replace("…", ".+"), line)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_each_relative_link_names_a_file(document):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []
