"""ms-swift: a reward function for `--reward_funcs polar`, from a plugin file of two lines.

    from polar_ray.trainers import swift
    swift.register()

given as `--external_plugins plugin.py`. The prompt is the row's `messages` up to the answer; the references are a
column of the data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from polar_ray.trainers.endpoint import Endpoint, column, reward


class PolarReward:
    """Has the shape of ms-swift's `AsyncORM`, which tells an asynchronous reward function by its coroutine."""

    def __init__(self, args: object = None, *, reference_column: str = "reference", **settings: Any) -> None:
        """`args` are ms-swift's own and not read; `settings` are those of `Endpoint`."""
        self._endpoint = Endpoint.of(settings)
        self._reference_column = reference_column

    async def __call__(
        self, completions: Sequence[str], *, messages: Sequence[Sequence[Mapping[str, Any]]], **columns: Any
    ) -> list[float]:
        """A reward per completion, in order."""
        references = column(columns, self._reference_column, "the data set")
        prompts = [_before_the_answer(conversation) for conversation in messages]
        rows = await self._endpoint.ascore(list(zip(prompts, references, completions, strict=True)))
        return [reward(row) for row in rows]


def register(name: str = "polar", **settings: Any) -> None:
    """Make `--reward_funcs <name>` mean `PolarReward` with `settings`."""
    from swift.rewards import orms

    orms[name] = partial(PolarReward, **settings)


def _before_the_answer(conversation: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    has_answer = bool(conversation) and conversation[-1]["role"] == "assistant"
    return list(conversation[:-1] if has_answer else conversation)
