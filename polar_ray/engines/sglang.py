"""SGLang: in this process, as a server of the actor's own, or one that runs already.

What is loaded is the Llama form (`model/llama.py`). SGLang's class for it reads the head at the last token, without an
activation, and looks prefixes up in its radix cache. Ids go to `/classify`, which gives the head's own number;
`/v1/classify` is another route, with a softmax over the labels, of which POLAR has one: it always says 1.

The head is computed in `engine.dtype`: a bfloat16 reward between 8 and 16 comes in steps of 0.06, a float16 one in
steps of 0.008.

Tested with sglang 0.5.23 on a CPU.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import numpy as np

from polar_ray.config import EngineConfig
from polar_ray.engines.outside import (
    Arguments,
    as_switches,
    installed,
    member,
    refuse_arguments,
    refuse_ids,
)
from polar_ray.engines.server import EngineHttp, OwnServer, free_address
from polar_ray.errors import ConfigError, EngineError, EngineProtocolError, EngineStartError, ProcessCrashed, first_line
from polar_ray.model.checkpoint import Checkpoint, CheckpointConfig
from polar_ray.model.llama import llama_form
from polar_ray.planning import Batch, Rewards

ROUTE = "/classify"

SPARE_TOKENS = 7
"""Between `context_length` and the longest sequence that SGLang takes (`tp_worker.py`, `validate_input_length`)."""

CACHED_CALLS = 2
"""What the cache of a CPU holds, in calls of `engine.token_budget`. SGLang would take most of the memory."""

TUNABLE = ("log_level", "log_level_http", "max_total_tokens", "sleep_on_idle")
"""Those of `engine_arguments` that do not decide what is computed; `engine.arguments` may change them."""

REFUSED = ("allow_auto_truncate", "host", "port", "tokenizer_path", "trust_remote_code")
"""Arguments that are set here or never; `engine.arguments` may not name them."""

POLL_S = 0.5
"""How often a call to the engine in this process looks whether SGLang's processes still run."""

SIG_IGN = 1
"""The C handler that does nothing."""


class Road(Protocol):
    """A way to an SGLang. Nothing about batches: ids in, rows of its reply out."""

    def rows(self, sequences: Sequence[list[int]]) -> Any: ...

    def is_running(self) -> bool: ...

    def close(self) -> None: ...


class SglangEngine:
    """Keeps the promises of `Engine`, but for bits: SGLang batches what has arrived when it is ready, and finds more in
    its cache the second time, so the same batch gives the same rewards within rounding. Not thread-safe.

    A group costs two calls: siblings that arrive together are computed together, each whole, and only what is in the
    cache already is shared, so that the first of each group goes before the others.
    """

    def __init__(self, road: Road, *, vocab_size: int, max_tokens: int, token_budget: int) -> None:
        self._road: Road | None = road
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens
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
        sequences = [ids.tolist() for ids in batch.sequences()]
        # SGLang does not look at the ids; its scheduler would die of one that the model does not have.
        refuse_ids(sequences, vocab_size=self._vocab_size, max_tokens=self._max_tokens)
        rewards = np.empty(len(sequences), dtype=np.float32)
        for places in in_turns(batch):
            sent = [sequences[place] for place in places]
            rewards[places] = read_rows(self._road.rows(sent), sent)
        return rewards

    def is_running(self) -> bool:
        road = self._road
        return road is not None and road.is_running()

    def close(self) -> None:
        road, self._road = self._road, None
        if road is not None:
            road.close()


def start(folder: Path, engine: EngineConfig) -> SglangEngine:
    """The engine that `engine`, resolved, names.

    Raises `CheckpointError`, `ConfigError` for settings that SGLang cannot keep, `EngineStartError`, and of a server
    that runs already `EngineUnavailable`.
    """
    _refuse(engine)
    config = Checkpoint.open(folder).config
    road: Road
    if engine.address is not None:
        road = _connect(engine)
    else:
        arguments = engine_arguments(llama_form(folder, engine.rope_base), engine, config)
        road = _InProcess(arguments, engine) if engine.python is None else _start_server(arguments, engine)
    return SglangEngine(
        road,
        vocab_size=config.vocab_size,
        max_tokens=engine.max_tokens or config.max_position_embeddings,
        token_budget=engine.token_budget or 16384,
    )


