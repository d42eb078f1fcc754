"""A corpus job to be killed in the middle: `python -m tests.support.slow_job INPUT OUTPUT SECONDS_PER_BATCH`."""

import sys
import time

from polar_ray.config import ScoreConfig
from polar_ray.corpus.job import score_parquet
from polar_ray.encoding.encode import Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.fake import FakeEngine
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.scoring import Scorer

CONFIG = ScoreConfig.model_validate({"unit_rows": 8, "actors": 2, "engine": {"kind": "fake"}})


class SlowEngine(FakeEngine):
    """The fake engine, with a pause before every batch."""

    seconds = 0.0

    def score(self, batch):
        time.sleep(self.seconds)
        return super().score(batch)


def open_slow_scorer(config: ScoreConfig, seconds: float) -> Scorer:
    engine = SlowEngine(token_budget=4096)
    engine.seconds = seconds
    return Scorer(Encoder(PolarTokenizer(EMBEDDED_FOLDER), config.limits), engine)


if __name__ == "__main__":
    source, target, seconds = sys.argv[1:]
    score_parquet(source, target, CONFIG, build_scorer=lambda config: open_slow_scorer(config, float(seconds)))
