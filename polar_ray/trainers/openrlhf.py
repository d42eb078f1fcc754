"""OpenRLHF: `reward_func` for the file form of `--reward.remote_url`.

    --reward.remote_url /path/to/polar_ray/trainers/openrlhf.py

OpenRLHF logs an error of a reward function and goes on without a reward, until the experience it makes of that stops
the run: look for `Failed to fetch reward` in its log. The reference is the `label`; the output is what follows the
prompt in the query. Chat templates and end tokens of the usual policies are taken off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polar_ray.policy_text import MISSING_REFERENCE, output_of
from polar_ray.trainers.endpoint import Endpoint, Fields, report, reward


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **settings: Any
) -> dict[str, Any]:
    """`rewards`, `scores` and `extra_logs`, as numbers for one query (which is what OpenRLHF asks) and lists for more.

    Called from a thread pool; calls that are in the air together travel together. `settings` are those of `Endpoint`.
    """
    samples = zip(queries, prompts, labels, strict=True)
    rows = Endpoint.of(settings).score([_fields(*sample) for sample in samples], MISSING_REFERENCE["openrlhf"])
    rewards = [reward(row) for row in rows]
    reports = [report(row) for row in rows]
    if len(rows) == 1:
        return {"rewards": rewards[0], "scores": rewards[0], "extra_logs": reports[0]}
    logs = {name: [each[name] for each in reports] for name in (reports[0] if reports else ())}
    return {"rewards": rewards, "scores": rewards, "extra_logs": logs}


def _fields(query: str, prompt: str, label: Any) -> Fields:
    return prompt, label, output_of(query, prompt)
