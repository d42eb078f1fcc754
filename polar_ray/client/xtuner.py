"""A drop-in for xtuner 0.2's `RewardModelClient`: the same constructor, the same call, and an error instead of None."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from polar_ray.client.sync import RewardClient
from polar_ray.errors import ConfigError, TripleError
from polar_ray.triples import Triple
from polar_ray.wire import LimitsReply


class RewardModelClient:
    """Scores dicts of `prompt`, `reference`, `output` and optionally `wrapper` on an endpoint of polar_ray.

        client = RewardModelClient("internlm/POLAR-7B", server_address="127.0.0.1:8000")
        rewards = client([{"prompt": ..., "reference": ..., "output": ...}])

    Texts are sent as they are and encoded by the endpoint, so no tokenizer is loaded here and limits are the
    endpoint's: limits given here that differ from those are refused, not ignored.
    """

    def __init__(
        self,
        path: str,
        max_length: int = 16384,
        max_response_length: int = 4096,
        response_cut_side: Literal["right", "left"] = "left",
        server_type: str = "sglang",
        server_address: str = "127.0.0.1:30000",
        **options: Any,
    ) -> None:
        """Defaults are upstream's. `path` is kept as a name and not read; `server_type` may be any of upstream's, the
        endpoint speaks one protocol to this client. `options` are those of `RewardClient`.

        Raises `ConfigError` where the endpoint's limits are others, `Unavailable` where nobody answers.
        """
        if server_type not in ("sglang", "vllm", "lmdeploy"):
            raise ConfigError(f"server_type = {server_type!r}: expected sglang, vllm or lmdeploy")
        self.path = path
        self._client = RewardClient(server_address.removesuffix("/lmdeploy"), **options)
        wanted = {"max_tokens": max_length, "max_response_tokens": max_response_length, "cut_side": response_cut_side}
        _refuse_other_limits(wanted, self._client.model().limits)

    def __call__(self, data: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[float]:
        """A reward for each dict, in order; one dict is a list of one, as upstream has it.

        Raises `TripleError` for a dict that is no triple or cannot be scored, and whatever `RewardClient.rewards` does.
        """
        rows = [data] if isinstance(data, Mapping) else data
        for place, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise TripleError(
                    f"row {place}: expected a dict with prompt, reference and output, not a rendered text"
                )
        return self._client.rewards([Triple.from_dict(row) for row in rows])

    def close(self) -> None:
        """Let go of the connections. May be called twice."""
        self._client.close()


def _refuse_other_limits(wanted: dict[str, Any], limits: LimitsReply) -> None:
    arguments = {
        "max_tokens": "max_length",
        "max_response_tokens": "max_response_length",
        "cut_side": "response_cut_side",
    }
    for name, value in wanted.items():
        found = getattr(limits, name)
        if found != value:
            raise ConfigError(
                f"{arguments[name]} = {value!r} here and limits.{name} = {found!r} at the endpoint, which cuts; give "
                f"{arguments[name]}={found!r}, or serve with --set limits.{name}={value}"
            )
