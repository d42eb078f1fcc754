"""LMDeploy as a server: one of the actor's own, or one that runs already.

LMDeploy computes POLAR under its own name, as it was trained: the plain rotary base, a head on every token of which its
`/pooling` gives the last one's number, no activation. It has no CPU road, and in-process its pipeline offers no more
than the server does, so a server is the only way.

**It has not run against a real LMDeploy**, for want of a GPU. Requests, replies, arguments and the folder that is
served were written after, and checked with, the code of lmdeploy 0.18.0 as far as that runs on a CPU.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from polar_ray.config import EngineConfig, RopeBase
from polar_ray.engines.outside import Arguments, as_switches, installed, member, refuse_arguments, refuse_ids
from polar_ray.engines.server import EngineHttp, OwnServer, free_address
from polar_ray.errors import ConfigError, EngineError, EngineProtocolError
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.model.rope import Rope
from polar_ray.planning import Batch, Rewards

ROUTE = "/pooling"

DTYPES = ("bfloat16", "float16")

PREFILL_TOKENS = 8192
"""LMDeploy's own choice of tokens that it computes at a time."""

TUNABLE = ("log_level", "max_prefill_token_num")
"""Those of `engine_arguments` that do not decide what is computed; `engine.arguments` may change them."""

REFUSED = ("enable_prefix_caching", "hf_overrides", "server_name", "server_port", "trust_remote_code")
"""Arguments that are set here or never. With its prefix cache LMDeploy keeps the numbers of uncached tokens alone, and
fails where that is a single one (`async_get_reward_score`)."""

NO_WORDS: dict[str, object] = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"<ids only>": 0}, "unk_token": "<none>"},
}
"""A tokenizer that fails on any text. LMDeploy insists on one; POLAR's own would have to run code from the checkpoint's
folder."""


class LmdeployEngine:
    """Keeps the promises of `Engine`, but for two: LMDeploy batches what has arrived when it is ready, so the same
    batch gives the same rewards within rounding, not the same bits; and a sequence needs two tokens. Prefixes are not
    shared, and a reward that is not finite fails its batch: LMDeploy has no JSON for it. Not thread-safe."""

    def __init__(
        self, http: EngineHttp, *, vocab_size: int, max_tokens: int, token_budget: int, folder: Path | None = None
    ) -> None:
        """`folder` is what its own server serves from, removed by `close`."""
        self._http: EngineHttp | None = http
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens
        self._token_budget = token_budget
        self._folder = folder

    @property
    def token_budget(self) -> int:
        return self._token_budget

    @property
    def max_shared_length(self) -> int | None:
        return None

    def score(self, batch: Batch) -> Rewards:
        if self._http is None:
            raise EngineError("the engine is closed; load it again")
        sequences = [ids.tolist() for ids in batch.sequences()]
        if not sequences:
            return np.empty(0, dtype=np.float32)
        refuse_ids(sequences, vocab_size=self._vocab_size, max_tokens=self._max_tokens)
        if min(map(len, sequences)) < 2:
            raise EngineError("a sequence of 1 token: lmdeploy takes 2 or more")
        return np.array(read_reply(self._http.post(ROUTE, {"input": sequences}), len(sequences)), dtype=np.float32)

    def is_running(self) -> bool:
        http = self._http
        return http is not None and http.is_running()

    def close(self) -> None:
        http, self._http = self._http, None
        if http is not None:
            http.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def start(folder: Path, engine: EngineConfig) -> LmdeployEngine:
    """The engine that `engine`, resolved, names.

    Raises `CheckpointError`, `ConfigError` for settings that LMDeploy cannot keep, `EngineStartError`, and of a server
    that runs already `EngineUnavailable`.
    """
    _refuse(engine)
    config = Checkpoint.open(folder).config
    made = partial(
        LmdeployEngine,
        vocab_size=config.vocab_size,
        max_tokens=engine.max_tokens or config.max_position_embeddings,
        token_budget=engine.token_budget or 16384,
    )
    if engine.address is not None:
        http = EngineHttp(engine.address, name="lmdeploy")
        try:
            member(http.get("/v1/models"), "data", "lmdeploy's /v1/models")
        except BaseException:
            http.close()
            raise
        return made(http)
    served = serving_folder(folder, engine.rope_base)
    try:
        return made(_start_server(served, engine, made.keywords["max_tokens"]), folder=served)
    except BaseException:
        shutil.rmtree(served, ignore_errors=True)
        raise


def engine_version(engine: EngineConfig) -> str:
    """LMDeploy's version where it is started, and torch's; a server does not tell its own. Raises `EngineStartError` if
    it is not installed there."""
    return "lmdeploy" if engine.address is not None else installed("lmdeploy", engine.python)


