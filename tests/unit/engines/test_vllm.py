"""vLLM without vLLM: what it is told, what its replies are read as, and what is refused before it starts."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from polar_ray.config import EngineConfig
from polar_ray.engines import vllm
from polar_ray.engines.build import resolve_engine
from polar_ray.errors import ConfigError, EngineError, EngineProtocolError, EngineStartError, EngineUnavailable
from polar_ray.model.architecture import CheckpointConfig
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.planning import Batch, plan
from tests.support.engine_contract import draw, whole
from tests.support.scripted_server import scripted_server

GOLDENS = Path(__file__).parents[2] / "goldens" / "engines"
REPLIES = sorted(GOLDENS.glob("vllm_*.json"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def settings(**changes):
    engine = EngineConfig(kind="vllm", **{"device": "cpu", "dtype": "float32", **changes})
    return resolve_engine(engine, EMBEDDED_FOLDER, has_gpu=False, max_tokens=2048)


def arguments_of(engine):
    config = CheckpointConfig.from_json((EMBEDDED_FOLDER / "config.json").read_text())
    return vllm.engine_arguments(Path("form"), Path("words"), engine, config)


def rows(*values):
    return {"data": [{"index": index, "object": "pooling", "data": value} for index, value in enumerate(values)]}


def answer(content):
    return 200, {}, json.dumps(content).encode()


MODELS = answer({"object": "list", "data": [{"id": "m", "max_model_len": 2048}]})


@pytest.mark.parametrize("file", REPLIES, ids=lambda file: file.stem)
def test_recorded_replies_are_read_as_one_reward_per_sequence(file):
    golden = json.loads(file.read_text())
    assert vllm.read_reply(golden["reply"], len(golden["rewards"])) == golden["rewards"]


def test_rewards_are_put_where_their_index_says():
    reply = rows([1.5], [2.5], [3.5])
    reply["data"].reverse()
    assert vllm.read_reply(reply, 3) == [1.5, 2.5, 3.5]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ([], "no data in vllm's reply"),
        ({"data": "x"}, "no data in vllm's reply"),
        (rows([1.0]), "expected 2 rewards, one per sequence, found 1 rows"),
        (rows([1.0], [1.0], [1.0]), "expected 2 rewards, one per sequence, found 3 rows"),
        ({"data": [*rows([1.0])["data"], *rows([1.0])["data"]]}, "expected 2 rewards"),
        (rows([1.0], [0.1, 0.9]), "gave 2 numbers for a sequence"),
        (rows([1.0], []), "gave 0 numbers for a sequence"),
        (rows([1.0], [[0.1, 0.9]]), "gave 2 numbers for a sequence"),
        (rows([1.0], [None]), "gave 1 numbers for a sequence"),
        ({"data": [{"index": 0, "probs": [0.5]}, {"index": 1}]}, "no data in a row of vllm's reply"),
    ],
)
def test_a_reply_that_is_not_one_reward_per_sequence_is_a_protocol_error(reply, message):
    with pytest.raises(EngineProtocolError, match=message):
        vllm.read_reply(reply, 2)


def test_a_running_server_is_sent_ids_and_told_not_to_activate():
    sequences = draw([5, 9])
    with scripted_server(MODELS, answer(rows([-3.25], [0.5]))) as script:
        engine = vllm.start(EMBEDDED_FOLDER, settings(address=script.address))
        rewards = engine.score(whole(*sequences))
        engine.close()
    assert rewards.dtype == np.float32
    assert rewards.tolist() == [-3.25, 0.5]
    assert script.paths == ["/v1/models", "/pooling"]
    assert script.bodies[1] == {"input": [ids.tolist() for ids in sequences], "use_activation": False}
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.score(whole(*sequences))


def test_siblings_are_sent_one_after_the_other():
    """The prefix cache finds what is still in it."""
    sequences = [ids for pair in zip(draw([5, 9, 7]), draw([5, 9, 7], seed=1), strict=True) for ids in pair]
    (batch,) = plan(sequences, token_budget=10_000).batches
    with scripted_server(MODELS, answer(rows(*([0.0] for _ in sequences)))) as script:
        vllm.start(EMBEDDED_FOLDER, settings(address=script.address)).score(batch)
    beginnings = [tuple(ids[:30]) for ids in script.bodies[1]["input"]]
    assert beginnings in ([a] * 3 + [b] * 3 for a in set(beginnings) for b in set(beginnings) - {a})


def test_nothing_is_asked_for_an_empty_batch():
    with scripted_server(MODELS) as script:
        assert vllm.start(EMBEDDED_FOLDER, settings(address=script.address)).score(Batch(())).shape == (0,)
    assert script.paths == ["/v1/models"]


def test_a_running_server_that_takes_shorter_sequences_is_refused():
    short = answer({"data": [{"id": "m", "max_model_len": 2047}]})
    with (
        scripted_server(short) as script,
        pytest.raises(ConfigError, match=r"limits\.max_tokens = 2048: .* up to 2047 tokens"),
    ):
        vllm.start(EMBEDDED_FOLDER, settings(address=script.address))


def test_another_kind_of_server_is_told_apart():
    with scripted_server(answer({"hello": "world"})) as script, pytest.raises(EngineProtocolError, match="/v1/models"):
        vllm.start(EMBEDDED_FOLDER, settings(address=script.address))


def test_a_running_server_that_is_away_is_unavailable(monkeypatch):
    monkeypatch.setattr("polar_ray.engines.server.RUNNING_DEADLINE_S", 0.3)
    with scripted_server(MODELS, "cut") as script:
        engine = vllm.start(EMBEDDED_FOLDER, settings(address=script.address))
        with pytest.raises(EngineUnavailable, match="does not answer"):
            engine.score(whole(*draw([5])))


def test_its_version_is_asked_of_a_running_server():
    with scripted_server(answer({"version": "0.33.0"})) as script:
        assert vllm.engine_version(settings(address=script.address)) == "vllm 0.33.0"


def test_the_command_line_asks_for_raw_rewards_of_the_last_token():
    flags = list(vllm.as_flags(arguments_of(settings(arguments={"enforce_eager": True, "max_num_seqs": 64}))))
    assert flags[:5] == ["--model=form", "--tokenizer=words", "--runner=pooling", "--convert=classify", flags[4]]
    assert json.loads(flags[4].removeprefix("--pooler-config=")) == {"pooling_type": "LAST", "use_activation": False}
    assert {"--dtype=float32", "--max-model-len=2048", "--enable-prefix-caching", "--block-size=32"} <= set(flags)
    assert {"--enforce-eager", "--max-num-seqs=64", "--tensor-parallel-size=1"} <= set(flags)
    assert not [flag for flag in flags if flag.startswith(("--task", "--trust-remote-code", "--override-pooler"))]


def test_settings_become_arguments():
    unshared = arguments_of(settings(share_prefixes=False, tensor_parallel_size=2, dtype="bfloat16"))
    assert "--no-enable-prefix-caching" in vllm.as_flags(unshared)
    assert (unshared["tensor_parallel_size"], unshared["dtype"]) == (2, "bfloat16")
    on_gpu = arguments_of(settings(device="cuda"))
    assert "kv_cache_memory_bytes" not in on_gpu
    assert "block_size" not in on_gpu


def test_the_cache_of_a_cpu_holds_two_calls_and_the_longest_sequence():
    """4 layers of 10 heads of 32 numbers, keys and values, in float32."""
    token = 2 * 4 * 10 * 32 * 4
    assert arguments_of(settings(token_budget=5000))["kv_cache_memory_bytes"] == token * (10_000 + 32)
    assert arguments_of(settings(token_budget=500))["kv_cache_memory_bytes"] == token * (2048 + 32)
    assert arguments_of(settings(token_budget=500, tensor_parallel_size=2))["kv_cache_memory_bytes"] == token * 1040
    given = settings(arguments={"kv_cache_memory_bytes": 1 << 30})
    assert arguments_of(given)["kv_cache_memory_bytes"] == 1 << 30


@pytest.mark.parametrize(
    "name", ["pooler_config", "trust_remote_code", "max_model_len", "host", "task", "dtype", "skip_tokenizer_init"]
)
def test_arguments_that_decide_the_reward_are_refused(name):
    with pytest.raises(ConfigError, match=rf"engine\.arguments\.{name}: "):
        arguments_of(settings(arguments={name: True}))


def test_its_environment_keeps_to_the_threads_and_reports_nothing():
    values = vllm.environment_of(settings(threads=6, tensor_parallel_size=2))
    assert (values["OMP_NUM_THREADS"], values["VLLM_CPU_OMP_THREADS_BIND"]) == ("3", "nobind")
    assert (values["VLLM_NO_USAGE_STATS"], values["HF_HUB_OFFLINE"]) == ("1", "1")
    assert "VLLM_BATCH_INVARIANT" not in values
    on_gpu = vllm.environment_of(settings(device="cuda", deterministic=True))
    assert on_gpu["VLLM_BATCH_INVARIANT"] == "1"
    assert "OMP_NUM_THREADS" not in on_gpu


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, "for GPUs and changes nothing on a CPU"), ({"address": "127.0.0.1:1"}, "VLLM_BATCH_INVARIANT=1")],
)
def test_its_deterministic_mode_is_not_promised_where_it_does_nothing(changes, message):
    with pytest.raises(ConfigError, match=message):
        vllm.start(EMBEDDED_FOLDER, settings(deterministic=True, **changes))


def test_an_interpreter_without_vllm_is_named():
    if vllm_is_here():
        pytest.skip("vLLM is installed here")
    for engine in (settings(python=sys.executable), settings(tensor_parallel_size=2), settings()):
        with pytest.raises(EngineStartError, match=r"install polar_ray\[vllm\]"):
            vllm.start(EMBEDDED_FOLDER, engine)
    with pytest.raises(EngineStartError, match=r"engine\.python = '/nowhere/python': does not run"):
        vllm.engine_version(settings(python="/nowhere/python"))


def test_a_start_that_fails_leaves_the_process_as_it_was():
    if vllm_is_here():
        pytest.skip("vLLM is installed here")
    before, threads = dict(os.environ), torch.get_num_threads()
    with pytest.raises(EngineStartError):
        vllm.start(EMBEDDED_FOLDER, settings())
    assert dict(os.environ) == before
    assert torch.get_num_threads() == threads


def vllm_is_here():
    return importlib.util.find_spec("vllm") is not None
