"""A real SGLang on this machine's CPU: the engine's contract on every road, and a test for each known way of going
wrong.

Run by `make engines-sglang` in an environment of its own; skipped where SGLang is absent.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest

from polar_ray.config import EngineConfig
from polar_ray.engines import sglang
from polar_ray.engines.build import build_engine, resolve_engine
from polar_ray.engines.parity import check_parity
from polar_ray.engines.server import EngineHttp, OwnServer, free_address
from polar_ray.errors import ConfigError, EngineError, EngineProtocolError, EngineStartError
from polar_ray.model.llama import llama_form
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.planning import plan
from tests.support.engine_contract import Claims, draw, whole
from tests.support.reference import Reference

pytestmark = [
    pytest.mark.engine_sglang,
    pytest.mark.skipif(find_spec("sglang") is None, reason="SGLang is not installed; see make engines-sglang"),
    pytest.mark.filterwarnings("ignore"),  # of SGLang, about kernels that a CPU has not
    pytest.mark.timeout(600),
]

MAX_TOKENS = 5000
"""More than SGLang computes of a sequence at a time on a CPU, so that one is computed in two parts."""


def settings(**changes):
    config = EngineConfig(kind="sglang", device="cpu", **changes)
    return resolve_engine(config, EMBEDDED_FOLDER, has_gpu=False, max_tokens=MAX_TOKENS)


@contextmanager
def running(*flags):
    """A server that somebody else has started, with a context that we did not choose."""
    address = free_address()
    http = EngineHttp(address, name="sglang")
    own = OwnServer.start(
        [
            *(sys.executable, "-m", "sglang.launch_server", f"--model-path={llama_form(EMBEDDED_FOLDER)}"),
            *("--is-embedding", "--device=cpu", "--dtype=float32", "--skip-tokenizer-init", "--sleep-on-idle"),
            *("--host=127.0.0.1", f"--port={address.split(':')[1]}", "--max-total-tokens=40000", *flags),
        ],
        name="sglang",
        is_ready=partial(http.answers, "/health"),
        timeout_s=300,
        environment={"SGLANG_USE_CPU_ENGINE": "1"},
    )
    try:
        yield address
    finally:
        http.close()
        own.close()


@pytest.fixture(scope="module")
def server():
    with running("--enable-metrics") as address:
        yield address


@pytest.fixture(scope="module", params=["in-process", "own-server", "address"])
def road(request):
    if request.param == "address":
        return {"address": request.getfixturevalue("server")}
    return {"python": sys.executable} if request.param == "own-server" else {}


@pytest.fixture(scope="module")
def claims():
    return Claims(1e-4, same_bits=False)


@pytest.fixture(scope="module")
def connect(road):
    """Makes an engine that has passed the parity gate."""
    return partial(build_engine, settings(**road), EMBEDDED_FOLDER)


def descendants():
    import psutil

    return {
        process
        for process in psutil.Process().children(recursive=True)
        if "resource_tracker" not in str(process.cmdline())
    }


def gone_within(processes, seconds):
    import psutil

    return not psutil.wait_procs(list(processes), timeout=seconds)[1]


def reference(sequences):
    return Reference(EMBEDDED_FOLDER).rewards(sequences).numpy()


def test_rewards_are_the_raw_ones_of_the_weights(engine):
    sequences = draw([1, 40, 400, 41, MAX_TOKENS - 40])
    planned = plan(sequences, token_budget=engine.token_budget)
    rewards = np.concatenate([engine.score(batch) for batch in planned.batches])
    rows = np.concatenate([batch.rows for batch in planned.batches])
    assert np.abs(rewards - reference(sequences)[rows]).max() < 1e-4


def test_a_sequence_that_is_too_long_is_refused_and_harms_no_other(engine):
    short, longer = draw([5, MAX_TOKENS - 39])
    with pytest.raises(EngineError, match=rf"a sequence of {MAX_TOKENS + 1} tokens, where the engine is set up for"):
        engine.score(whole(short, longer))
    assert np.isfinite(engine.score(whole(short))).all()


def test_an_id_that_the_model_does_not_have_is_refused_and_harms_no_other(engine):
    with pytest.raises(EngineError, match="outside the model's vocabulary of 4096"):
        engine.score(whole(np.array([1, 4096], dtype=np.int32)))
    assert np.isfinite(engine.score(whole(*draw([5])))).all()


def test_text_is_not_scored(server):
    http = EngineHttp(server, name="sglang")
    with pytest.raises(EngineError, match="sglang answered 400"):
        http.post("/classify", {"text": "What is the capital of France?"})
    http.close()


def test_the_openai_route_would_take_a_softmax(server):
    (ids,) = draw([20])
    http = EngineHttp(server, name="sglang")
    reply = http.post("/v1/classify", {"model": "any", "input": ids.tolist()})
    assert reply["data"][0]["probs"] == [1.0]
    assert http.post(sglang.ROUTE, {"input_ids": [ids.tolist()]})[0]["embedding"] != [1.0]
    http.close()


def cached_tokens(address):
    import httpx

    lines = httpx.get(f"http://{address}/metrics", timeout=30).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("sglang:cached_tokens_total"))


def test_siblings_share_what_their_group_has_in_common(server):
    engine = build_engine(settings(address=server), EMBEDDED_FOLDER)
    random = np.random.default_rng(int(time.time()))  # nothing that the cache has seen
    shared = random.integers(200, 4000, 300, dtype=np.int32)
    (batch,) = plan(
        [np.concatenate([shared, random.integers(200, 4000, 50, dtype=np.int32)]) for _ in range(4)],
        token_budget=10_000,
    ).batches
    before = cached_tokens(server)
    engine.score(batch)
    assert cached_tokens(server) - before >= 3 * 300
    engine.close()


@pytest.fixture(scope="module")
def careless():
    """A server that cuts in silence and has InternLM2's rope, which SGLang computes for another length."""
    rope = '{"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}'
    with running("--allow-auto-truncate", "--context-length=1000", f"--json-model-override-args={rope}") as address:
        yield address


