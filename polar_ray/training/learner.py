"""One process that learns: a model, its optimiser, and the step that packs of pairs make. Knows nothing of Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from polar_ray.config.training import TrainConfig
from polar_ray.engines.torch.engine import DTYPES
from polar_ray.engines.torch.layout import Packed, pack
from polar_ray.errors import TrainingError
from polar_ray.model.polar import PolarForReward
from polar_ray.planning import Batch, Ids, plan
from polar_ray.training.loss import pair_losses
from polar_ray.training.packed import PackedPolar


@dataclass(frozen=True)
class PackedPairs:
    """Pairs in the form they are computed in. `chosen` and `rejected` are places among the batch's rewards, `[N]`."""

    packed: Packed
    chosen: Tensor
    rejected: Tensor
    tokens: int
    """Of all sequences, each computed whole and as often as it occurs."""

    computed_tokens: int

    def __len__(self) -> int:
        return len(self.chosen)


def pack_pairs(
    chosen: Sequence[Ids], rejected: Sequence[Ids], *, share_prefixes: bool, max_shared_length: int | None = None
) -> PackedPairs:
    """At least one pair as one pack; equal sequences are computed once if anything is shared."""
    n_pairs, sequences = len(chosen), [*chosen, *rejected]
    if share_prefixes:
        planned = plan(sequences, token_budget=1 << 62, max_shared_length=max_shared_length)
        (batch,), first_of = planned.batches, planned.first_of
    else:
        batch = Batch.unshared(sequences)
        first_of = np.arange(len(sequences))
    place = np.empty(len(sequences), dtype=np.int64)
    place[batch.rows] = np.arange(len(batch.rows))
    places = torch.from_numpy(place[first_of])
    return PackedPairs(
        pack(batch, max_shared_length),
        places[:n_pairs],
        places[n_pairs:],
        sum(map(len, sequences)),
        batch.computed_tokens,
    )


