"""LMDeploy's engine against a server that speaks as lmdeploy 0.18.0 does: there is no GPU here for a real one."""

import json
import os
import sys
from functools import partial

import numpy as np
import psutil
import pytest

from polar_ray.engines import lmdeploy
from polar_ray.engines.build import build_engine
from polar_ray.engines.parity import check_parity
from polar_ray.engines.server import EngineHttp, OwnServer, free_address
from polar_ray.errors import ConfigError, EngineError, EngineProtocolError, EngineStartError, ProcessCrashed
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.planning import plan
from tests.support.engine_contract import draw, whole
from tests.support.lmdeploy_server import MAX_TOKENS, servers_below, settings, start_engine, write_interpreter
from tests.support.ranks import are_gone
from tests.support.reference import Reference
from tests.support.scripted_server import scripted_server


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    return write_interpreter(tmp_path_factory.mktemp("bin"))


@pytest.fixture(scope="module", params=["address", "python"])
def engine(request, interpreter):
    if request.param == "python":
        engine = lmdeploy.start(EMBEDDED_FOLDER, settings(python=interpreter))
        yield engine
        engine.close()
        return
    address = free_address()
    http = EngineHttp(address, name="lmdeploy")
    words = [f"--server-port={address.split(':')[1]}", "--backend=pytorch", f"--session-len={MAX_TOKENS}"]
    own = OwnServer.start(
        [interpreter, "-m", "lmdeploy", "serve", "api_server", str(EMBEDDED_FOLDER), "--server-name=127.0.0.1", *words],
        name="lmdeploy",
        is_ready=partial(http.answers, "/health"),
        timeout_s=120,
    )
    engine = build_engine(settings(address=address), EMBEDDED_FOLDER)
    yield engine
    engine.close()
    engine.close()
    http.close()
    own.close()


def test_rewards_are_the_raw_ones_of_the_weights(engine):
    sequences = draw([1, 40, 400, 41])
    (batch,) = plan(sequences, token_budget=10_000).batches
    rewards = engine.score(batch)
    assert rewards.dtype == np.float32
    assert np.abs(rewards - Reference(EMBEDDED_FOLDER).rewards(sequences).numpy()[batch.rows]).max() < 1e-4
    assert check_parity(engine, settings(address="any:1"), EMBEDDED_FOLDER).rms < 1e-4


def test_an_empty_batch_is_not_sent(engine):
    assert engine.score(whole()).shape == (0,)


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        ([9], "lmdeploy takes 2 or more"),
        ([1] * (MAX_TOKENS + 1), "is set up for 1000"),
        ([1, 4096], "outside the model's"),
    ],
)
def test_what_lmdeploy_would_fail_on_is_refused_by_name(engine, ids, why):
    with pytest.raises(EngineError, match=why):
        engine.score(whole(*draw([5]), np.array(ids, dtype=np.int32)))


def test_what_the_server_fails_on_is_an_error_without_rewards(engine):
    engine._max_tokens = 10_000
    try:
        with pytest.raises(EngineError, match="lmdeploy answered 500"):
            engine.score(whole(*draw([5, MAX_TOKENS])))
    finally:
        engine._max_tokens = MAX_TOKENS


def test_a_killed_server_is_said_and_leaves_nothing(interpreter):
    engine = start_engine(interpreter)
    served = engine._folder
    started = [process for process in psutil.Process().children(recursive=True) if str(served) in process.cmdline()]
    assert engine.is_running()
    (server,) = (process for process in servers_below(os.getpid()) if str(served) in process.cmdline())
    server.kill()
    with pytest.raises(ProcessCrashed, match="lmdeploy's server has ended"):
        engine.score(whole(*draw([5])))
    assert are_gone([server])
    assert not engine.is_running()
    engine.close()
    engine.close()
    assert not any(process.is_running() for process in started)
    assert not served.exists()
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.score(whole(*draw([5])))


def test_the_served_folder_runs_no_code_and_has_the_plain_base(tmp_path):
    made = lmdeploy.serving_folder(EMBEDDED_FOLDER, "hf")
    config = json.loads((made / "config.json").read_text())
    assert config["rope_theta"] == 1000000
    assert "rope_scaling" not in config
    assert "auto_map" not in config
    assert Checkpoint.open(made).stored.keys() == Checkpoint.open(EMBEDDED_FOLDER).stored.keys()
    assert not list(made.glob("*.py")) + list(made.glob("tokenizer.model"))
    static = json.loads((lmdeploy.serving_folder(EMBEDDED_FOLDER, "sglang-static") / "config.json").read_text())
    assert static["rope_theta"] == pytest.approx(1000000 * 3 ** (32 / 30))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"python": "p", "device": "cpu"}, "engine.device"),
        ({"python": "p", "dtype": "float32"}, "engine.dtype"),
        ({"address": "h:1", "deterministic": True}, "engine.deterministic"),
        ({"python": "p", "arguments": {"enable_prefix_caching": True}}, "engine.arguments.enable_prefix_caching"),
        ({"python": "p", "arguments": {"session_len": 10}}, "engine.arguments.session_len"),
        ({}, "engine.python"),
    ],
)
def test_settings_that_it_cannot_keep_are_refused(changes, field, monkeypatch):
    monkeypatch.setattr("polar_ray.engines.lmdeploy.installed", lambda *_: "lmdeploy 0.18.0")
    with pytest.raises(ConfigError, match=field):
        lmdeploy.start(EMBEDDED_FOLDER, settings(**changes))


def test_an_interpreter_without_it_is_an_error():
    with pytest.raises(EngineStartError, match=r"has no lmdeploy .*install polar_ray\[lmdeploy\] there"):
        lmdeploy.start(EMBEDDED_FOLDER, settings(python=sys.executable))


def row(index, data):
    return {"index": index, "object": "pooling", "data": data}


@pytest.mark.parametrize(
    "reply",
    [
        [],
        {"data": None},
        {"data": [row(0, -1.5)]},
        {"data": [row(0, -1.5), row(0, 2.0)]},
        {"data": [row(0, -1.5), row(2, 2.0)]},
        {"data": [row(0, -1.5), row(1, 2.0), row(2, 2.0)]},
        {"data": [row(0, -1.5), row(1, [[2.0], [3.0]])]},
        {"data": [row(0, -1.5), row(1, None)]},
        {"error": "no"},
    ],
)
def test_a_reply_without_one_number_for_each_sequence_is_refused(reply):
    with pytest.raises(EngineProtocolError):
        lmdeploy.read_reply(reply, 2)


def test_rewards_are_in_the_order_of_the_request():
    assert lmdeploy.read_reply({"data": [row(1, 2), row(0, -1.5)]}, 2) == [-1.5, 2.0]


def test_ids_are_sent_and_nothing_else():
    models = (200, {}, json.dumps({"data": []}).encode())
    reply = (200, {}, json.dumps({"data": [row(0, -1.5)]}).encode())
    with scripted_server(models, reply) as script:
        engine = lmdeploy.start(EMBEDDED_FOLDER, settings(address=script.address))
        assert engine.score(whole(np.array([1, 7, 9], dtype=np.int32))).tolist() == [-1.5]
        engine.close()
    assert script.paths == ["/v1/models", "/pooling"]
    assert script.bodies[-1] == {"input": [[1, 7, 9]]}
