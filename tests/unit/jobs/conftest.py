"""Job scripts are run, not installed: their folders go on the path as Python puts a script's own there."""

import sys
from pathlib import Path

JOBS = Path(__file__).resolve().parents[3] / "jobs"
sys.path[:0] = [str(JOBS), str(JOBS / "train")]