def engine_version(engine: EngineConfig) -> str:
    """SGLang's version where it runs, and torch's. Raises `EngineStartError` if it is not installed there, or as
    `EngineHttp.get`."""
    if engine.address is None:
        return installed("sglang", engine.python)
    http = EngineHttp(engine.address, name="sglang")
    try:
        version = member(http.get("/server_info"), "version", "sglang's /server_info")
        return f"sglang {version}"
    finally:
        http.close()


def engine_arguments(form: Path, engine: EngineConfig, config: CheckpointConfig) -> dict[str, bool | int | float | str]:
    """SGLang's arguments, by its names for them in Python, that give raw rewards from the Llama form.

    `engine.arguments` are added. Raises `ConfigError` where they name what decides the reward.
    """
    longest = engine.max_tokens or config.max_position_embeddings
    room = longest + SPARE_TOKENS
    ours: dict[str, bool | int | float | str] = {
        "model_path": str(form),
        "is_embedding": True,
        "skip_tokenizer_init": True,  # text that reached it would be scored, and wrongly
        "dtype": engine.dtype,
        "device": engine.device,
        "context_length": room,
        "json_model_override_args": json.dumps({"max_position_embeddings": room}),
        "disable_radix_cache": not engine.share_prefixes,
        "tp_size": engine.tensor_parallel_size,
        "enable_deterministic_inference": engine.deterministic,
        "sleep_on_idle": True,  # else it turns a core at rest
        "log_level": "error" if engine.python is None else "info",
        "log_level_http": "warning",
    }
    if engine.device == "cpu":
        ours["max_total_tokens"] = max(room, CACHED_CALLS * (engine.token_budget or 0)) + SPARE_TOKENS
    refuse_arguments(engine.arguments, ours, tunable=TUNABLE, refused=REFUSED)
    return ours | engine.arguments


def environment_of(engine: EngineConfig) -> dict[str, str]:
    """Environment variables of SGLang's processes: nothing is fetched, and only as many threads as asked."""
    values = {"HF_HUB_OFFLINE": "1"}
    if engine.device == "cpu":
        values["SGLANG_USE_CPU_ENGINE"] = "1"
        if engine.threads is not None:
            values["OMP_NUM_THREADS"] = str(max(1, engine.threads // engine.tensor_parallel_size))
    return values


def in_turns(batch: Batch) -> list[list[int]]:
    """The places of the batch's sequences in the order to send them, turn by turn: of those that share a prefix which
    is not computed yet, the first one, and the others when it is."""
    ends = [place for place, node in enumerate(batch.nodes) if node.row is not None]
    waiting = [(number, batch.path(place)) for number, place in enumerate(ends)]
    computed: set[int] = set()
    turns: list[list[int]] = []
    while waiting:
        now, later = [], []
        meanwhile: set[int] = set()
        for number, path in waiting:
            if meanwhile.isdisjoint(path):
                now.append(number)
                meanwhile.update(set(path) - computed)
            else:
                later.append((number, path))
        turns.append(now)
        computed |= meanwhile
        waiting = later
    return turns


def read_rows(rows: Any, sent: Sequence[Sequence[int]]) -> list[float]:
    """The rewards in SGLang's rows for the sequences that were sent.

    Raises `EngineProtocolError` for anything but one number for each, computed from all of its tokens.
    """
    if not isinstance(rows, list) or len(rows) != len(sent):
        found = f"{len(rows)} rows" if isinstance(rows, list) else f"a {type(rows).__name__}"
        raise EngineProtocolError(f"expected {len(sent)} rewards, one per sequence, found {found} in sglang's reply")
    rewards = []
    for row, ids in zip(rows, sent, strict=True):
        value, said = (
            member(row, "embedding", "a row of sglang's reply"),
            member(row, "meta_info", "a row of sglang's reply"),
        )
        if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], int | float):
            size = len(value) if isinstance(value, list) else 1
            raise EngineProtocolError(
                f"sglang gave {size} numbers for a sequence: it embeds, it does not score; serve the reward model"
            )
        read = member(said, "prompt_tokens", "a row of sglang's reply")
        if read != len(ids):
            raise EngineProtocolError(
                f"sglang read {read} tokens of a sequence of {len(ids)}: it cuts in silence; start it without "
                "--allow-auto-truncate and with more --context-length"
            )
        rewards.append(float(value[0]))
    return rewards


