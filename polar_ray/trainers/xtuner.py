"""xtuner v1: a judger that gives POLAR the prompt, which xtuner's own HTTP judger does not.

    judger_config = polar_judger_config("127.0.0.1:8000")

Judges one rollout or a group (`batch_judge`), alone or as a branch of a `ComposedJudger`. The reference is
`reward_model["ground_truth"]`, the prompt is the data set's `message`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polar_ray.policy_text import MISSING_REFERENCE
from polar_ray.trainers.endpoint import Endpoint, Fields, report, reward


class PayloadScorer:
    """What the judger does, without xtuner: its payloads in, its outputs out."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._endpoint = Endpoint.of(settings)

    async def score(self, payloads: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
        """`score`, and counts of tokens, for each payload in order."""
        rows = await self._endpoint.ascore([_fields(payload) for payload in payloads], MISSING_REFERENCE["xtuner"])
        return [{"score": reward(row), **report(row)} for row in rows]


def polar_judger(address: str | None = None, *, judger_name: str = "polar", **settings: Any) -> Any:
    """A `Judger` that asks the endpoint at `address`; `settings` are those of `Endpoint`."""
    from xtuner.v1.rl.judger import Judger

    class PolarJudger(Judger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(judger_name=judger_name)
            self._scorer = PayloadScorer({"address": address, **settings})

        async def judge_payload(self, payload: Any) -> Any:
            if isinstance(payload, list):
                return await self._scorer.score(payload)
            return (await self._scorer.score([payload]))[0]

    return PolarJudger()


def polar_judger_config(address: str | None = None, *, judger_name: str = "polar", **settings: Any) -> Any:
    """A `JudgerConfig` that builds the judger, wherever xtuner wants it built.

    `cpu_resources` goes to xtuner, the other `settings` to `Endpoint`.
    """
    from xtuner.v1.rl.judger import JudgerConfig

    class PolarJudgerConfig(JudgerConfig):  # type: ignore[misc]
        def build_local(self) -> Any:
            return polar_judger(address, judger_name=self.judger_name, **settings)

    return PolarJudgerConfig(judger_name=judger_name, cpu_resources=settings.pop("cpu_resources", None))


def _fields(payload: Mapping[str, Any]) -> Fields:
    return payload["message"], payload.get("label"), payload["response"]
