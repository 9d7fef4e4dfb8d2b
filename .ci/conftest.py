"""Makes helpers.py, in this folder, and the modules importable for all tests of .ci."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
