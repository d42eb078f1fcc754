"""NeMo-RL: an environment whose only step is POLAR's reward.

    from polar_ray.trainers import nemo_rl
    nemo_rl.register()                          # then `env_name: polar` in the data, `env: {polar: {...}}`

The environment's settings are `reference_key` (`ground_truth`), `prompt_key` (`prompt`) and those of `Endpoint`. Both
keys are looked up in a sample's `extra_env_info`; without the prompt's, the prompt is the conversation before the
answer, without the chat template that NeMo-RL's processors leave in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from polar_ray.policy_text import own_text, plain_prompt
from polar_ray.trainers.endpoint import Endpoint, Fields, column, report, reward

if TYPE_CHECKING:
    from polar_ray.triples import Scored

ACTOR_CLASS = f"{__name__}.PolarEnvironment"


class Judge:
    """What the environment does, without NeMo-RL: message logs and metadata in, rows with rewards out."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        given = dict(settings)
        self._reference_key = given.pop("reference_key", "ground_truth")
        self._prompt_key = given.pop("prompt_key", "prompt")
        self._endpoint = Endpoint.of(given)

    def score(
        self, message_logs: Sequence[Sequence[Mapping[str, Any]]], metadata: Sequence[Mapping[str, Any] | None]
    ) -> list[Scored]:
        return self._endpoint.score([self._fields(*sample) for sample in zip(message_logs, metadata, strict=True)])

    def _fields(self, log: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any] | None) -> Fields:
        about = metadata or {}
        turns = [{"role": message["role"], "content": plain_prompt(message["content"])} for message in log[:-1]]
        reference = column(about, self._reference_key, "extra_env_info")
        output = own_text(log[-1]["content"], log[-2]["content"] if len(log) > 1 else "")
        return about.get(self._prompt_key) or turns, reference, output


def register(name: str = "polar") -> None:
    """Make `env_name: <name>` mean the environment, run by the interpreter that NeMo-RL itself runs in."""
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
    from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
    from nemo_rl.environments.utils import register_env

    ACTOR_ENVIRONMENT_REGISTRY[ACTOR_CLASS] = PY_EXECUTABLES.SYSTEM
    register_env(name, ACTOR_CLASS)


def environment_class() -> Any:
    """The environment as a plain class. Its base is NeMo-RL's, so it is made when it is asked for."""
    import torch
    from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn

    class PolarEnvironment(EnvironmentInterface):  # type: ignore[misc]
        def __init__(self, settings: Mapping[str, Any]) -> None:
            self._judge = Judge(settings)
            self._cut_tokens = 0.0

        def step(self, message_log_batch: Any, metadata: Any) -> Any:
            rows = self._judge.score(message_log_batch, metadata)
            rewards = [reward(row) for row in rows]
            self._cut_tokens += sum(report(row)["cut_tokens"] for row in rows)
            nothing = [None] * len(rows)
            return EnvironmentReturn(
                observations=[{"role": "environment", "content": f"Environment: {each}"} for each in rewards],
                metadata=nothing,
                next_stop_strings=nothing,
                rewards=torch.tensor(rewards, dtype=torch.float32),
                terminateds=torch.ones(len(rows), dtype=torch.bool),
                answers=[log[-1]["content"] for log in message_log_batch],
            )

        def global_post_process_and_metrics(self, batch: Any) -> Any:
            cut, self._cut_tokens = self._cut_tokens, 0.0
            return batch, {"polar/cut_tokens": cut}

        def shutdown(self) -> None:
            """NeMo-RL calls it at the end; the connection closes with the process."""

    return PolarEnvironment


def __getattr__(name: str) -> Any:
    """`PolarEnvironment`, the actor class, by the name under which NeMo-RL looks for it."""
    if name != "PolarEnvironment":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import ray

    globals()[name] = actor_class = ray.remote(environment_class())
    return actor_class
