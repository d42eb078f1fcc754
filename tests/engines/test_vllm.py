"""A real vLLM, its CPU build: the suite of promises on each road to it, and the traps that stand on them.

`make engines-vllm` makes its environment and runs this; elsewhere it skips.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys

import httpx
import numpy as np
import psutil
import pytest

from polar_ray.config import EngineConfig
from polar_ray.engines import vllm
from polar_ray.engines.build import build_engine, resolve_engine
from polar_ray.engines.server import OwnServer, free_address
from polar_ray.errors import EngineError, EngineStartError, EngineUnavailable, ProcessCrashed
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.model.llama import llama_form
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.model.reference import reference_rewards
from polar_ray.planning import plan
from tests.support.engine_contract import Claims, draw, whole

pytestmark = [
    pytest.mark.engine_vllm,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; make engines-vllm"),
]

LONGEST = 2048
EAGER = {"enforce_eager": True}
"""Without it vLLM compiles for a minute."""

TOLERANCE = 1e-4


def resolve(**changes):
    engine = EngineConfig(kind="vllm", **{"device": "cpu", "dtype": "float32", **changes})
    return resolve_engine(engine, EMBEDDED_FOLDER, has_gpu=False, max_tokens=LONGEST)


def build(**changes):
    """Through the door that every caller takes, parity gate and all."""
    return build_engine(resolve(**changes), EMBEDDED_FOLDER)


def expected(sequences, rope_base="hf"):
    return reference_rewards(Checkpoint.open(EMBEDDED_FOLDER), sequences, rope_base=rope_base)


def running_children():
    """Of this process, however far down; a zombie runs no more."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def gone_within(processes, seconds):
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def running(kept):
    """The address of a server that somebody has started who has not heard of activations."""
    address, words, engine = free_address(), vllm._write_tokenizer(), resolve(arguments=EAGER)
    form, config = llama_form(EMBEDDED_FOLDER), Checkpoint.open(EMBEDDED_FOLDER).config
    arguments = vllm.engine_arguments(form, words, engine, config)
    del arguments["pooler_config"]
    host, port = address.split(":")
    server = OwnServer.start(
        [sys.executable, "-m", vllm.SERVER, *vllm.as_flags({"host": host, "port": port} | arguments)],
        name="vllm",
        is_ready=lambda: answers(address),
        timeout_s=600,
        environment=vllm.environment_of(engine),
    )
    yield address
    server.close()


def answers(address):
    try:
        return httpx.get(f"http://{address}/health").is_success
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module", params=["in-process", "own-server", "address"])
def connect(request, kept):
    """Makes an engine by one of the three roads."""
    if request.param == "address":
        address = request.getfixturevalue("running")
        return lambda: build(address=address)
    if request.param == "own-server":
        return lambda: build(arguments=EAGER, python=sys.executable)
    return lambda: build(arguments=EAGER)


@pytest.fixture(scope="module")
def claims():
    return Claims(TOLERANCE, same_bits=False)


@pytest.fixture(scope="module")
def own(kept):
    """An engine with a server of its own, and the address of that server."""
    address = free_address()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "free_address", lambda: address)
        engine = build(arguments=EAGER, python=sys.executable)
    yield engine, f"http://{address}"
    engine.close()


def test_rewards_are_the_raw_ones(engine):
    sequences = draw([3, 90, 33, 34, 700])
    rewards = engine.score(whole(*sequences))
    assert np.abs(rewards - expected(sequences)).max() <= TOLERANCE
    assert ((rewards < 0) | (rewards > 1)).any()


def test_what_it_does_not_take_is_an_error_and_the_next_batch_is_well(engine):
    good = draw([3, 90])
    for bad, message in ((np.full(LONGEST + 1, 9), str(LONGEST)), (np.array([1, 4096]), "vocabulary")):
        with pytest.raises(EngineError, match=message) as caught:
            engine.score(whole(good[0], bad.astype(np.int32), good[1]))
        assert not isinstance(caught.value, EngineUnavailable)
    assert np.abs(engine.score(whole(*good)) - expected(good)).max() <= TOLERANCE


def test_the_longest_sequence_is_taken_whole(engine):
    (longest,) = draw([LONGEST - 40])
    assert len(longest) == LONGEST
    assert np.abs(engine.score(whole(longest)) - expected([longest])).max() <= TOLERANCE


