"""POLAR checkpoints on disk: opening and checking a folder, reading tensors, their digest, and writing one back.

Weights are read from safetensors alone. A pickle can run code when it is opened, and `trust_remote_code` exists to run
code; neither is needed to multiply matrices.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from polar_ray.errors import CheckpointError
from polar_ray.model.architecture import CheckpointConfig, from_llama, llama_names, tensor_shapes

__all__ = ["Checkpoint", "CheckpointConfig", "save_checkpoint", "weights_digest"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The tensor types that may hold weights, by their safetensors names."""

HASH_CHUNK_BYTES = 4 << 20
"""What a hashing thread holds in memory at a time."""

HASH_THREADS = 8
"""Hashing releases the interpreter's lock; the files' storage is what bounds it from here on."""

MAX_SHARD_BYTES = 5 << 30
"""Size of a written file; the hub's usual limit."""

MAX_HEADER_BYTES = 100_000_000
"""What safetensors itself allows for the header of a file."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `file` is absolute, `start` and `size` count bytes of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder whose config and tensor names, shapes and dtypes have been checked; no weight is read yet."""

    folder: Path
    config: CheckpointConfig
    stored: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Raises `CheckpointError` naming the file, field or tensor that is missing, unexpected or malformed."""
        folder = Path(folder)
        config = read_config(folder)
        stored = {name: tensor for file in _weight_files(folder) for name, tensor in _read_header(file).items()}
        _check(folder, config, stored)
        return cls(folder, config, stored)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, which published checkpoints use for every tensor."""
        return DTYPES[self.stored["model.tok_embeddings.weight"].dtype]

    @property
    def size_bytes(self) -> int:
        """Of all weights, as they are stored."""
        return sum(tensor.size for tensor in self.stored.values())

    def read(
        self,
        name: str,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        part: tuple[slice, ...] = (),
    ) -> Tensor:
        """One tensor, or `part` of it, converted. No more than this is held in memory."""
        stored = self.stored[name]
        try:
            with safe_open(stored.file, framework="pt") as file:
                tensor: Tensor = file.get_slice(name)[part] if part else file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{stored.file}: {name} cannot be read: {error}") from None
        return tensor.to(device=device, dtype=dtype)


def read_config(folder: Path) -> CheckpointConfig:
    """The config of a folder, which need not have its weights. Raises `CheckpointError`."""
    file = folder / "config.json"
    return CheckpointConfig.from_json(_read_text(file), source=str(file))


def weights_digest(folder: str | Path) -> str:
    """sha256, as hex, over the config's numbers and each tensor's name, dtype, shape and bytes, in the order of names.

    Two folders with the same weights have the same digest, however they are cut into files. Reads every byte once,
    on several threads, with `HASH_THREADS * HASH_CHUNK_BYTES` of memory.
    """
    checkpoint = Checkpoint.open(folder)
    stored = checkpoint.stored
    names = sorted(stored)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        hashes = list(pool.map(_hash_bytes, (stored[name] for name in names)))
    # The same tensors under another rotary base or head count compute other rewards; the two ids do not matter here.
    whole = hashlib.sha256(
        checkpoint.config.model_dump_json(exclude={"pad_token_id", "reward_token_id"}).encode() + b"\n"
    )
    for name, digest in zip(names, hashes, strict=True):
        line = json.dumps([name, stored[name].dtype, list(stored[name].shape), digest])
        whole.update(line.encode() + b"\n")
    return whole.hexdigest()


class Saveable(Protocol):
    """What `save_checkpoint` needs of a model: Llama parameter names, and the config it was built from."""

    @property
    def checkpoint_config(self) -> CheckpointConfig: ...

    def state_dict(self) -> dict[str, Any]: ...


