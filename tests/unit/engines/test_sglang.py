"""What SGLang is told and how its answers are read; a real one is run by `make engines-sglang`."""

import json
import sys

import numpy as np
import pytest

from polar_ray.config import EngineConfig
from polar_ray.engines import sglang
from polar_ray.engines.build import resolve_engine
from polar_ray.engines.outside import as_switches
from polar_ray.errors import ConfigError, EngineError, EngineProtocolError, EngineStartError
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.planning import Batch, Node
from tests.support.engine_contract import whole
from tests.support.scripted_server import scripted_server

INFO = {"version": "0.5.23", "allow_auto_truncate": False, "max_req_input_len": 16385}
MODEL = {"is_generation": False, "architectures": ["LlamaForSequenceClassification"]}


def settings(**changes):
    return resolve_engine(EngineConfig(kind="sglang", **changes), EMBEDDED_FOLDER, has_gpu=False, max_tokens=16384)


def arguments(**changes):
    return sglang.engine_arguments(EMBEDDED_FOLDER, settings(**changes), Checkpoint.open(EMBEDDED_FOLDER).config)


def ids(*values):
    return np.array(values, dtype=np.int32)


def row(value, tokens):
    return {"embedding": [value], "meta_info": {"prompt_tokens": tokens}}


def answer(value):
    return 200, {}, json.dumps(value).encode()


def test_nothing_is_cut_and_no_text_is_taken():
    ours = arguments()
    assert ours["context_length"] > 16384
    assert json.loads(ours["json_model_override_args"])["max_position_embeddings"] == ours["context_length"]
    assert ours["skip_tokenizer_init"]
    assert "allow_auto_truncate" not in ours
    assert "trust_remote_code" not in ours


def test_the_cache_of_a_cpu_holds_two_calls_and_the_longest_sequence():
    assert arguments(token_budget=100_000)["max_total_tokens"] > 200_000
    assert arguments(token_budget=1)["max_total_tokens"] > arguments()["context_length"]
    assert "max_total_tokens" not in arguments(device="cuda")


def test_settings_reach_sglang():
    ours = arguments(
        device="cuda", dtype="float16", tensor_parallel_size=4, share_prefixes=False, deterministic=True,
        arguments={"mem_fraction_static": 0.5, "sleep_on_idle": False},
    )  # fmt: skip
    assert ours["dtype"] == "float16"
    assert ours["tp_size"] == 4
    assert ours["disable_radix_cache"]
    assert ours["enable_deterministic_inference"]
    words = list(as_switches(ours))
    assert "--mem-fraction-static=0.5" in words
    assert "--disable-radix-cache" in words
    assert "--is-embedding" in words
    assert not [word for word in words if "sleep-on-idle" in word]


@pytest.mark.parametrize(
    "name", ["allow_auto_truncate", "context_length", "is_embedding", "trust_remote_code", "dtype"]
)
def test_arguments_that_decide_the_reward_are_refused(name):
    with pytest.raises(ConfigError, match=rf"engine\.arguments\.{name}: decides"):
        arguments(arguments={name: True})


@pytest.mark.parametrize(("changes", "why"), [({}, "for GPUs"), ({"address": "h:1"}, "that runs already")])
def test_a_deterministic_mode_that_would_not_be_is_refused(changes, why):
    with pytest.raises(ConfigError, match=rf"engine\.deterministic: .*{why}"):
        sglang.start(EMBEDDED_FOLDER, settings(device="cpu", deterministic=True, **changes))


@pytest.mark.parametrize("python", [sys.executable, "/nothing/python"])
def test_an_interpreter_without_it_is_an_error(python):
    with pytest.raises(EngineStartError, match=r"engine\.python = .*(has no sglang|does not run)"):
        sglang.start(EMBEDDED_FOLDER, settings(python=python))


def test_the_first_of_each_group_goes_before_its_siblings():
    batch = Batch(
        (
            *(Node(ids(5, 6)), Node(ids(1), 0, 0), Node(ids(2), 0, 1), Node(ids(3), 0, 2)),
            Node(ids(9), None, 3),
            *(Node(ids(7)), Node(ids(1), 5, 4), Node(ids(8), 5), Node(ids(1), 7, 5), Node(ids(2), 7, 6)),
        )
    )
    assert sglang.in_turns(batch) == [[0, 3, 4], [1, 2, 5], [6]]
    assert sglang.in_turns(whole(ids(1), ids(2))) == [[0, 1]]
    assert sglang.in_turns(Batch(())) == []


def test_rewards_are_put_back_in_the_batch_s_order():
    class Road:
        def rows(self, sequences):
            return [row(sum(sequence), len(sequence)) for sequence in sequences]

        def close(self):
            pass

    engine = sglang.SglangEngine(Road(), vocab_size=100, max_tokens=10, token_budget=10)
    batch = Batch((Node(ids(5, 6)), Node(ids(1), 0, 0), Node(ids(2), 0, 1), Node(ids(9), None, 2)))
    assert engine.score(batch).tolist() == [12, 13, 9]
    engine.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.score(batch)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([row(-1.5, 3)], "expected 2 rewards, one per sequence, found 1 rows"),
        ({"object": "list", "data": []}, "found a dict"),
        ([row(-1.5, 3), {"embedding": [0.1, 0.2], "meta_info": {"prompt_tokens": 2}}], "gave 2 numbers"),
        ([row(-1.5, 3), {"embedding": [None], "meta_info": {"prompt_tokens": 2}}], "gave 1 numbers"),
        ([row(-1.5, 3), row(-1.5, 1)], "read 1 tokens of a sequence of 2: it cuts in silence"),
        ([row(-1.5, 3), {"embedding": [1.0]}], "no meta_info"),
        ([row(-1.5, 3), {"text": "well"}], "no embedding"),
    ],
)
def test_a_reply_without_one_whole_reward_for_each_sequence_is_refused(rows, why):
    with pytest.raises(EngineProtocolError, match=why):
        sglang.read_rows(rows, [[1, 2, 3], [4, 5]])


@pytest.mark.parametrize(
    ("info", "model", "why"),
    [
        ({**INFO, "allow_auto_truncate": True}, MODEL, "would cut long sequences in silence"),
        ({**INFO, "max_req_input_len": 16384}, MODEL, r"limits\.max_tokens = 16384: .* up to 16383 tokens"),
        (INFO, {"is_generation": True}, "--is-embedding"),
    ],
)
def test_a_running_server_that_will_not_do_is_refused(info, model, why):
    with scripted_server(answer(info), answer(model)) as script, pytest.raises(ConfigError, match=why):
        sglang.start(EMBEDDED_FOLDER, settings(address=script.address))


def test_a_running_server_of_another_kind_is_refused():
    with (
        scripted_server(answer({"object": "list"})) as script,
        pytest.raises(EngineProtocolError, match="another kind"),
    ):
        sglang.start(EMBEDDED_FOLDER, settings(address=script.address))


def test_a_running_server_is_sent_ids_and_nothing_else():
    with scripted_server(answer(INFO), answer(MODEL), answer([row(-1.5, 3)])) as script:
        engine = sglang.start(EMBEDDED_FOLDER, settings(address=script.address))
        assert engine.score(whole(ids(1, 7, 9))).tolist() == [-1.5]
        engine.close()
    assert script.paths == ["/server_info", "/model_info", "/classify"]
    assert script.bodies[-1] == {"input_ids": [[1, 7, 9]]}


def test_its_version_is_asked_for():
    with scripted_server(answer(INFO)) as script:
        assert sglang.engine_version(settings(address=script.address)) == "sglang 0.5.23"
