"""OpenRLHF 0.11.2's own reward fetching against our endpoint, over HTTP and through our Python file."""

import asyncio
from pathlib import Path

import pytest

import polar_ray.trainers.openrlhf
from polar_ray import Scorer, Triple
from polar_ray.config import EngineConfig, LimitsConfig
from tests.clients.conftest import load_file, logging_stand_in

pytestmark = pytest.mark.clients

QUESTIONS = ["2+2?", "3+3?", "4+4?"]
PROMPTS = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
OUTPUTS = ["4", "<think>three and three</think>\n\n6", "nine"]
QUERIES = [f"{prompt}{output}<|im_end|>" for prompt, output in zip(PROMPTS, OUTPUTS, strict=True)]
LABELS = ["4", "6", "8"]


@pytest.fixture(scope="module")
def executor_class():
    name = "openrlhf.utils.logging_utils"
    agent = load_file("openrlhf/utils/agent.py", "openrlhf_agent", **{name: logging_stand_in(name)})
    return agent.SingleTurnAgentExecutor


def scores_of(prompts):
    triples = [Triple(*row) for row in zip(prompts, LABELS, ["4", "6", "nine"], strict=True)]
    limits = LimitsConfig(cut_side="left")
    with Scorer.open(engine=EngineConfig(device="cpu", dtype="float32"), limits=limits) as scorer:
        return [row.reward for row in scorer.score(triples)]


def test_its_http_client_gets_the_scorers_rewards(executor_class, endpoint):
    executor = executor_class([f"http://{endpoint}/get_reward"] * 2)
    parts = asyncio.run(executor._fetch_rewards_via_http(QUERIES, PROMPTS, LABELS))
    assert [len(part["rewards"]) for part in parts] == [2, 1]
    rewards = [reward for part in parts for reward in part["rewards"]]
    assert rewards == pytest.approx(scores_of(QUESTIONS), abs=1e-5)
    assert [reward for part in parts for reward in part["scores"]] == rewards


def test_its_python_file_road_gets_rewards_from_our_file(executor_class, endpoint, monkeypatch):
    monkeypatch.setenv("POLAR_RAY_ADDRESS", endpoint)
    executor = executor_class(str(Path(polar_ray.trainers.openrlhf.__file__)))
    parts = asyncio.run(executor._fetch_rewards_via_func(QUERIES, PROMPTS, LABELS))
    assert [part["rewards"] for part in parts] == pytest.approx(scores_of(QUESTIONS), abs=1e-5)
