"""Job scripts are run, not installed: their folder goes on the path as Python puts a script's own there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs"))
