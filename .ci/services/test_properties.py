"""Property tests that schemathesis derives from the service's OpenAPI document."""

import subprocess
import sys

from helpers import Service, new_email

# The default of schemathesis, and 413. A generated body can be larger than 4 KiB.
CONFIGURATION = """
[checks.negative_data_rejection]
expected-statuses = [
    400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 428, 429, "5xx",
]
"""


def test_all_requests_get_a_documented_response(tmp_path):
    service = Service("")
    access_token = service.register(new_email()).body["access_token"]
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    url = f"http://127.0.0.1:{service.port}/openapi.json"
    command = [f"{sys.prefix}/bin/schemathesis", "run", url, "--no-color"]
    command += ["--header", f"Authorization: Bearer {access_token}"]
    command += ["--phases", "examples,coverage,fuzzing", "--continue-on-failure"]
    command += ["--max-examples", "20", "--max-time", "15", "--report-dir", str(tmp_path)]
    # JSON Schema cannot describe all rules for a password.
    command += ["--exclude-checks", "positive_data_acceptance"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    print(result.stdout)
    assert result.returncode == 0
    service.stop()
