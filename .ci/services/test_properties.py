"""Property tests that schemathesis derives from the service's OpenAPI document."""

import json
import subprocess
import urllib.request

# The default of schemathesis, and 413. A generated body can be larger than 8 KiB.
CONFIGURATION = """
[checks.negative_data_rejection]
expected-statuses = [
    400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 428, 429, "5xx",
]
"""


def test_all_requests_get_a_documented_response(memory_service, tmp_path):
    body = json.dumps({"email": "user@example.com", "password": "MyS3cret@1"}).encode()
    headers = {"Content-Type": "application/json"}
    register = urllib.request.Request(f"{memory_service}/auth/register", body, headers)
    with urllib.request.urlopen(register) as response:
        access_token = json.load(response)["access_token"]
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    command = ["schemathesis", "run", f"{memory_service}/openapi.json", "--no-color"]
    command += ["--header", f"Authorization: Bearer {access_token}"]
    command += ["--phases", "examples,coverage,fuzzing,stateful", "--continue-on-failure"]
    command += ["--max-examples", "40", "--max-time", "40", "--report-dir", str(tmp_path)]
    # JSON Schema cannot describe all rules for a password.
    command += ["--exclude-checks", "positive_data_acceptance"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    print(result.stdout)
    assert result.returncode == 0