class _Server:
    """An SGLang behind HTTP."""

    def __init__(self, http: EngineHttp) -> None:
        self._http = http

    def rows(self, sequences: Sequence[list[int]]) -> Any:
        return self._http.post(ROUTE, {"input_ids": sequences})

    def is_running(self) -> bool:
        return self._http.is_running()

    def close(self) -> None:
        self._http.close()


class _InProcess:
    """SGLang's `Engine`, in a thread and with an event loop of its own. Its scheduler is a process all the same.

    An `Engine` takes its process for its own. On the main thread it would answer SIGTERM and SIGQUIT; when a child of
    it fails it has SIGQUIT sent here, to kill this process and all that descends from it; when it shuts down it kills
    all children of this process, Ray's among them. So it is not on the main thread, SIGQUIT is ignored from then on (it
    may come late), and what it has started is ended here, by name.
    """

    def __init__(self, arguments: Arguments, engine: EngineConfig) -> None:
        installed("sglang", None)
        _ignore_sigquit()
        started: Future[Any] = Future()
        # Its processes are told to end with the thread that starts them, so it lasts as long as they do.
        self._thread = Thread(target=_run, args=(arguments, environment_of(engine), started), name="sglang")
        self._thread.daemon = True
        self._thread.start()
        try:
            self._engine = started.result()
        except BaseException:
            self._thread.join()
            raise

    def rows(self, sequences: Sequence[list[int]]) -> Any:
        asked = asyncio.run_coroutine_threadsafe(_ask(self._engine, sequences), self._engine.loop)
        while not asked.done():
            try:
                asked.exception(POLL_S)
            except TimeoutError:
                if not self.is_running():
                    asked.cancel()
                    raise ProcessCrashed("SGLang's process has ended; a new process starts it again") from None
        try:
            return asked.result()
        except Exception as error:  # whatever it raises, the batch has no rewards
            raise EngineError(
                f"SGLang failed on a batch of {len(sequences)} sequences: {first_line(error)}",
                sequences=len(sequences),
            ) from error

    def is_running(self) -> bool:
        return set(self._engine.get_all_child_pids()) <= _children()

    def close(self) -> None:
        self._engine.shutdown()
        self._engine.loop.call_soon_threadsafe(self._engine.loop.stop)
        self._thread.join()


def _run(arguments: Arguments, environment: Mapping[str, str], started: Future[Any]) -> None:
    """The life of an `Engine`, in a thread of its own: until its loop is stopped."""
    before = _children()
    try:
        with _settings(environment):
            engine = _engine_class()(**arguments)
    except (Exception, SystemExit) as error:
        _end(_children() - before)
        started.set_exception(
            error
            if isinstance(error, EngineStartError)
            else EngineStartError(f"SGLang does not start: {first_line(error)}. Its own log above says more")
        )
        return
    started.set_result(engine)
    engine.loop.run_forever()
    tasks = asyncio.all_tasks(engine.loop)
    for task in tasks:
        task.cancel()
    engine.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    engine.loop.close()


