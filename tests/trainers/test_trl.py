"""A real GRPO run of TRL: a tiny random policy on the CPU, its rewards from a real endpoint over the embedded model."""

import asyncio
import inspect
import pickle

import pyarrow.parquet as pq
import pytest

from polar_ray import Triple
from polar_ray.errors import SchemaError, Unavailable
from polar_ray.trainers.trl import async_polar_reward, polar_reward
from tests.support.policy import tiny_policy, tiny_tokenizer

pytest.importorskip("trl", reason="trl is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, accelerate and torch, not ours to change

QUESTIONS = {
    "Why is the sky blue?": "Air scatters blue light most.",
    "Why is grass green?": "Chlorophyll reflects green.",
}
STEPS, GENERATIONS = 2, 4


def train(folder, reward_function, *, conversational=False):
    """Run GRPO for a few steps; (metrics of every step, every completion as TRL wrote it down)."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = tiny_tokenizer()
    prompts = [[{"role": "user", "content": text}] if conversational else text for text in QUESTIONS]
    data = Dataset.from_dict({"prompt": prompts, "reference": list(QUESTIONS.values())})
    config = GRPOConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        num_generations=GENERATIONS,
        per_device_train_batch_size=GENERATIONS,
        max_completion_length=8,
        logging_steps=1,
        log_completions=True,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        learning_rate=0.1,
        seed=0,
    )
    trainer = GRPOTrainer(
        tiny_policy(tokenizer),
        reward_funcs=reward_function,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
    )
    before = trainer.model.model.embed_tokens.weight.detach().clone()
    trainer.train()
    assert not before.equal(trainer.model.model.embed_tokens.weight), "the rewards taught nothing"
    files = sorted(folder.glob("completions/*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return [entry for entry in trainer.state.log_history if "reward" in entry], rows


@pytest.mark.parametrize("make", [polar_reward, async_polar_reward], ids=["sync", "async"])
def test_trl_trains_on_the_scorers_rewards(make, address, scorer, tmp_path):
    metrics, rows = train(tmp_path, make(address))
    triples = [Triple(row["prompt"], QUESTIONS[row["prompt"]], row["completion"]) for row in rows]
    assert len(rows) == STEPS * GENERATIONS
    assert len({row["completion"] for row in rows}) > 1
    expected = scorer.score(triples)
    assert [row["polar"] for row in rows] == pytest.approx([each.reward for each in expected], abs=1e-5)
    assert [row["polar_tokens"] for row in rows] == [each.tokens for each in expected]
    for step, entry in enumerate(metrics):
        rewards = [row["polar"] for row in rows[step * GENERATIONS : (step + 1) * GENERATIONS]]
        assert entry["rewards/polar/mean"] == pytest.approx(sum(rewards) / GENERATIONS, abs=1e-5)
        assert entry["reward"] == pytest.approx(entry["rewards/polar/mean"])
        assert entry["polar/tokens"] > 0
        assert entry["polar/cut_tokens"] == 0


def test_trl_trains_on_conversations(address, scorer, tmp_path):
    seen = []

    class Watching:
        """Keeps what the reward function was asked, which TRL's table shows in another form."""

        __name__ = "watched"

        def __call__(self, prompts, completions, reference, **columns):
            rewards = polar_reward(address)(prompts, completions, reference=reference, **columns)
            seen.extend(zip(prompts, reference, completions, rewards, strict=True))
            return rewards

    metrics, _ = train(tmp_path, Watching(), conversational=True)
    assert len(seen) == STEPS * GENERATIONS
    assert all(isinstance(completion, list) for _, _, completion, _ in seen)
    expected = scorer.score([Triple(prompt, reference, completion) for prompt, reference, completion, _ in seen])
    assert [reward for *_, reward in seen] == pytest.approx([row.reward for row in expected], abs=1e-5)
    assert len(metrics) == STEPS


def test_an_endpoint_that_is_gone_stops_the_run(tmp_path):
    with pytest.raises(Unavailable, match="nobody answers"):
        train(tmp_path, polar_reward("127.0.0.1:9", deadline_s=3.0))


def test_a_missing_column_is_named(address):
    with pytest.raises(SchemaError, match="'answer'"):
        polar_reward(address, reference_column="answer")(prompts=["p"], completions=["c"], reference=["r"])


def test_both_reward_functions_survive_the_way_to_another_process(address):
    for make in (polar_reward, async_polar_reward):
        copied = pickle.loads(pickle.dumps(make(address, name="mine")))
        asked = copied(prompts=["p"], completions=["c"], reference=["r"])
        (reward,) = asyncio.run(asked) if inspect.iscoroutine(asked) else asked
        assert copied.__name__ == "mine"
        assert reward == pytest.approx(polar_reward(address)(prompts=["p"], completions=["c"], reference=["r"])[0])