def test_a_server_that_activates_by_default_gives_raw_rewards(running):
    sequences = draw([3, 90])
    reply = httpx.post(f"http://{running}/pooling", json={"input": [ids.tolist() for ids in sequences]}, timeout=60)
    activated = vllm.read_reply(reply.json(), 2)
    engine = build(address=running)
    rewards = engine.score(whole(*sequences))
    engine.close()
    assert np.abs(np.array(activated) - 1 / (1 + np.exp(-rewards.astype(np.float64)))).max() < 1e-4
    assert np.abs(rewards - expected(sequences)).max() <= TOLERANCE


def test_one_number_comes_back_for_a_long_sequence(own):
    body = {"input": [ids.tolist() for ids in draw([1000])], "use_activation": False}
    reply = httpx.post(f"{own[1]}/pooling", json=body, timeout=60)
    assert [len(row["data"]) for row in reply.json()["data"]] == [1]
    assert len(reply.content) < 500


@pytest.mark.parametrize("route", ["/pooling", "/classify"])
def test_text_gets_no_reward(own, route):
    """Its tokens would be those of another tokenizer, the final one split into pieces."""
    text = "What is the capital of China?\nBeijing.<|reward|>What is the capital of China?\nShanghai.[UNUSED_TOKEN_130]"
    reply = httpx.post(f"{own[1]}{route}", json={"input": [text], "use_activation": False}, timeout=60)
    assert reply.status_code >= 400
    assert "data" not in reply.json()


def test_siblings_find_their_prefix_in_the_cache(own):
    engine, url = own
    sequences = [np.concatenate([draw([300], seed=7)[0], ids]) for ids in draw([20, 30, 40, 50], seed=8)]
    (batch,) = plan(sequences, token_budget=10_000).batches
    before = hits(url)
    engine.score(batch)
    shared = batch.tokens - batch.computed_tokens
    assert hits(url) - before > 0.85 * shared  # whole blocks of 32 are found


def hits(url):
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))


def test_a_killed_server_is_an_error_and_leaves_nothing(own):
    engine, url = own
    port = f"--port={url.rpartition(':')[2]}"
    _guard, server = [child for child in running_children() if port in child.cmdline()]
    below = [server, *server.children(recursive=True)]
    assert len(below) >= 3  # its core and its worker
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(ProcessCrashed, match="vllm's server has ended"):
        engine.score(whole(*draw([5])))
    assert gone_within(below, 20)
    assert not engine.is_running()
    with pytest.raises(ProcessCrashed, match="a new process starts it again"):
        engine.score(whole(*draw([5])))
    engine.close()


HOLDER = """
import json, sys
from tests.engines.test_vllm import build, EAGER
from tests.support.engine_contract import draw, whole
engine = build(arguments=EAGER, tensor_parallel_size=2, rope_base="sglang-static")
print(json.dumps(engine.score(whole(*draw([3, 90, 33]))).tolist()), flush=True)
sys.stdin.read()
"""


def test_ranks_give_the_same_rewards_and_end_with_whoever_holds_them(kept):
    """Here with the rotary base of the model card, which is another set of rewards."""
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        line = holder.stdout.readline()
        below = psutil.Process(holder.pid).children(recursive=True)
        os.kill(holder.pid, signal.SIGKILL)
    sequences = draw([3, 90, 33])
    rewards = np.array(json.loads(line))
    assert np.abs(rewards - expected(sequences, "sglang-static")).max() <= TOLERANCE
    assert np.abs(rewards - expected(sequences)).max() > 10 * TOLERANCE
    assert len(below) >= 5  # the guard, the server, its core and two workers
    assert gone_within(below, 20)


def test_settings_that_vllm_refuses_are_said_with_its_words():
    before = running_children()
    with pytest.raises(EngineStartError, match="no_such_argument"):
        build(arguments={"no_such_argument": 1})
    with pytest.raises(EngineStartError, match="no-such-argument"):
        build(arguments={"no_such_argument": 1}, python=sys.executable)
    assert gone_within([child for child in running_children() if child not in before], 10)


def test_the_engine_in_process_is_in_this_process_and_alone():
    before, environment = running_children(), dict(os.environ)
    engine = build(arguments=EAGER)
    with pytest.raises(EngineStartError, match="there is a vLLM in this process already"):
        build(arguments=EAGER)
    assert [child for child in running_children() if child not in before] == []
    assert engine.score(whole(*draw([5]))).shape == (1,)
    engine.close()
    assert dict(os.environ) == environment


from tests.support.engine_contract import *  # noqa: E402, F403 - last: its last closes the engine
