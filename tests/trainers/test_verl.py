"""verl's own reward loop calls our reward function: its worker, its manager, its loader of reward functions.

Not the whole trainer: the rollouts are made here, and handed over as verl's agent loop would.
"""

import asyncio
import importlib.util

import numpy as np
import pytest
import torch

from polar_ray import Triple
from polar_ray.errors import EmptyText, SchemaError, TripleError, Unavailable
from polar_ray.trainers import verl as adapter
from tests.support.endpoint import running_endpoint, serve_config
from tests.support.policy import tiny_tokenizer
from tests.support.scripted_server import rewards_reply, scripted_server

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),  # of verl and its dependencies, not ours to change
]

PROMPT_TOKENS, RESPONSE_TOKENS = 4, 8
PROMPTS = ["Why is the sky blue?", "Why is grass green?"]
REFERENCES = ["Air scatters blue light most.", "Chlorophyll reflects green light."]
ANSWERS = ["air scatters light", "the sky is water", "the sky is blue because air scatters light", "fish"]
N_ROLLOUTS = len(PROMPTS) * len(ANSWERS)


@pytest.fixture(scope="module")
def verl(clients):
    """The module of verl's reward loop."""
    pytest.importorskip("verl", reason="verl is not installed; run make clients")
    pytest.importorskip("tensordict", reason="tensordict is not installed; run make clients")
    from verl.experimental.reward_loop import reward_loop

    return reward_loop


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def config_of(clients, policy_folder, path, manager="naive", **reward_kwargs):
    """verl's own reward settings, with what its documentation tells a user to override."""
    from omegaconf import OmegaConf

    reward = OmegaConf.load(clients / "verl/trainer/config/reward/reward.yaml")
    changes = {
        "reward": {
            "reward_manager": {"name": manager},
            "custom_reward_function": {"path": path, "name": "compute_score", "reward_kwargs": reward_kwargs},
        },
        "actor_rollout_ref": {"model": {"path": str(policy_folder), "tokenizer_path": None}},
    }
    return OmegaConf.merge({"reward": reward}, changes)


