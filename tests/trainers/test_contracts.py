"""Trainers whose packages cannot be had here: the contract that their sources state, against the real endpoint."""

import asyncio
import importlib
import subprocess
import sys
import types
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch

from polar_ray import Triple
from polar_ray.errors import ConfigError, SchemaError, TripleError
from polar_ray.trainers import nemo_rl, xtuner
from polar_ray.trainers.slime import custom_rm
from tests.support.scripted_server import rewards_reply, scripted_server

QUESTION, REFERENCE = "Why is the sky blue?", "Air scatters blue light most."
TEMPLATED = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
ANSWERS = ["Because air scatters light.", "Because of the sea.", "Magic."]


@pytest.fixture(scope="module")
def expected(scorer):
    return [row.reward for row in scorer.score([Triple(QUESTION, REFERENCE, answer) for answer in ANSWERS])]


def close_to(rewards):
    return pytest.approx(rewards, abs=1e-5)


@dataclass
class Sample:
    """slime's `Sample`, as far as reward functions read it (slime/utils/types.py)."""

    response: str
    prompt: object = TEMPLATED
    label: str | None = REFERENCE
    metadata: dict = field(default_factory=dict)


def slime_args(address, **changes):
    return types.SimpleNamespace(polar_ray_address=address, reward_key=None, **changes)


def test_slime_sends_a_group_or_single_samples(address, expected):
    args = slime_args(address)
    group = [Sample(answer + "<|im_end|>") for answer in ANSWERS]
    assert asyncio.run(custom_rm(args, group)) == close_to(expected)

    async def one_by_one():
        return await asyncio.gather(*(custom_rm(args, sample, evaluation=True) for sample in group))

    assert asyncio.run(one_by_one()) == close_to(expected)


def test_slime_prefers_a_bare_prompt_and_takes_messages(address, expected):
    bare = Sample(ANSWERS[0], prompt="of another template", metadata={"prompt": QUESTION})
    messages = Sample(ANSWERS[1], prompt=[{"role": "user", "content": QUESTION}])
    assert asyncio.run(custom_rm(slime_args(address), [bare, messages])) == close_to(expected[:2])


def test_slime_gets_a_dict_where_it_looks_for_a_key(address, expected):
    args = types.SimpleNamespace(polar_ray_address=address, reward_key="polar")
    found = asyncio.run(custom_rm(args, Sample(ANSWERS[0])))
    assert found["polar"] == close_to(expected[0])
    assert found["tokens"] > 0


def test_slime_is_told_of_a_missing_label_and_of_an_unknown_setting(address):
    for label in (None, ""):
        with pytest.raises(TripleError, match="--label-key"):
            asyncio.run(custom_rm(slime_args(address), [Sample("x", label=label)]))
    with pytest.raises(ConfigError, match="adress"):
        asyncio.run(custom_rm(slime_args(address, polar_ray_adress="x"), Sample("x")))


class EnvironmentReturn(NamedTuple):
    """NeMo-RL's (nemo_rl/environments/interfaces.py)."""

    observations: list
    metadata: list
    next_stop_strings: list
    rewards: torch.Tensor
    terminateds: torch.Tensor
    answers: list | None = None


@pytest.fixture
def environment_class(monkeypatch):
    interfaces = types.ModuleType("nemo_rl.environments.interfaces")
    interfaces.EnvironmentInterface, interfaces.EnvironmentReturn = object, EnvironmentReturn
    monkeypatch.setitem(sys.modules, "nemo_rl.environments.interfaces", interfaces)
    return nemo_rl.environment_class()


def message_log(answer):
    return [
        {"role": "user", "content": TEMPLATED, "token_ids": torch.tensor([1])},
        {"role": "assistant", "content": f"<think>hm</think>{answer}", "token_ids": torch.tensor([2])},
    ]


def test_nemo_rls_environment_steps_once_with_the_rewards(environment_class, address, expected):
    environment = environment_class({"address": address})
    logs = [message_log(answer) for answer in ANSWERS]
    found = environment.step(logs, [{"ground_truth": REFERENCE}] * 3)
    assert found.rewards.dtype == torch.float32
    assert found.rewards.tolist() == close_to(expected)
    assert found.terminateds.tolist() == [True] * 3
    assert found.metadata == found.next_stop_strings == [None] * 3
    assert [message["role"] for message in found.observations] == ["environment"] * 3
    batch, metrics = environment.global_post_process_and_metrics({"rewards": found.rewards})
    assert batch["rewards"] is found.rewards
    assert metrics == {"polar/cut_tokens": 0}


