"""Settings of a training run."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from polar_ray.config.base import EMBEDDED_MODEL, Settings
from polar_ray.config.pairs import PairColumnsConfig
from polar_ray.config.scoring import LimitsConfig

LossKind = Literal["ranking", "focal"]
PenaltyKind = Literal["none", "log-barrier", "l2"]
Precision = Literal["float32", "bfloat16", "float16"]


class LossConfig(Settings):
    """What is minimised."""

    kind: LossKind = "ranking"
    """`ranking`: -log sigmoid(chosen - rejected), Bradley and Terry's, which trained POLAR. `focal`: the same, less for
    pairs that are right already, which trained InternLM2-reward."""

    penalty: PenaltyKind = "none"
    """Keeps rewards near 0. `log-barrier`: within -5 and 5; `l2`: by their squares. POLAR has none."""

    penalty_weight: float = Field(0.01, ge=0)
    """Of the penalty, upstream's."""


class OptimizerConfig(Settings):
    """How weights follow the gradients. The defaults are those that fine-tuned POLAR-1.8B."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`adamw` as upstream. `muon`: orthogonalised momentum for the layers' matrices and AdamW for the rest; it learns
    in fewer tokens where a model is trained from nothing."""

    learning_rate: float = Field(1e-5, gt=0)
    """The highest, of AdamW. Upstream: 1e-5 for 1.8B, 2e-5 for 7B."""

    muon_learning_rate: float = Field(0.01, gt=0)
    """The highest, of Muon's part."""

    beta1: float = Field(0.9, ge=0, lt=1)
    """Of AdamW: how much of the gradients' running mean a step keeps."""

    beta2: float = Field(0.95, ge=0, lt=1)
    """Of AdamW: how much of the running mean of their squares."""

    weight_decay: float = Field(0.0, ge=0)
    """Share of each weight that a step at a learning rate of 1 would take away."""

    clip_norm: float = Field(1.0, gt=0)
    """Gradients whose norm over all weights is larger are scaled down to it."""

    warmup_fraction: float = Field(0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises to its highest."""

    final_fraction: float = Field(0.1, ge=0, le=1)
    """Of the highest learning rate, where the cosine ends."""


class LoraConfig(Settings):
    """Train adapters of low rank and the value head instead of all weights. What is written has them merged."""

    rank: int = Field(0, ge=0)
    """Of the adapters; 0: train all weights."""

    alpha: int = Field(32, gt=0)
    """Adapters count `alpha / rank`."""

    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get one, by transformers' names."""


class TrainConfig(Settings):
    """One training run: everything but its pairs and its output folder."""

    model: str = EMBEDDED_MODEL
    """What to start from: a checkpoint's folder or a hub name, such as internlm/POLAR-1_8B-Base."""

    revision: str | None = None
    """Commit of a hub model. Pin it for work that must be repeatable."""

    columns: PairColumnsConfig = PairColumnsConfig()
    limits: LimitsConfig = LimitsConfig()

    newline_before_empty: bool = True
    """Matters with `limits.on_empty = score` alone. `true` gives the ids that scoring gives. `false` leaves out the
    newline before an empty text, as upstream's training does and its client does not: a model is then asked for
    rewards of sequences that it was not trained on."""

    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()

    epochs: int = Field(1, ge=1)
    """Times that every pair is seen. Upstream advises against more than one."""

    max_steps: int | None = Field(None, ge=1)
    """Stop after so many steps, with the schedule ending there."""

    max_packed_tokens: int = Field(32768, ge=64)
    """Tokens that one forward and backward pass computes, shared ones counted once. A pair with more is skipped and
    reported."""

    packs_per_step: int = Field(16, ge=1)
    """Packs whose gradients make one step, over all workers: it must be a multiple of them, and each accumulates its
    share. The trajectory does not depend on how many workers share the packs. Upstream: 2 for each of its GPUs."""

    share_prefixes: bool = True
    """Compute what pairs have in common once: prompt, reference and prompt of chosen and rejected."""

    shuffle: Literal["pairs", "groups"] = "pairs"
    """Order of an epoch. `pairs`: any. `groups`: pairs of one prompt and reference stay together, in any order of
    groups, so that they share what they have in common and each output is computed once: much cheaper where a prompt
    has many outputs, with steps that are less mixed."""

    seed: int = 0
    """Of the order of the pairs and of adapters."""

    precision: Precision = "bfloat16"
    """Of products and activations; the weights that are trained and the optimiser's state stay float32. `float16`
    scales the loss dynamically and needs a GPU."""

    gradient_checkpointing: bool = False
    """Recompute each layer's activations on the way back instead of keeping them: about a third more work, far less
    memory."""

    workers: int = Field(1, ge=1)
    """Processes that train together, one for each GPU if there are any."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: every worker holds all weights. `fsdp`: weights, gradients and optimiser state are spread over the workers
    (FSDP2); for models that do not fit otherwise."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: GPUs if the cluster has any, else CPUs."""

    threads: int | None = Field(None, ge=1)
    """CPU threads of one worker. Left out: the CPUs of the largest node shared among the workers."""

    checkpoint_every_steps: int = Field(500, ge=1)
    """Steps between two checkpoints to go on from after a crash; two are kept."""

    max_failures: int = Field(3, ge=0)
    """Times that lost workers are replaced before the run fails."""

    save_dtype: Precision = "bfloat16"
    """Of the weights that are written."""

    max_failed_fraction: float = Field(0.05, ge=0, le=1)
    """The run does not start when more than this share of the pairs cannot be used."""

    @model_validator(mode="after")
    def _packs_divide(self) -> Self:
        if self.packs_per_step % self.workers:
            raise ValueError(
                f"packs_per_step: {self.packs_per_step} packs cannot be shared evenly among {self.workers} workers"
            )
        if self.lora.rank and self.optimizer.kind == "muon":
            raise ValueError("optimizer.kind: muon is for whole matrices; adapters are trained with adamw")
        if self.parallel == "fsdp" and self.precision == "float16":
            raise ValueError("precision: fsdp spreads what float16 must check for overflow; take bfloat16")
        if self.parallel == "fsdp" and self.optimizer.kind == "muon":
            raise ValueError("optimizer.kind: muon needs whole matrices, which fsdp spreads; take ddp or adamw")
        return self
