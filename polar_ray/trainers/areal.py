"""AReaL: `reward_fn` for its process pool, `areward_fn` for its event loop.

    workflow = RLVRWorkflow(reward_fn="polar_ray.trainers.areal.reward_fn", ...)

AReaL's pool gives a call 15 s, four times, and then takes 0 for the reward, which poisons a run; it does so for every
`TimeoutError`. `reward_fn` gives up before that, with an error that is none, and AReaL raises it. Waiting for a free
process counts towards the 15 s as well, so where rollouts outnumber processes go around the pool:

    workflow = RLVRWorkflow(reward_fn=reward_fn, ...)
    workflow.async_reward_fn = areward_fn

A row needs a column of references. Its prompt is the row's `messages`, the data set's conversation, where there is
one, else the decoded prompt without its chat template. `PolarReward(...)` and `AsyncPolarReward(...)` are the two with
settings of one's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polar_ray.errors import DeadlineExceeded, Unavailable
from polar_ray.policy_text import own_text
from polar_ray.trainers.endpoint import Endpoint, Fields, column, reward

POOL_DEADLINE_S = 9.0
"""Inside the 15 s of AReaL's pool, less the 5 s for which the client listens for a late refusal."""

IN_THE_POOL, IN_THE_LOOP = Endpoint(deadline_s=POOL_DEADLINE_S), Endpoint()


@dataclass(frozen=True)
class PolarReward:
    """A reward function as AReaL's process pool calls it. Pickles."""

    endpoint: Endpoint = IN_THE_POOL
    reference_column: str = "reference"
    prompt_column: str = "messages"

    def __call__(self, prompt: str, completions: str, prompt_ids: Any, completion_ids: Any, **row: Any) -> float:
        """The reward. Raises `Unavailable`, which is no `TimeoutError`, when the deadline passes."""
        try:
            (scored,) = self.endpoint.score([self.fields(prompt, completions, row)])
        except DeadlineExceeded as error:
            raise Unavailable(f"no reward in time: {error}") from None
        return reward(scored)

    def fields(self, prompt: str, completions: str, row: Mapping[str, Any]) -> Fields:
        reference = column(row, self.reference_column, "the data set")
        return row.get(self.prompt_column) or prompt, reference, own_text(completions, prompt)


@dataclass(frozen=True)
class AsyncPolarReward(PolarReward):
    """A reward function in the place of a workflow's `async_reward_fn`."""

    endpoint: Endpoint = IN_THE_LOOP

    async def __call__(  # type: ignore[override]
        self, prompt: str, completions: str, prompt_ids: Any, completion_ids: Any, **row: Any
    ) -> float:
        """The reward; calls that are in the air together travel together."""
        (scored,) = await self.endpoint.ascore([self.fields(prompt, completions, row)])
        return reward(scored)


reward_fn = PolarReward()
areward_fn = AsyncPolarReward()
