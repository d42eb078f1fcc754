"""The parity gate: an engine that does not give the weights' own rewards does not start.

A small panel of triples is computed in float32 by `model/reference.py`, once for the weights on a node, and by the
engine at every start. Where the two differ by more than rounding, each way in which engines are known to go wrong is
computed as well, and the one that the engine's rewards agree with is named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from polar_ray.config import EngineConfig, LimitsConfig
from polar_ray.encoding.encode import EncodedTriple, Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.base import Engine
from polar_ray.errors import ConfigError, EngineStartError
from polar_ray.planning import Ids, Rewards, plan
from polar_ray.stages import stage
from polar_ray.triples import Triple

PANEL_VERSION = 1
"""Of the triples below; another number computes their rewards anew."""

TOLERANCE = {"float32": 0.005, "bfloat16": 0.15, "float16": 0.05, "int8": 0.25, "fp8": 0.25}
"""Root mean square of an engine's deviations on the panel, over the standard deviation of the panel's rewards: above
this it is not rounding. By `engine.quantization`, else by dtype. bfloat16 has 0.006 to 0.045 on various shapes and
engines, int8 0.08 to 0.10 and fp8 0.12 to 0.14 on random weights of 2 to 292 million parameters."""

ROUNDING = {"float32": 0.0005, "bfloat16": 0.015, "float16": 0.003, "int8": 0.05, "fp8": 0.05}
"""Below this no question is asked; between the two, rewards that a known way of going wrong explains are refused.
Another rotary base moves the embedded checkpoint's rewards by 0.04 of their spread: no more than rounding."""

MATCHES = 0.5
"""A way of going wrong explains an engine's rewards if it leaves this part of the deviation at most."""

NO_TRAP = (
    "No known trap explains it: compare with engine.kind = 'torch' by polar-ray verify, and look for quantisation or "
    "other weights. engine.parity_tolerance accepts a deviation that is meant."
)

_STORY = (
    "The ferry leaves the harbour at seven and carries forty crates of apples to the island. ",
    "Half of them are sold before noon, and a third of what is left is given to the school. ",
    "In the afternoon the wind turns, so the captain waits until the lamps are lit. ",
    "Nobody minds: there is bread, there is soup, and somebody always brings a fiddle. ",
    "By the time they sail home the crates are empty and the moon stands over the pier. ",
)

_PANEL = (
    Triple("What is the capital of France?", "Paris.", "Paris."),
    Triple("What is the capital of France?", "Paris.", "Lyon, I believe, although some would say Marseille."),
    Triple("Tom has 3 boxes of 12 pens and gives 7 away. How many are left?", "3 * 12 = 36, 36 - 7 = 29.", "29"),
    Triple("Tom has 3 boxes of 12 pens and gives 7 away. How many are left?", "3 * 12 = 36, 36 - 7 = 29.", "41"),
    Triple("把这句话翻译成英文：今天天气很好。", "The weather is nice today.", "今天我不想翻译。"),
    Triple("def square(x):", "    return x * x\n", "    return x ** 2\n"),
    Triple("Tell me how the day of the ferry goes.", "".join(_STORY), "".join(_STORY[::-1])),
    Triple("Continue: " + "".join(_STORY), "".join(_STORY), "".join(_STORY[1:]) + "The end."),
)


@dataclass(frozen=True)
class Deviation:
    """How far an engine's rewards of the panel are from the reference's."""

    rms: float
    """Root mean square, in standard deviations of the reference's."""

    largest: float
    """In units of reward."""


@dataclass(frozen=True)
class Verdict:
    """An engine on the panel: its rewards beside the reference's, and whether rounding explains the difference."""

    expected: Rewards
    found: Rewards
    deviation: Deviation
    tolerance: float
    """Of `deviation.rms`."""

    trap: str | None
    """The known way of going wrong that explains the difference, as a sentence with its remedy."""

    is_right: bool

    @property
    def sentence(self) -> str:
        """How far off it is, and why."""
        off = (
            f"off by up to {self.deviation.largest:.3g} on the parity panel, {self.deviation.rms:.2g} of its spread, "
            f"where {self.tolerance:g} is allowed"
        )
        return off if self.is_right else f"{off}. {self.trap or NO_TRAP}"


def panel(folder: Path) -> list[Ids]:
    """The panel's ids in the checkpoint's own tokenizer. Raises `CheckpointError`."""
    encoder = Encoder(PolarTokenizer(folder), LimitsConfig())
    return [row.ids for row in encoder.encode_rows(_PANEL) if isinstance(row, EncodedTriple)]


def check_parity(engine: Engine, config: EngineConfig, folder: Path) -> Deviation:
    """How far `engine` is from float32 on the panel.

    Raises `EngineStartError`, with the way of going wrong that explains it, if that is more than the rounding of
    `config.quantization` or `config.dtype`, or than `config.parity_tolerance`.
    """
    verdict = judge(engine, config, folder)
    if verdict.is_right:
        return verdict.deviation
    raise EngineStartError(
        f"engine {config.kind!r} does not give these weights' rewards: {verdict.sentence}",
        expected=verdict.expected.tolist(),
        found=verdict.found.tolist(),
    )


