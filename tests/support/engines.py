"""Engines, and an encoder, that misbehave on purpose, to test what stands around them."""

import os
from collections.abc import Callable

import numpy as np

from polar_ray.encoding.encode import Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.fake import FakeEngine
from polar_ray.errors import EngineError
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.planning import Batch
from polar_ray.scoring import Scorer


class FaultyEngine(FakeEngine):
    """The fake engine, with a fault at every sequence that `is_bad` picks out: `raise`,
    `crash` (an error that is none of ours), `nan`, `short` or `die`."""

    def __init__(self, fault: str, is_bad: Callable[[np.ndarray], bool], token_budget: int = 4096) -> None:
        super().__init__(token_budget=token_budget)
        self.fault = fault
        self.is_bad = is_bad
        self.calls: list[int] = []

    def score(self, batch: Batch) -> np.ndarray:
        self.calls.append(len(batch))
        bad = np.array([self.is_bad(sequence) for sequence in batch.sequences()], dtype=bool)
        rewards = super().score(batch)
        if not bad.any():
            return rewards
        if self.fault == "die":
            os._exit(139)
        if self.fault == "raise":
            raise EngineError("a kernel failed")
        if self.fault == "crash":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self.fault == "short":
            return rewards[:-1]
        rewards[bad] = np.nan
        return rewards


def contains(tokenizer: PolarTokenizer, text: str) -> Callable[[np.ndarray], bool]:
    """Whether a sequence's text contains `text`."""
    return lambda sequence: text in tokenizer.decode(sequence.tolist())


def faulty_scorer(fault: str, text: str, config) -> Scorer:
    """A scorer over the embedded tokenizer whose engine fails on rows that contain `text`."""
    tokenizer = PolarTokenizer(EMBEDDED_FOLDER)
    return Scorer(Encoder(tokenizer, config.limits), FaultyEngine(fault, contains(tokenizer, text)))


class DeadlyEncoder(Encoder):
    """Ends its process at rows whose output contains `text`."""

    text = ""

    def encode_rows(self, rows):
        if any(self.text in row.output for row in rows):
            os._exit(139)
        return super().encode_rows(rows)


def deadly_scorer(text: str, config) -> Scorer:
    """A scorer over the embedded tokenizer that ends its process when it encodes rows whose output contains `text`."""
    encoder = DeadlyEncoder(PolarTokenizer(EMBEDDED_FOLDER), config.limits)
    encoder.text = text
    return Scorer(encoder, FakeEngine())
