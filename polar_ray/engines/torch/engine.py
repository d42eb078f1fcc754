"""Our engine, on torch alone: exact shared prefixes, no padding, CPU or CUDA. It runs in this process."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from polar_ray import __version__
from polar_ray.config import EngineConfig, Quantization, RopeBase
from polar_ray.engines.base import Engine
from polar_ray.engines.ranks import RanksEngine
from polar_ray.engines.torch.decoder import WHOLE, AddUp, Decoder
from polar_ray.engines.torch.determinism import even_lengths, fill_up
from polar_ray.engines.torch.layout import pack
from polar_ray.engines.torch.shard import Shard
from polar_ray.errors import EngineError, EngineStartError, first_line
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.planning import Batch, Rewards

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchEngine:
    """Keeps the promises of `Engine`. Not thread-safe.

    A batch that does not fit into memory halves `token_budget`, for good, besides failing.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        device: torch.device,
        vocab_size: int,
        token_budget: int,
        even_lengths: Sequence[int] = (),
    ) -> None:
        """With `even_lengths`, batches are filled up to such numbers of rows, see `determinism.py`."""
        self._decoder: Decoder | None = decoder
        self._fill_up = partial(fill_up, lengths=even_lengths) if even_lengths else None
        self._device = device
        self._vocab_size = vocab_size
        self._token_budget = token_budget
        self._max_shared_length = decoder.max_shared_length

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        token_budget: int = 4096,
        rope_base: RopeBase = "hf",
        threads: int | None = None,
        shard: Shard = WHOLE,
        add_up: AddUp | None = None,
        deterministic: bool = False,
        quantization: Quantization | None = None,
    ) -> TorchEngine:
        """The checkpoint in `folder`, packed for `device` (`cpu`, `cuda`, `cuda:1`); with a `shard` that part of it,
        whose rewards are right if `add_up` adds the others' parts.

        `threads` sets torch's threads for the whole process; None leaves them. `deterministic` gives a sequence the
        same bits alone, in any batch and with or without a shared prefix, on this kind of device with this torch.
        With `quantization` linear layers compute in 8 bits, see `quantized.py`.
        Raises `CheckpointError` for the folder and `EngineStartError` for the machine, also if it cannot be
        deterministic on it.
        """
        if dtype not in DTYPES:
            raise EngineStartError(f"engine.dtype = {dtype!r}: expected one of {', '.join(DTYPES)}")
        place = _device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        # A process-wide setting, which someone may have lowered: float32 then means TF32 or bfloat16.
        torch.set_float32_matmul_precision("highest")
        checkpoint = Checkpoint.open(folder)
        try:
            with torch.inference_mode():
                decoder = Decoder(
                    checkpoint,
                    DTYPES[dtype],
                    place,
                    rope_base,
                    shard,
                    add_up,
                    deterministic=deterministic,
                    quantization=quantization,
                )
                lengths = even_lengths(decoder, checkpoint.config.hidden_size, place) if deterministic else ()
        except (MemoryError, RuntimeError) as error:
            raise EngineStartError(
                f"{folder} does not load as {dtype} on {device}: {first_line(error)}. If memory is what lacks, take "
                "a narrower engine.dtype, a device with more memory or fewer engines on it"
            ) from error
        return cls(
            decoder,
            device=place,
            vocab_size=checkpoint.config.vocab_size,
            token_budget=token_budget,
            even_lengths=lengths,
        )

    @property
    def token_budget(self) -> int:
        return self._token_budget

    @property
    def max_shared_length(self) -> int | None:
        return self._max_shared_length

    @torch.inference_mode()
    def score(self, batch: Batch) -> Rewards:
        if self._decoder is None:
            raise EngineError("the engine is closed; load it again")
        if not len(batch):
            return np.empty(0, dtype=np.float32)
        try:
            packed = pack(batch, self._max_shared_length, self._fill_up)
            self._check_ids(packed.ids_T.numpy())
            rewards: Rewards = self._decoder.rewards(packed.to(self._device))[: len(batch)].cpu().numpy()
        except (MemoryError, RuntimeError) as error:
            if len(batch) > 1 and _is_out_of_memory(error):
                self._take_less_than(batch.computed_tokens)
            raise EngineError(
                f"a batch of {len(batch)} sequences, {batch.computed_tokens} tokens, failed: {first_line(error)}. "
                "If memory is what lacks, lower engine.token_budget",
                sequences=len(batch),
                computed_tokens=batch.computed_tokens,
            ) from error
        return rewards

    def close(self) -> None:
        self._decoder = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _take_less_than(self, tokens: int) -> None:
        """Half as many from now on, if that is less than before."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if tokens // 2 < self._token_budget:
            self._token_budget = max(1, tokens // 2)
            logger.warning(
                "A batch of %d tokens did not fit into memory: batches have %d at most from now on. Set "
                "engine.token_budget to that, and it need not be found out again.",
                tokens,
                self._token_budget,
            )

    def _check_ids(self, ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> None:
        outside = ids[(ids < 0) | (ids >= self._vocab_size)]
        if len(outside):
            raise EngineError(
                f"token id {outside[0]}: outside this model's vocabulary of {self._vocab_size}; the tokenizer belongs "
                "to another checkpoint",
                token_id=int(outside[0]),
            )


def start(folder: Path, engine: EngineConfig) -> Engine:
    """The engine that `engine`, resolved, names: here, or over several ranks. Raises as `TorchEngine.load`."""
    if engine.tensor_parallel_size > 1:
        return RanksEngine.start(folder, engine)
    return TorchEngine.load(
        folder,
        dtype=engine.dtype,
        device=engine.device,
        token_budget=engine.token_budget or 4096,
        rope_base=engine.rope_base,
        threads=engine.threads,
        deterministic=engine.deterministic,
        quantization=engine.quantization,
    )


def engine_version(_: EngineConfig) -> str:
    return f"polar_ray {__version__}, torch {version('torch')}"


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise EngineStartError(f"engine.device = {name!r}: expected cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise EngineStartError(f"engine.device = {name!r}: expected cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineStartError(
            f"engine.device = {name!r}: torch {torch.__version__} sees no CUDA device here; set engine.device = 'cpu', "
            "or install a CUDA build of torch and check nvidia-smi"
        )
    return device


def _is_out_of_memory(error: BaseException) -> bool:
    """torch has a type of its own for this on GPUs only."""
    words = ("can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(said in str(error) for said in words)
