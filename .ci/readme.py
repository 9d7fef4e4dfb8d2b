"""Print a part of the README: the command that runs the service, the one that tests it, or the curl lines.

`check` reads what the curl lines printed and compares it with the comments behind them.
"""

import re
import sys
from pathlib import Path

blocks = re.findall(r"^```bash\n(.*?)^```", Path("README.md").read_text(), re.DOTALL | re.MULTILINE)
run, test, curl = blocks[:3]

if sys.argv[1] == "check":
    printed = sys.stdin.read()
    for expected in re.findall(r"^# → (.*)$", curl, re.MULTILINE):
        pattern = re.escape(expected).replace("…", ".*")
        assert re.search(pattern, printed), f"the README promises {expected}"
        print(f"as promised: {expected}")
else:
    print({"run": run, "test": test, "curl": curl}[sys.argv[1]])