def test_a_server_that_would_cut_in_silence_is_refused(careless):
    with pytest.raises(ConfigError, match="allow-auto-truncate"):
        build_engine(settings(address=careless), EMBEDDED_FOLDER)


def unguarded(address):
    """The engine without the questions that a server is asked first."""
    road = sglang._Server(EngineHttp(address, name="sglang"))
    return sglang.SglangEngine(road, vocab_size=4096, max_tokens=MAX_TOKENS, token_budget=10_000)


def test_a_sequence_that_was_cut_gets_no_reward(careless):
    engine = unguarded(careless)
    with pytest.raises(EngineProtocolError, match=r"read \d+ tokens of a sequence of 1200: it cuts in silence"):
        engine.score(whole(*draw([1160])))
    engine.close()


def test_another_rotary_base_is_found_and_named(careless):
    engine = unguarded(careless)
    with pytest.raises(EngineStartError, match=r"those of engine\.rope_base = 'sglang-static'"):
        check_parity(engine, settings(address=careless), EMBEDDED_FOLDER)
    check_parity(engine, settings(address=careless, rope_base="sglang-static"), EMBEDDED_FOLDER)
    engine.close()


@pytest.mark.parametrize("road", ["in-process", "own-server"])
def test_an_engine_whose_process_is_killed_says_so_and_leaves_nothing(road):
    before = descendants()
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    environment, terminate = dict(os.environ), signal.getsignal(signal.SIGTERM)
    engine = build_engine(settings(**({"python": sys.executable} if road == "own-server" else {})), EMBEDDED_FOLDER)
    started = descendants() - before
    scheduler = next(process for process in started if process.name().startswith("sglang::schedul"))
    scheduler.kill()
    began = time.monotonic()
    with pytest.raises(EngineError):
        engine.score(whole(*draw([5])))
    assert time.monotonic() - began < 30
    engine.close()
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    assert gone_within(started, 5)
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM)) == (environment, terminate)


def test_an_engine_in_a_process_that_is_killed_ends_with_it():
    code = (
        "from polar_ray.engines import sglang; from polar_ray.model.locate import EMBEDDED_FOLDER;"
        "from tests.engines.test_sglang import settings, descendants;"
        "engine = sglang.start(EMBEDDED_FOLDER, settings());"
        "print(*[process.pid for process in descendants()], flush=True); input()"
    )
    import psutil

    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        started = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(started) >= 2
        parent.kill()
    assert gone_within(started, 15)


def test_weights_that_do_not_load_are_an_error_and_leave_nothing(tmp_path):
    before = descendants()
    with pytest.raises(EngineStartError, match="SGLang does not start"):
        sglang._InProcess({"model_path": str(tmp_path), "device": "cpu"}, settings())
    assert not descendants() - before


# The suite comes after the tests above that use its engine: its last one closes it.
from tests.support.engine_contract import *  # noqa: E402, F403