def _engine_class() -> type[Any]:
    """SGLang's `Engine`, made to end its own processes only."""
    try:
        from sglang.srt.entrypoints.engine import Engine
    except ImportError as error:
        raise EngineStartError(
            f"engine.kind = 'sglang': SGLang does not import here ({error}); install polar_ray[sglang] in this "
            "environment, or set engine.python to an interpreter that has it"
        ) from None

    class Contained(Engine):  # type: ignore[misc]
        def shutdown(self) -> None:
            """Called by `close`, and by SGLang when the interpreter exits."""
            watchdog = getattr(self.tokenizer_manager, "_subprocess_watchdog", None)
            if watchdog is not None:
                watchdog.stop()
            started = getattr(self, "_scheduler_init_result", None)
            _end(set(started.all_child_pids) if started is not None else set())

    return Contained


async def _ask(engine: Any, sequences: Sequence[list[int]]) -> Any:
    """What `Engine.encode` does; that one takes text only."""
    from sglang.srt.managers.io_struct import EmbeddingReqInput

    return await anext(engine.tokenizer_manager.generate_request(EmbeddingReqInput(input_ids=list(sequences)), None))


def _children() -> set[int | None]:
    """Those that run of the processes that this one has started through `multiprocessing`."""
    return {process.pid for process in multiprocessing.active_children()}


def _end(processes: set[int | None]) -> None:
    """Kill those processes of SGLang and what they have started, and wait until they are gone."""
    from sglang.srt.utils import kill_process_tree

    for process in multiprocessing.active_children():
        if process.pid in processes:
            kill_process_tree(process.pid)
            process.join()


def _connect(engine: EngineConfig) -> _Server:
    """A server that runs already, which must take sequences as long as we will send, whole."""
    assert engine.address is not None
    http = EngineHttp(engine.address, name="sglang")
    try:
        info, model = http.get("/server_info"), http.get("/model_info")
        if member(info, "allow_auto_truncate", "sglang's /server_info"):
            raise ConfigError(
                "engine.address: the SGLang there was started with --allow-auto-truncate and would cut long sequences "
                "in silence; start it without"
            )
        if member(model, "is_generation", "sglang's /model_info"):
            raise ConfigError(
                "engine.address: the SGLang there generates text; start it with --is-embedding, for a reward model"
            )
        longest = int(member(info, "max_req_input_len", "sglang's /server_info")) - 1
        if engine.max_tokens is not None and longest < engine.max_tokens:
            raise ConfigError(
                f"limits.max_tokens = {engine.max_tokens}: the SGLang at engine.address takes sequences of up to "
                f"{longest} tokens; lower the limit, or start that server with more --context-length"
            )
    except BaseException:
        http.close()
        raise
    return _Server(http)


def _start_server(arguments: Arguments, engine: EngineConfig) -> _Server:
    assert engine.python is not None
    installed("sglang", engine.python)
    address = free_address()
    host, port = address.split(":")
    http = EngineHttp(address, name="sglang")
    own = OwnServer.start(
        [engine.python, "-m", "sglang.launch_server", f"--host={host}", f"--port={port}", *as_switches(arguments)],
        name="sglang",
        is_ready=partial(http.answers, "/health"),
        timeout_s=engine.start_timeout_s,
        environment=environment_of(engine),
    )
    http.close()
    return _Server(EngineHttp(address, name="sglang", own=own))


def _refuse(engine: EngineConfig) -> None:
    if not engine.deterministic:
        return
    if engine.address is not None:
        raise ConfigError(
            "engine.deterministic: cannot be switched on in a server that runs already; start that server with "
            "--enable-deterministic-inference and leave engine.deterministic out"
        )
    if engine.device == "cpu":
        raise ConfigError("engine.deterministic: SGLang's deterministic mode is for GPUs; leave it out on a CPU")


@contextmanager
def _settings(environment: Mapping[str, str]) -> Iterator[None]:
    """`environment` in this process, for the processes that are started meanwhile; what SGLang changes of it and of
    `multiprocessing` is undone."""
    before, method = dict(os.environ), multiprocessing.get_start_method(allow_none=True)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        multiprocessing.set_start_method(method, force=True)


def _ignore_sigquit() -> None:
    """In C, for `signal.signal` works on the main thread only, where a Serve replica never is."""
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGQUIT, SIG_IGN)