def engine_arguments(engine: EngineConfig, max_tokens: int) -> Arguments:
    """The arguments of LMDeploy's `serve api_server`, by its names for them in Python, that give POLAR's rewards.

    `engine.arguments` are added. Raises `ConfigError` where they name what decides the reward.
    """
    ours: Arguments = {
        "backend": "pytorch",
        "model_name": "polar",
        "dtype": engine.dtype,
        "tp": engine.tensor_parallel_size,
        "session_len": max_tokens,
        # A longer sequence would be computed in parts, and its numbers put together by a road that few have used.
        "max_prefill_token_num": max(PREFILL_TOKENS, max_tokens),
        "disable_fastapi_docs": True,
        "log_level": "WARNING",
    }
    refuse_arguments(engine.arguments, ours, tunable=TUNABLE, refused=REFUSED)
    return {**ours, **engine.arguments}


def serving_folder(folder: Path, rope_base: RopeBase) -> Path:
    """A new folder from which LMDeploy serves the checkpoint: its weights, linked, a config for which no code has to be
    run, and a tokenizer that reads nothing. Raises `CheckpointError`."""
    checkpoint = Checkpoint.open(folder)
    config, rope = json.loads(checkpoint.config.to_json()), Rope.of(checkpoint.config, rope_base)
    for name in ("auto_map", "rope_scaling"):  # a null here ends LMDeploy; a factor is of use beyond its limit alone
        config.pop(name, None)
    for name in ("bos_token_id", "eos_token_id"):
        config.setdefault(name, None)
    config["rope_theta"] = rope.base(0)
    if rope.position_scale != 1:
        config["rope_scaling"] = {"rope_type": "linear", "factor": 1 / rope.position_scale}
    made = Path(tempfile.mkdtemp(prefix="polar_ray-lmdeploy-"))
    files = {stored.file for stored in checkpoint.stored.values()} | set(folder.glob("*.safetensors.index.json"))
    for file in files:
        (made / file.name).symlink_to(file.resolve())
    (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (made / "tokenizer.json").write_text(json.dumps(NO_WORDS))
    (made / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return made


def read_reply(reply: Any, n: int) -> list[float]:
    """Rewards of a reply of `/pooling` to `n` sequences, in the order of the request.

    Raises `EngineProtocolError` for anything but one number for each.
    """
    where = "lmdeploy's reply"
    data = member(reply, "data", where)
    found: dict[int, float] = {}
    for row in data if isinstance(data, list) else []:
        value = member(row, "data", where)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise EngineProtocolError(f"expected a number for a sequence in {where}, found a {type(value).__name__}")
        found[member(row, "index", where)] = float(value)
    if not isinstance(data, list) or len(data) != n or set(found) != set(range(n)):
        raise EngineProtocolError(f"expected {n} rewards, one per sequence, found {len(found)} in {where}")
    return [found[index] for index in range(n)]


def _start_server(served: Path, engine: EngineConfig, max_tokens: int) -> EngineHttp:
    assert engine.python is not None
    installed("lmdeploy", engine.python)
    address = free_address()
    host, port = address.split(":")
    http = EngineHttp(address, name="lmdeploy")
    own = OwnServer.start(
        [
            *(engine.python, "-m", "lmdeploy", "serve", "api_server", str(served)),
            *(f"--server-name={host}", f"--server-port={port}", *as_switches(engine_arguments(engine, max_tokens))),
        ],
        name="lmdeploy",
        is_ready=partial(http.answers, "/health"),
        timeout_s=engine.start_timeout_s,
        environment={"HF_HUB_OFFLINE": "1"},
    )
    http.close()
    return EngineHttp(address, name="lmdeploy", own=own)


def _refuse(engine: EngineConfig) -> None:
    if engine.address is None and engine.python is None:
        raise ConfigError(
            "engine.kind = 'lmdeploy': runs as a server only; set engine.python to the interpreter that has lmdeploy, "
            "or engine.address to a server that runs"
        )
    if engine.deterministic:
        raise ConfigError("engine.deterministic: LMDeploy has no such mode; leave it out")
    if engine.python is not None and engine.device == "cpu":
        raise ConfigError("engine.device = 'cpu': LMDeploy runs on GPUs only; set engine.kind = 'torch'")
    if engine.python is not None and engine.dtype not in DTYPES:
        raise ConfigError(
            f"engine.dtype = {engine.dtype!r}: LMDeploy computes in {' or '.join(DTYPES)}; set one of these"
        )
