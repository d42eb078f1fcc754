"""verl 0.9.1's built-in way to a reward model, `RewardLoopWorker.compute_score_disrm`, against our endpoint.

It renders prompt and response with the reward model's chat template and has no place for a reference, so as it stands
it cannot ask POLAR, and is told so. What it sends and parses is nevertheless its own code: with a chat template that
renders a triple from three messages it gets the Scorer's rewards.
"""

import asyncio
import json
import shutil

import numpy as np
import pytest

from polar_ray import Scorer, Triple
from polar_ray.config import EngineConfig, LimitsConfig
from tests.support.policy import tiny_tokenizer

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),  # of verl and its dependencies, not ours to change
]

PROMPT, REFERENCE = "Why is the sky blue?", "Air scatters blue light most."
OUTPUTS = ["air scatters light", "the sky is water"]
RENDERING = (
    "{{ messages[0]['content'] }}\n{{ messages[1]['content'] }}<|reward|>"
    "{{ messages[0]['content'] }}\n{{ messages[-1]['content'] }}[UNUSED_TOKEN_130]"
)
PLAIN = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def verl(clients):
    """The module of verl's reward loop."""
    pytest.importorskip("verl", reason="verl is not installed; run make clients")
    pytest.importorskip("tensordict", reason="tensordict is not installed; run make clients")
    from verl.experimental.reward_loop import reward_loop

    return reward_loop


@pytest.fixture
def ask(verl, clients, endpoint, tokenizer_folder, tmp_path):
    """Rewards of OUTPUTS, by way of verl's worker for one engine and one chat template."""
    tiny_tokenizer().save_pretrained(tmp_path / "policy")

    def ask(engine, chat_template):
        from omegaconf import OmegaConf

        model = shutil.copytree(tokenizer_folder, tmp_path / "polar")
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": chat_template}))
        changes = {
            "reward": {"reward_model": {"enable": True, "model_path": str(model), "rollout": {"name": engine}}},
            "actor_rollout_ref": {"model": {"path": str(tmp_path / "policy"), "tokenizer_path": None}},
        }
        reward = OmegaConf.load(clients / "verl/trainer/config/reward/reward.yaml")
        return run_worker(verl, OmegaConf.merge({"reward": reward}, changes), endpoint)

    return ask


def run_worker(verl, config, endpoint):
    async def run():
        return await verl.RewardLoopWorker(config, endpoint).compute_score_batch(rollouts())

    return [output["reward_score"] for output in asyncio.run(run())]


def rollouts():
    from verl import DataProto

    responses = tiny_tokenizer()(OUTPUTS, padding="max_length", max_length=8, padding_side="right", return_tensors="pt")
    turns = [{"role": "user", "content": PROMPT}, {"role": "reference", "content": REFERENCE}]
    prompts = np.empty(len(OUTPUTS), dtype=object)
    prompts[:] = [turns for _ in OUTPUTS]
    return DataProto.from_dict(
        tensors={"responses": responses["input_ids"], "attention_mask": responses["attention_mask"]},
        non_tensors={"raw_prompt": prompts},
    )


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_verls_engine_requests_get_the_scorers_rewards(ask, engine):
    limits = LimitsConfig(cut_side="left")
    with Scorer.open(engine=EngineConfig(device="cpu", dtype="float32"), limits=limits) as scorer:
        expected = [row.reward for row in scorer.score([Triple(PROMPT, REFERENCE, output) for output in OUTPUTS])]
    assert ask(engine, RENDERING) == pytest.approx(expected, abs=1e-5)


def test_a_chat_without_a_reference_stops_verl_at_once(ask):
    from aiohttp import ClientResponseError

    with pytest.raises(ClientResponseError) as caught:
        ask("vllm", PLAIN)
    assert caught.value.status == 422