def rollouts(n=N_ROLLOUTS):
    """A finished batch as verl's agent loop hands it to the reward loop, groups interleaved."""
    from verl import DataProto

    tokenizer = tiny_tokenizer()
    answers = [ANSWERS[place // len(PROMPTS)] for place in range(n)]
    responses = tokenizer(
        answers, padding="max_length", max_length=RESPONSE_TOKENS, padding_side="right", return_tensors="pt"
    )
    prompts = torch.full((n, PROMPT_TOKENS), tokenizer.unk_token_id)
    which = [place % len(PROMPTS) for place in range(n)]
    return DataProto.from_dict(
        tensors={
            "prompts": prompts,
            "responses": responses["input_ids"],
            "attention_mask": torch.cat([torch.ones_like(prompts), responses["attention_mask"]], dim=1),
        },
        non_tensors={
            "data_source": np.array(["polar"] * n, dtype=object),
            "reward_model": np.array([{"style": "polar", "ground_truth": REFERENCES[i]} for i in which], dtype=object),
            "extra_info": np.array([{"prompt": PROMPTS[i]} for i in which], dtype=object),
        },
    ), [Triple(PROMPTS[i], REFERENCES[i], answer) for i, answer in zip(which, answers, strict=True)]


def run_worker(verl, config, data):
    async def run():
        return await verl.RewardLoopWorker(config).compute_score_batch(data)

    return asyncio.run(run())


@pytest.mark.parametrize("path", ["pkg://polar_ray.trainers.verl", adapter.__file__], ids=["module", "file"])
@pytest.mark.parametrize("manager", ["naive", "dapo"])
def test_verls_reward_loop_gets_the_scorers_rewards(manager, path, verl, clients, policy_folder, address, scorer):
    data, triples = rollouts()
    config = config_of(clients, policy_folder, path, manager, address=address, coalesce_s=0.3)
    if manager == "dapo":
        config.reward.reward_kwargs = {"overlong_buffer_cfg": {"enable": False}, "max_resp_len": None}
    outputs = run_worker(verl, config, data)
    expected = scorer.score(triples)
    assert [output["reward_score"] for output in outputs] == pytest.approx([row.reward for row in expected], abs=1e-5)
    assert [output["reward_extra_info"]["tokens"] for output in outputs] == [row.tokens for row in expected]


def test_samples_that_verl_sends_one_by_one_arrive_as_one_request(verl, clients, policy_folder):
    data, triples = rollouts()
    with scripted_server(rewards_reply([float(n) for n in range(len(triples))])) as script:
        config = config_of(
            clients, policy_folder, "pkg://polar_ray.trainers.verl", address=script.address, coalesce_s=0.3
        )
        outputs = run_worker(verl, config, data)
        (body,) = script.bodies
    assert [row["output"] for row in body["triples"]] == ANSWERS * len(PROMPTS)
    places = {(row["prompt"], row["output"]): float(place) for place, row in enumerate(body["triples"])}
    assert [output["reward_score"] for output in outputs] == [places[each.prompt, each.output] for each in triples]


def test_an_endpoint_that_is_gone_stops_verls_reward_loop(verl, clients, policy_folder):
    config = config_of(clients, policy_folder, "pkg://polar_ray.trainers.verl", address="127.0.0.1:9", deadline_s=3.0)
    with pytest.raises(Unavailable, match="nobody answers"):
        run_worker(verl, config, rollouts(2)[0])


def test_two_of_verls_managers_are_not_for_us(verl, clients, policy_folder):
    """What the adapter's docstring warns of."""
    path, gone = "pkg://polar_ray.trainers.verl", {"address": "127.0.0.1:9", "deadline_s": 0.3}
    config = config_of(clients, policy_folder, path, "rate_limited", **gone)
    assert [output["reward_score"] for output in run_worker(verl, config, rollouts(2)[0])] == [0.0, 0.0]
    with pytest.raises(AssertionError, match="Async reward score is not supported"):
        run_worker(verl, config_of(clients, policy_folder, path, "remote", **gone), rollouts(2)[0])


def test_the_file_is_loaded_without_its_package_as_older_versions_do(address, scorer):
    spec = importlib.util.spec_from_file_location("custom_module", adapter.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = asyncio.run(
        module.compute_score("polar", ANSWERS[0], REFERENCES[0], {"prompt": PROMPTS[0]}, address=address)
    )
    assert found["score"] == pytest.approx(
        scorer.score([Triple(PROMPTS[0], REFERENCES[0], ANSWERS[0])])[0].reward, abs=1e-5
    )


def test_the_recipes_batch_function_gives_rewards_in_order(address, scorer):
    messages = [{"role": "user", "content": PROMPTS[1]}]
    infos = [{"prompt": PROMPTS[0], "ability": "chat", "split": "test"}, {"prompt": np.array(messages, dtype=object)}]
    outputs = ["<think>blue?</think> " + ANSWERS[0], ANSWERS[1]]
    found = adapter.compute_score_batch(["polar"] * 2, outputs, REFERENCES, infos, address=address)
    triples = [Triple(PROMPTS[0], REFERENCES[0], ANSWERS[0]), Triple(messages, REFERENCES[1], ANSWERS[1])]
    assert found == pytest.approx([row.reward for row in scorer.score(triples)], abs=1e-5)


def test_another_prompt_key_is_used_and_a_missing_one_named(address, scorer):
    ask = (["polar"], [ANSWERS[0]], [REFERENCES[0]])
    (found,) = adapter.compute_score_batch(*ask, [{"question": PROMPTS[0]}], prompt_key="question", address=address)
    assert found == pytest.approx(scorer.score([Triple(PROMPTS[0], REFERENCES[0], ANSWERS[0])])[0].reward, abs=1e-5)
    with pytest.raises(SchemaError, match="extra_info has no 'prompt'"):
        adapter.compute_score_batch(*ask, [{"question": PROMPTS[0]}], address=address)


def test_a_sample_without_a_reference_or_an_answer_is_a_typed_error(address):
    with pytest.raises(TripleError, match="reference"):
        asyncio.run(adapter.compute_score("polar", "x", None, {"prompt": "p"}, address=address))
    with running_endpoint(serve_config()) as strict, pytest.raises(EmptyText, match="on_empty"):
        asyncio.run(adapter.compute_score("polar", "", "r", {"prompt": "p"}, address=strict))


def test_what_verl_adds_for_reward_models_of_its_own_makes_no_difference(address):
    ask = ("polar", ANSWERS[0], REFERENCES[0], {"prompt": PROMPTS[0]})
    plain = asyncio.run(adapter.compute_score(*ask, address=address))
    extended = asyncio.run(
        adapter.compute_score(*ask, address=address, reward_router_address="10.0.0.1:1", reward_model_tokenizer=None)
    )
    assert extended == pytest.approx(plain)
