"""The smallest proof that the rewards teach: a policy learns answers from an endpoint's rewards alone.

A tiny policy first learns the form of an answer, and the right one about one time in three. Then TRL's GRPO
trains it on the rewards that a running endpoint gives its answers. Nothing else tells it which answer is right.

    polar-ray serve --set limits.on_empty=score &
    python jobs/grpo_demo.py --output build/grpo

An untrained policy may well say nothing: `limits.on_empty=score` rewards that too, where an error would end the run.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]

from polar_ray.trainers.trl import polar_reward

CAPITALS = {
    "China": "Beijing",
    "France": "Paris",
    "Japan": "Tokyo",
    "Italy": "Rome",
    "Egypt": "Cairo",
    "Peru": "Lima",
    "Norway": "Oslo",
    "Cuba": "Havana",
}
QUESTION = "What is the capital of {country} ?"
END = "."

WARM_UP_STEPS = 300
RIGHT_IN_WARM_UP = 3
"""Times that a question stands beside its own answer in the warm-up, and once beside each of the others."""

GENERATIONS = 16
SMOOTHED_STEPS = 10
"""Of the lines in the plot."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: what the policy has to learn is which word, not how it is spelt."""
    words = [*QUESTION.replace("{country}", "").split(), *CAPITALS, *CAPITALS.values(), END]
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def make_policy(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random policy, two layers of width 64."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def warm_up(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Teach the form of an answer, and hardly more of its truth than chance."""
    rows = []
    for country, right in CAPITALS.items():
        for answer in CAPITALS.values():
            prompt, completion = tokenizer(QUESTION.format(country=country)), tokenizer(f"{answer} {END}")
            row = [*prompt["input_ids"], *completion["input_ids"], tokenizer.eos_token_id]
            rows += [row] * (RIGHT_IN_WARM_UP if answer == right else 1)
    ids = torch.tensor(rows)
    labels = ids.clone()
    labels[:, :-3] = -100
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(WARM_UP_STEPS):
        loss: Tensor = policy(input_ids=ids, labels=labels).loss
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


class ShareRight:
    """Counts right answers beside the rewards; gives 0 for each, so that the policy learns nothing from it."""

    __name__ = "right"

    def __init__(self) -> None:
        self.shares: list[float] = []

    def __call__(self, completions: list[str], reference: list[str], **_: Any) -> list[float]:
        right = [text.split() == answer.split() for text, answer in zip(completions, reference, strict=True)]
        self.shares.append(sum(right) / len(right))
        return [0.0] * len(right)


def plot(rewards: list[float], shares: list[float], file: Path) -> None:
    """Reward and share of right answers, step by step and smoothed."""
    figure, axes = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    window = np.ones(min(SMOOTHED_STEPS, len(rewards)))
    window /= window.sum()
    for axis, values, name, colour in (
        (axes[0], rewards, "mean reward", "tab:blue"),
        (axes[1], [100 * share for share in shares], "right answers, %", "tab:green"),
    ):
        axis.plot(range(1, len(values) + 1), values, color=colour, alpha=0.25)
        smooth = np.convolve(values, window, mode="valid")
        axis.plot(range(len(window), len(values) + 1), smooth, color=colour)
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_ylim(0, 102)
    axes[1].set_xlabel(f"GRPO step, {len(CAPITALS)} questions × {GENERATIONS} answers each")
    axes[0].set_title("A policy that learns from polar_ray's rewards alone")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(
    address: Annotated[str, typer.Option(help="Of the endpoint.")] = "127.0.0.1:8000",
    output: Annotated[Path, typer.Option(help="Folder for the numbers and the plot.")] = Path("build/grpo"),
    steps: Annotated[int, typer.Option(help="Steps of GRPO.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Of the policy and of its samples.")] = 0,
) -> None:
    """Train a tiny policy by GRPO on an endpoint's rewards, and plot how it learns."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    policy = make_policy(tokenizer)
    warm_up(policy, tokenizer)
    share_right = ShareRight()
    trainer = GRPOTrainer(
        policy,
        reward_funcs=[polar_reward(address), share_right],
        args=GRPOConfig(
            output_dir=str(output),
            max_steps=steps,
            num_generations=GENERATIONS,
            per_device_train_batch_size=GENERATIONS * len(CAPITALS),
            max_completion_length=4,
            learning_rate=3e-4,
            beta=0.0,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=Dataset.from_dict(
            {
                "prompt": [QUESTION.format(country=country) for country in CAPITALS],
                "reference": [f"{answer} {END}" for answer in CAPITALS.values()],
            }
        ),
        processing_class=tokenizer,
    )
    trainer.train()
    rewards = [entry["rewards/polar/mean"] for entry in trainer.state.log_history if "rewards/polar/mean" in entry]
    shares = share_right.shares
    (output / "grpo.json").write_text(json.dumps({"steps": steps, "seed": seed, "rewards": rewards, "right": shares}))
    plot(rewards, shares, output / "grpo.png")
    last = slice(-SMOOTHED_STEPS, None)
    print(
        f"reward {rewards[0]:.2f} -> {np.mean(rewards[last]):.2f}, right answers {shares[0]:.0%} -> "
        f"{np.mean(shares[last]):.0%}, {steps} steps in {time.perf_counter() - started:.0f} s: {output / 'grpo.png'}"
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
