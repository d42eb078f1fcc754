"""Engines held against float32 of the same weights, and against rewards that somebody has published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from polar_ray.config import EngineConfig, LimitsConfig
from polar_ray.encoding.encode import Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.build import HAVE_NO_WEIGHTS, engine_module, resolve_engine
from polar_ray.engines.parity import Verdict, judge
from polar_ray.evaluation.measures import rank_correlation
from polar_ray.model.locate import locate_model
from polar_ray.scoring import Scorer, has_gpu
from polar_ray.triples import Scored
from polar_ray.verification.published import Published, examples_of


@dataclass(frozen=True)
class Agreement:
    """How an engine's rewards compare with the published ones, over the rows that it could score."""

    rows: int
    rms: float
    """Root mean square difference, in units of reward."""

    largest: float
    spearman: float | None
    """Rank correlation; None for fewer than three rows."""


@dataclass(frozen=True)
class EngineCheck:
    """What one engine made of the panel and of the published triples."""

    engine: EngineConfig
    """Resolved."""

    version: str
    verdict: Verdict | None
    """Against float32 on the parity panel; None for an engine without weights of its own."""

    scored: tuple[Scored, ...]
    """One per published triple, in order."""

    agreement: Agreement | None
    """None where nothing is published."""


@dataclass(frozen=True)
class Verification:
    folder: Path
    published: tuple[Published, ...]
    checks: tuple[EngineCheck, ...]

    @property
    def is_right(self) -> bool:
        """Whether every engine gives these weights' rewards. Published ones are another engine's and do not decide."""
        return all(check.verdict is None or check.verdict.is_right for check in self.checks)


def verify(
    model: str,
    engines: Sequence[EngineConfig],
    *,
    revision: str | None = None,
    limits: LimitsConfig | None = None,
    goldens: Path | None = None,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Start each engine in turn, let it score the parity panel and the published triples, and end it.

    Published are the rows of `goldens`, or else the examples in the README files of the checkpoint's folder. An engine
    that would not pass the parity gate is reported and not refused. Raises `CheckpointError`, `ConfigError`,
    `InputError`, or `EngineStartError` for one that does not come up at all.
    """
    folder, limits = locate_model(model, revision), limits or LimitsConfig()
    published = tuple(examples_of(folder, goldens))
    encoder = Encoder(PolarTokenizer(folder), limits)
    checks = []
    for given in engines:
        on_gpu = given.device == "auto" and has_gpu()
        engine = resolve_engine(given, folder, has_gpu=on_gpu, max_tokens=limits.max_tokens)
        on_stage(f"starting {engine.kind}")
        module = engine_module(engine.kind)
        with Scorer(encoder, module.start(folder, engine), share_prefixes=engine.share_prefixes) as scorer:
            on_stage(f"{engine.kind}: the parity panel")
            verdict = None if engine.kind in HAVE_NO_WEIGHTS else judge(scorer.engine, engine, folder)
            on_stage(f"{engine.kind}: {len(published)} published rewards")
            scored = tuple(scorer.score([row.triple for row in published]))
        version = module.engine_version(engine)
        checks.append(EngineCheck(engine, version, verdict, scored, _agreement(scored, published)))
    return Verification(folder, published, tuple(checks))


def _agreement(scored: Sequence[Scored], published: Sequence[Published]) -> Agreement | None:
    both = [(mine.reward, row.reward) for mine, row in zip(scored, published, strict=True) if mine.reward is not None]
    if not both:
        return None
    ours, theirs = np.array(both, dtype=np.float64).T
    differences = np.abs(ours - theirs)
    return Agreement(
        len(both),
        float(np.sqrt((differences**2).mean())),
        float(differences.max()),
        rank_correlation(ours, theirs) if len(both) > 2 else None,
    )
