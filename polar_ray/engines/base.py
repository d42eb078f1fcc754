"""The contract every engine keeps."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from polar_ray.planning import Batch, Rewards


class Engine(Protocol):
    """Turns token ids into rewards.

    Every engine keeps these promises, and `tests/contract/test_engines.py` checks them:

    - one float32 reward per sequence of the batch, in the batch's order; an empty batch gives an empty array;
    - the reward is the raw scalar of the value head at the sequence's last token: no activation, no bias, no clamp;
    - the same sequence alone, in any batch, with or without a shared prefix gives the same reward within rounding;
    - the same batch gives the same bits again; of engines that batch by themselves (vLLM, SGLang, LMDeploy) the same
      rewards within rounding;
    - with `engine.deterministic` the torch engine gives a sequence the same bits in any batch, shared or not;
    - a reward that is not finite is returned as it is, never replaced; the `Scorer` decides what becomes of it;
    - a failure of the whole batch is an `EngineError`, never a short array; `ProcessCrashed` if the batch took the
      engine's own processes away, which only another engine brings back;
    - `close()` may be called twice and leaves no process and no device memory behind.
    """

    @property
    def token_budget(self) -> int:
        """Computed tokens that one batch should hold on this hardware. It may become less when memory runs out."""
        ...

    @property
    def max_shared_length(self) -> int | None:
        """Longest sequence that may share a prefix; None for no limit."""
        ...

    def score(self, batch: Batch) -> Rewards: ...

    def close(self) -> None: ...


@runtime_checkable
class HasProcesses(Protocol):
    """What an `Engine` with processes of its own offers besides."""

    def is_running(self) -> bool:
        """Whether they are all there; without, it gives no more rewards. Safe in any thread."""
        ...