def test_nemo_rls_keys_can_be_named_and_a_missing_one_is(environment_class, address, expected):
    environment = environment_class({"address": address, "reference_key": "gold", "prompt_key": "question"})
    metadata = [{"gold": REFERENCE, "question": QUESTION}]
    assert environment.step([message_log(ANSWERS[0])], metadata).rewards.tolist() == close_to(expected[:1])
    with pytest.raises(SchemaError, match="'gold'"):
        environment.step([message_log(ANSWERS[0])], [{"ground_truth": REFERENCE}])


@pytest.mark.parametrize(("keep", "sent"), [(False, "4"), (True, "<think>\nhm</think>4")], ids=["without", "with"])
def test_nemo_rls_think_block_may_have_been_opened_by_the_prompt(environment_class, keep, sent):
    log = [
        {"role": "user", "content": f"{TEMPLATED}<think>\n"},
        {"role": "assistant", "content": "hm</think>4<|im_end|>"},
    ]
    with scripted_server(rewards_reply([1.0])) as script:
        environment = environment_class({"address": script.address, "keep_thinking": keep})
        environment.step([log], [{"ground_truth": REFERENCE}])
        (body,) = script.bodies
    (row,) = body["triples"]
    assert (row["prompt"][0]["content"], row["output"]) == (QUESTION, sent)


def test_nemo_rl_finds_the_actor_class_by_its_name(environment_class, monkeypatch):
    module, _, name = nemo_rl.ACTOR_CLASS.rpartition(".")
    actor_class = getattr(importlib.import_module(module), name)
    monkeypatch.delattr(nemo_rl, name)  # its base is this test's
    assert callable(actor_class.options)
    assert callable(actor_class.remote)


class Judger:
    """xtuner v1's, as far as subclasses rely on it (xtuner/v1/rl/judger/native.py)."""

    def __init__(self, judger_name):
        self.judger_name = judger_name


class JudgerConfig:
    def __init__(self, judger_name, cpu_resources):
        self.judger_name, self.cpu_resources = judger_name, cpu_resources


@pytest.fixture
def _xtuner(monkeypatch):
    judger = types.ModuleType("xtuner.v1.rl.judger")
    judger.Judger, judger.JudgerConfig = Judger, JudgerConfig
    monkeypatch.setitem(sys.modules, "xtuner.v1.rl.judger", judger)


def payload(answer, label=REFERENCE):
    message = [{"role": "user", "content": QUESTION}]
    return {"message": message, "response": answer, "label": label, "status": "completed", "data_source": "polar"}


@pytest.mark.usefixtures("_xtuner")
def test_xtuners_judger_judges_one_and_a_batch(address, expected):
    judger = xtuner.polar_judger_config(address, judger_name="mine").build_local()
    batch = asyncio.run(judger.judge_payload([payload(answer) for answer in ANSWERS]))
    single = asyncio.run(judger.judge_payload(payload(ANSWERS[0])))
    assert judger.judger_name == "mine"
    assert [output["score"] for output in batch] == close_to(expected)
    assert single["score"] == close_to(expected[0])
    for label in (None, ""):
        with pytest.raises(TripleError, match="ground_truth"):
            asyncio.run(judger.judge_payload(payload(ANSWERS[0], label=label)))


@pytest.mark.usefixtures("_xtuner")
def test_xtuner_keeps_its_own_settings(address):
    config = xtuner.polar_judger_config(address, cpu_resources="two of them")
    assert config.cpu_resources == "two of them"
    config.build_local()


def test_adapters_import_neither_their_trainers_nor_torch():
    heavy = ["torch", "ray", "transformers", "datasets", "pyarrow"]
    names = ["verl", "trl", "slime", "areal", "swift", "nemo_rl", "xtuner", "openrlhf"]
    code = (
        f"import sys; from polar_ray.trainers import {', '.join(names)}; "
        f"print([name for name in {heavy + names} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