def judge(engine: Engine, config: EngineConfig, folder: Path) -> Verdict:
    """`engine` beside float32, on what of the panel is no longer than `config.max_tokens`.

    Raises `ConfigError` where that is nothing, for then nobody would know whether the engine is right.
    """
    whole = panel(folder)
    fitting = [row for row, ids in enumerate(whole) if config.max_tokens is None or len(ids) <= config.max_tokens]
    if not fitting:
        raise ConfigError(
            f"engine.max_tokens = {config.max_tokens}: shorter than every triple of the parity panel; set "
            f"{min(map(len, whole))} or more"
        )
    sequences, expected = [whole[row] for row in fitting], _expected(folder, config, whole)[fitting]
    found = score_all(engine, sequences, share_prefixes=config.share_prefixes)
    arithmetic = config.quantization or config.dtype
    tolerance = config.parity_tolerance if config.parity_tolerance is not None else TOLERANCE[arithmetic]
    deviation = measure(found, expected)
    if deviation.rms <= min(ROUNDING[arithmetic], tolerance):
        return Verdict(expected, found, deviation, tolerance, None, is_right=True)
    trap = find_trap(found, expected, sequences, folder, config)
    is_right = deviation.rms <= tolerance and (trap is None or config.parity_tolerance is not None)
    return Verdict(expected, found, deviation, tolerance, trap, is_right=is_right)


def score_all(engine: Engine, sequences: Sequence[Ids], *, share_prefixes: bool = True) -> Rewards:
    """The engine's rewards of `sequences`, in order, planned as a job's are."""
    planned = plan(
        sequences,
        token_budget=engine.token_budget,
        share_prefixes=share_prefixes,
        max_shared_length=engine.max_shared_length,
    )
    return planned.rewards(engine.score)


def measure(found: Rewards, expected: Rewards) -> Deviation:
    """The deviation of `found`; infinite where a reward is not finite."""
    differences = np.where(np.isfinite(found), found.astype(np.float64) - expected, np.inf)
    spread = float(expected.std()) or 1.0
    return Deviation(float(np.sqrt((differences**2).mean())) / spread, float(np.abs(differences).max()))


def find_trap(
    found: Rewards, expected: Rewards, sequences: Sequence[Ids], folder: Path, config: EngineConfig
) -> str | None:
    """The known way of going wrong that `found` agrees with, as a sentence with its remedy; None if it is another."""
    if not np.isfinite(found).all():
        return "Some are not finite: engine.dtype is too narrow for these weights, or a kernel is broken here."
    off = measure(found, expected).rms
    suspects = _suspects(expected, sequences, folder, config)
    left, words = min(((measure(found, compute()).rms, words) for words, compute in suspects))
    if left <= MATCHES * off:
        return words
    if np.ptp(found) == 0:
        return "They are all the same: weights that were not loaded?"
    return None


def _suspects(
    expected: Rewards, sequences: Sequence[Ids], folder: Path, config: EngineConfig
) -> Iterator[tuple[str, Callable[[], Rewards]]]:
    """(what went wrong, the rewards that it gives)."""
    yield (
        "They are the sigmoids of the right ones: the engine puts an activation behind the head; turn it off "
        "(vLLM: use_activation = false).",
        lambda: (1 / (1 + np.exp(-expected.astype(np.float64)))).astype(np.float32),
    )
    yield (
        "They are all 1: the engine takes a softmax over one label; ask for the raw logit.",
        lambda: np.ones_like(expected),
    )
    other = "sglang-static" if config.rope_base == "hf" else "hf"
    compute = partial(_compute, folder, config)
    yield (
        f"They are those of engine.rope_base = {other!r}: the engine computes another rotary base; override its "
        "rope_scaling.",
        lambda: compute(sequences, rope_base=other),
    )
    yield (
        "They are read one token early: the final token was dropped, or split by a tokenizer; send ids.",
        lambda: compute([ids[:-1] for ids in sequences]),
    )
    yield (
        "They are those of sequences without their first token: the engine must be given it, and add none.",
        lambda: compute([ids[1:] for ids in sequences]),
    )
    yield (
        "They are those of sequences with the first token doubled: the engine adds one; send ids, and none is added.",
        lambda: compute([np.concatenate([ids[:1], ids]) for ids in sequences]),
    )


def _expected(folder: Path, config: EngineConfig, sequences: Sequence[Ids]) -> Rewards:
    """The reference's rewards of the panel, from the node's cache."""
    from polar_ray.model.cache import kept
    from polar_ray.model.checkpoint import Checkpoint

    def make(aside: Path) -> None:
        with stage("computing float32 rewards of the parity panel, once a node"):
            rewards = _compute(folder, config, sequences)
        (aside / "rewards.json").write_text(json.dumps(rewards.tolist()) + "\n")

    made = kept(Checkpoint.open(folder), "parity", f"{config.rope_base}-{PANEL_VERSION}", make)
    return np.array(json.loads((made / "rewards.json").read_text()), dtype=np.float32)


def _compute(folder: Path, config: EngineConfig, sequences: Sequence[Ids], rope_base: str | None = None) -> Rewards:
    from polar_ray.model.checkpoint import Checkpoint
    from polar_ray.model.reference import reference_rewards

    device = "cuda" if config.device == "cuda" and not config.is_elsewhere else "cpu"
    rope = rope_base or config.rope_base
    return reference_rewards(Checkpoint.open(folder), sequences, rope_base=rope, device=device)  # type: ignore[arg-type]