def save_checkpoint(model: Saveable, folder: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write `model` as it would be published: InternLM2 names, parameters in their own dtype, `config.json` as read.

    A model loaded in its checkpoint's dtype comes back bit for bit. Of `config.json` only a dtype field that is no
    longer true is changed. The folder is made; one that holds weights already is refused with `CheckpointError`.
    """
    folder, config, parameters = Path(folder), model.checkpoint_config, model.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    if present := sorted(folder.glob("*.safetensors")):
        raise CheckpointError(f"{present[0]}: {folder} holds weights already; save to a new folder")

    shards = list(_cut_into_shards(config, parameters, max_shard_bytes))
    files: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: from_llama(name, parameters, config).contiguous().cpu() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(_n_bytes(name, parameters) for name in files)}, "weight_map": files}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    dtype = str(parameters["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    (folder / "config.json").write_text(config.to_json(dtype=dtype))


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; give the folder of an InternLM2-layout checkpoint") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None


def _weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, each of which exists."""
    if (folder / INDEX_FILE).exists():
        try:
            names = sorted(set(json.loads(_read_text(folder / INDEX_FILE))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder / INDEX_FILE}: expected an object with weight_map: {error!r}") from None
        for name in names:
            if Path(name).name != name or not (folder / name).exists():
                raise CheckpointError(f"{folder / name}: named in {INDEX_FILE} and not there; fetch the folder again")
        return [folder / name for name in names]
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    pickles = sorted(folder.glob("*.bin"))
    if pickles:
        raise CheckpointError(
            f"{pickles[0]}: weights are pickled, which can run code; only safetensors are read. Convert them with "
            "transformers' save_pretrained, or take a revision that has safetensors"
        )
    raise CheckpointError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Names, dtypes, shapes and places of a file's tensors (https://github.com/safetensors/safetensors#format)."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= MAX_HEADER_BYTES:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensors[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a safetensors file: {error}") from None
    needed = max((tensor.start + tensor.size for tensor in tensors.values()), default=0)
    if file.stat().st_size < needed:
        raise CheckpointError(f"{file}: {file.stat().st_size} bytes of {needed}: cut short; fetch it again")
    return tensors


def _check(folder: Path, config: CheckpointConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Every expected tensor in its shape, and no other: a tensor left over means another architecture."""
    expected = tensor_shapes(config)
    for name, shape in expected.items():
        if name not in stored:
            raise CheckpointError(f"{folder}: tensor {name} {list(shape)} is missing")
        if stored[name].shape != shape:
            found = list(stored[name].shape)
            raise CheckpointError(f"{stored[name].file}: {name} has shape {found}; config.json asks for {list(shape)}")
        if stored[name].dtype not in DTYPES:
            raise CheckpointError(
                f"{stored[name].file}: {name} has dtype {stored[name].dtype}; expected one of {', '.join(DTYPES)}"
            )
    extra = sorted(stored.keys() - expected.keys())
    if extra:
        raise CheckpointError(f"{stored[extra[0]].file}: tensor {extra[0]} is not part of this architecture")


def _hash_bytes(tensor: StoredTensor) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(min(HASH_CHUNK_BYTES, tensor.size))
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.start)
        left = tensor.size
        while left:
            n = stream.readinto(memoryview(buffer)[: min(left, len(buffer))])
            if not n:
                raise CheckpointError(f"{tensor.file}: cut short while it was read")
            digest.update(memoryview(buffer)[:n])
            left -= n
    return digest.hexdigest()


def _n_bytes(name: str, parameters: Mapping[str, Tensor]) -> int:
    return sum(parameters[part].nbytes for part in llama_names(name))


def _cut_into_shards(
    config: CheckpointConfig, parameters: Mapping[str, Tensor], max_shard_bytes: int
) -> Iterator[list[str]]:
    """Tensor names in order, as many to a file as its size allows, at least one."""
    taken: list[str] = []
    used = 0
    for name in tensor_shapes(config):
        size = _n_bytes(name, parameters)
        if taken and used + size > max_shard_bytes:
            yield taken
            taken, used = [], 0
        taken.append(name)
        used += size
    yield taken
