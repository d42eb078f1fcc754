"""The corpus job that faults are done to: `python -m tests.chaos.paced_job INPUT OUTPUT PACE LEDGER`.

Its engine takes so many seconds a row as the file PACE says, so that whoever does the faults decides when it ends, and
notes in the folder LEDGER what it was given, so that repeated work can be counted.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

from polar_ray.config import ScoreConfig
from polar_ray.corpus.job import score_parquet
from polar_ray.encoding.encode import Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.fake import FakeEngine
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.scoring import Scorer

UNIT_ROWS = 64

CONFIG = ScoreConfig.model_validate(
    {
        "unit_rows": UNIT_ROWS,
        "actors": 3,
        "engine": {"kind": "fake", "device": "cpu"},
        "limits": {"max_response_tokens": 256},
        "no_progress_timeout_s": 120,
    }
)


class PacedEngine(FakeEngine):
    """The fake engine, slowed down, with a ledger."""

    def __init__(self, pace, ledger):
        super().__init__(token_budget=512)
        self._pace = Path(pace)
        self._ledger = Path(ledger, f"{os.uname().nodename}-{os.getpid()}")

    def score(self, batch):
        with self._ledger.open("a") as notes:  # first: what is killed on the way was work as well
            notes.write(f"{len(batch)}\n")
        time.sleep(len(batch) * float(self._pace.read_text()))
        return super().score(batch)


def open_paced_scorer(config, *, pace, ledger):
    return Scorer(Encoder(PolarTokenizer(EMBEDDED_FOLDER), config.limits), PacedEngine(pace, ledger))


def main():
    source, output, pace, ledger = sys.argv[1:]
    score_parquet(source, output, CONFIG, build_scorer=partial(open_paced_scorer, pace=pace, ledger=ledger))


if __name__ == "__main__":
    main()
