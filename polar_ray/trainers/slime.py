"""slime: `--custom-rm-path polar_ray.trainers.slime.custom_rm`, for single samples and, with `--group-rm`, for groups.

The reference is a sample's `label`. Its prompt is `metadata["prompt"]` where the data set has that, else `prompt`
without the chat template that slime may have applied. Settings of `Endpoint` may stand among slime's arguments
(`--custom-config-path`) under their names with `polar_ray_` before them. With `--reward-key` a reward is a dict that
has counts of tokens too.
"""

from __future__ import annotations

from typing import Any

from polar_ray.policy_text import MISSING_REFERENCE, own_text
from polar_ray.trainers.endpoint import Endpoint, Fields, report, reward
from polar_ray.triples import Scored

PREFIX = "polar_ray_"


async def custom_rm(args: Any, samples: Any, **others: Any) -> Any:
    """A reward for a sample, or one for each of a list, in order. Calls that are in the air together travel together.

    Evaluation sends single samples whatever `--group-rm` says. Raises `TripleError` for a sample without a label, a
    row's error, or what a client raises.
    """
    is_group = isinstance(samples, list)
    rows = await _endpoint(args).ascore(
        [_fields(sample) for sample in (samples if is_group else [samples])], MISSING_REFERENCE["slime"]
    )
    rewards = [_reward(row, getattr(args, "reward_key", None)) for row in rows]
    return rewards if is_group else rewards[0]


def _endpoint(args: Any) -> Endpoint:
    prefixed = {name.removeprefix(PREFIX): value for name, value in vars(args).items() if name.startswith(PREFIX)}
    return Endpoint.of(prefixed)


def _fields(sample: Any) -> Fields:
    metadata = sample.metadata if isinstance(sample.metadata, dict) else {}
    output = own_text(sample.response, sample.prompt) if isinstance(sample.prompt, str) else sample.response
    return metadata.get("prompt") or sample.prompt, sample.label, output


def _reward(row: Scored, key: str | None) -> float | dict[str, float]:
    return {key: reward(row), **report(row)} if key else reward(row)
