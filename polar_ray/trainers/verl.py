"""verl 0.9: rewards from its reward loop, one sample a call, a whole group a request.

    reward.custom_reward_function.path=pkg://polar_ray.trainers.verl
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.address=127.0.0.1:8000

`compute_score_batch` is for versions that still have the `batch` manager, which POLAR's own recipe names. That recipe
validates `math` test rows by math-verify; here they get POLAR's rewards as all others do.

Use the `naive` or the `dapo` reward manager. `rate_limited` turns every error, and every wait longer than its own, into
a reward of 0.0 and goes on; `remote` refuses reward functions that are asynchronous, as this one is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polar_ray.policy_text import MISSING_REFERENCE
from polar_ray.trainers.endpoint import Endpoint, Fields, column, report, reward

VERLS_OWN = ("reward_router_address", "reward_model_tokenizer")
"""Arguments that verl adds when it hosts a reward model itself; POLAR needs neither."""


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    prompt_key: str = "prompt",
    **settings: Any,
) -> dict[str, float]:
    """The reward as `score`, and counts of tokens. Calls that are in the air together travel together.

    The prompt is `extra_info[prompt_key]`, the reference is `ground_truth`: each a string or a list of messages, as in
    POLAR's own recipe. `settings` are those of `Endpoint`. Raises `SchemaError` or `TripleError` for a sample that
    lacks one, the row's error, or what a client raises.
    """
    sample = _fields(solution_str, ground_truth, extra_info, prompt_key)
    (row,) = await Endpoint.of(_ours(settings)).ascore([sample], MISSING_REFERENCE["verl"])
    return {"score": reward(row), **report(row)}


def compute_score_batch(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Mapping[str, Any]],
    *,
    prompt_key: str = "prompt",
    **settings: Any,
) -> list[float]:
    """A reward for each sample, in order. Raises as `compute_score` does."""
    samples = zip(solution_strs, ground_truths, extra_infos, strict=True)
    rows = Endpoint.of(_ours(settings)).score(
        [_fields(*sample, prompt_key) for sample in samples], MISSING_REFERENCE["verl"]
    )
    return [reward(row) for row in rows]


def _fields(output: str, reference: Any, extra_info: Mapping[str, Any] | None, prompt_key: str) -> Fields:
    return column(extra_info or {}, prompt_key, "extra_info"), reference, output


def _ours(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in VERLS_OWN}