@dataclass
class StepSums:
    """What one step saw, as sums over its pairs; sums of several workers add up."""

    pairs: float = 0
    loss: float = 0
    correct: float = 0
    margin: float = 0
    chosen: float = 0
    rejected: float = 0
    tokens: float = 0
    computed_tokens: float = 0

    def over_all_workers(self, device: torch.device) -> StepSums:
        """The sums of all workers' sums; what this worker has, if it is alone."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self
        names = [field.name for field in fields(self)]
        sums = torch.tensor([float(getattr(self, name)) for name in names], dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return StepSums(**dict(zip(names, sums.tolist(), strict=True)))


class Learner:
    """Trains `model` in place. With several workers, each has one, and they step together."""

    def __init__(self, model: PolarForReward, config: TrainConfig, device: torch.device) -> None:
        """`model` must be on `device`, or, to be spread by FSDP, hold its weights wherever they were loaded."""
        self.model = model
        self._config = config
        self._device = device
        self._workers = dist.get_world_size() if dist.is_initialized() else 1
        if config.gradient_checkpointing:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        self._module: nn.Module = PackedPolar(model)
        if self._workers > 1:
            self._module = _spread(self._module, config, device)
        self._named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._optimizers = _make_optimizers(self._named, config)
        self._highest = [[group["lr"] for group in each.param_groups] for each in self._optimizers]
        self._dtype = DTYPES[config.precision]
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")

    def step(self, packs: Sequence[PackedPairs], pairs_in_step: int, rate: float) -> tuple[StepSums, float]:
        """Change the weights once, by the mean loss of a step's pairs, of which `packs` are this worker's share.

        `rate` is the share of the highest learning rate. Gives this worker's sums and the norm of the gradient before
        it was clipped. Every worker must pass equally many packs. Raises `TrainingError` when the gradient is not
        finite; the weights are then unchanged. With float16 such a step is left out and the loss scaled down, until
        there is nothing left to scale.
        """
        sums = StepSums()
        for number, pairs in enumerate(packs, 1):
            with self._synchronising(number == len(packs)):
                self._scaler.scale(self._loss(pairs, sums) * (self._workers / pairs_in_step)).backward()  # type: ignore[no-untyped-call]
        for optimizer, highest in zip(self._optimizers, self._highest, strict=True):
            self._scaler.unscale_(optimizer)
            for group, most in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = most * rate
        norm = _full(torch.nn.utils.clip_grad_norm_(self._named.values(), self._config.optimizer.clip_norm))
        if not self._scaler.is_enabled() and not np.isfinite(float(norm)):
            self._zero()
            raise TrainingError(
                f"the gradient's norm is {float(norm)} (loss {sums.loss / max(1, sums.pairs)}); lower "
                "optimizer.learning_rate, or look at the pairs of this step"
            )
        for optimizer in self._optimizers:
            self._scaler.step(optimizer)
        self._scaler.update()
        if self._scaler.is_enabled() and self._scaler.get_scale() < 1:
            raise TrainingError("float16 overflows whatever the loss is scaled by; set precision = bfloat16")
        self._zero()
        return sums, float(norm)

    @property
    def max_shared_length(self) -> int | None:
        """Longest sequence that may share what it has in common with others."""
        longest: int | None = self.model.model.rotary_emb.rope.longest_with_one_base
        return longest

    def state(self) -> dict[str, Tensor]:
        """Weights that are trained and optimiser state, this worker's part of them, on the CPU, by name."""
        found = self._tensors()
        if self._scaler.is_enabled():
            found |= {f"scaler/{key}": torch.as_tensor(value) for key, value in self._scaler.state_dict().items()}
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in found.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave, in a learner of the same settings and, with FSDP, as many workers.

        Raises `TrainingError` when the two do not fit.
        """
        self._start_optimizers()
        mine = self._tensors()
        theirs = {name for name in state if not name.startswith("scaler/")}
        for name in sorted(mine.keys() ^ theirs):
            raise TrainingError(f"checkpoint: {name} is on one side only; its run had other settings")
        with torch.no_grad():
            for name, tensor in mine.items():
                if tensor.shape != state[name].shape:
                    raise TrainingError(
                        f"checkpoint: {name} has shape {list(state[name].shape)}, this worker's part has "
                        f"{list(tensor.shape)}; go on with as many workers as before"
                    )
                tensor.copy_(state[name])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict({key: state[f"scaler/{key}"].item() for key in self._scaler.state_dict()})

    def _loss(self, pairs: PackedPairs, sums: StepSums) -> Tensor:
        """The sum over the pairs, added up in `sums`."""
        enabled = self._dtype != torch.float32
        with torch.autocast(self._device.type, self._dtype, enabled=enabled):
            rewards = self._module(pairs.packed.to(self._device))
        chosen, rejected = (rewards[places.to(self._device)] for places in (pairs.chosen, pairs.rejected))
        loss = pair_losses(chosen, rejected, self._config.loss).sum()
        margin = (chosen - rejected).detach()
        # One transfer from the device for all of them.
        added = torch.stack([loss.detach(), (margin > 0).sum(), margin.sum(), chosen.detach().sum()]).tolist()
        sums.loss += added[0]
        sums.correct += added[1]
        sums.margin += added[2]
        sums.chosen += added[3]
        sums.rejected += added[3] - added[2]
        sums.pairs += len(pairs)
        sums.tokens += pairs.tokens
        sums.computed_tokens += pairs.computed_tokens
        return loss

    @contextlib.contextmanager
    def _synchronising(self, is_last: bool) -> Iterator[None]:
        """With DDP, gradients travel between workers once a step, with the last pack."""
        if isinstance(self._module, DistributedDataParallel) and not is_last:
            with self._module.no_sync():
                yield
            return
        yield  # FSDP adds up each pack's gradients where they belong: whole ones would take the memory it saves

    def _tensors(self) -> dict[str, Tensor]:
        """This worker's part of weights and optimiser state, sharing their memory, by name."""
        found = {f"weight/{name}": _local(weight) for name, weight in self._named.items()}
        for optimizer in self._optimizers:
            for name, weight in self._named.items():
                values = optimizer.state.get(weight, {})
                found |= {f"optimizer/{name}/{key}": _local(value) for key, value in values.items()}
        return found

    def _start_optimizers(self) -> None:
        """Make the state that a first step would make, without a step: at a learning rate of 0 nothing moves."""
        for weight in self._named.values():
            weight.grad = torch.zeros_like(weight)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()
        self._zero()

    def _zero(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)


def idle_pairs(score_id: int) -> PackedPairs:
    """What a worker computes in a last step that has no pack left for it: one token, no pair."""
    ids = np.array([score_id], dtype=np.int32)
    whole = pack_pairs([ids], [ids], share_prefixes=True)
    return PackedPairs(whole.packed, whole.chosen[:0], whole.rejected[:0], 0, 1)


def _spread(module: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    if config.parallel == "ddp":
        return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)
    for layer in module.polar.model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    fully_shard(module)
    return module


def _make_optimizers(named: Mapping[str, nn.Parameter], config: TrainConfig) -> list[torch.optim.Optimizer]:
    given = config.optimizer
    matrices = {
        name: weight
        for name, weight in named.items()
        if given.kind == "muon" and weight.ndim == 2 and ".layers." in name
    }
    rest = [weight for name, weight in named.items() if name not in matrices]
    adamw = torch.optim.AdamW(
        rest,
        lr=given.learning_rate,
        betas=(given.beta1, given.beta2),
        weight_decay=given.weight_decay,
        fused=True,
    )
    if not matrices:
        return [adamw]
    muon = torch.optim.Muon(
        list(matrices.values()), lr=given.muon_learning_rate, weight_decay=given.weight_decay, momentum=0.95
    )
    return [muon, adamw]


def _local(tensor: Any) -> Tensor:
    """This worker's part of a tensor, sharing its memory."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part.detach()


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
