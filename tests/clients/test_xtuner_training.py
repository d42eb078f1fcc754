"""Our pairs and losses beside upstream's own training code, unmodified: xtuner 0.2.0's `tokenize_ref` and its losses.

Its modules import a training framework that is not needed for them, so the functions are taken out of their files.
"""

import ast
import copy
import random

import pytest
import torch
from torch import nn

from polar_ray.config import LimitsConfig, LossConfig
from polar_ray.encoding.encode import CLEAN_UP, Encoder
from polar_ray.training.loss import pair_losses
from polar_ray.triples import PreferencePair
from tests.clients.conftest import CLIENTS

pytestmark = pytest.mark.clients

WORDS = ["apple", " pear", "\n", "北京", "是", "首都", " 42", ". ", " n't", "  ", "é", "👍", "，"]


def take(path: str, *names: str, **context):
    """Functions by name out of a file of xtuner's, wherever in it they stand."""
    file = CLIENTS / "xtuner" / path
    if not file.is_file():
        pytest.skip(f"{path}: not installed; run make clients")
    tree = ast.parse(file.read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    for node in found:
        node.decorator_list = []
        for argument in node.args.args:
            argument.annotation = None
    exec(compile(ast.Module(found, []), path, "exec"), context)
    return [context[name] for name in names]


class SlowTokenizer:
    """InternLM2's slow tokenizer by its rules, which `test_upstream` holds against the recorded real one."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def encode(self, text, add_special_tokens):
        return self._tokenizer.encode_special(text)

    def decode(self, ids, skip_special_tokens):
        text = self._tokenizer.decode([id for id in ids if id not in self._tokenizer.special_ids])
        for spaced, closed in CLEAN_UP:
            text = text.replace(spaced, closed)
        return text


@pytest.fixture(scope="module")
def tokenize_ref():
    (function,) = take("dataset/preference_dataset.py", "tokenize_ref", copy=copy, print_log=lambda *_, **__: None)
    return function


def make_text(rng: random.Random, words: int) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(0, words)))


@pytest.mark.parametrize("seed", range(60))
def test_the_ids_of_a_pair_are_upstream_s_in_training(tokenizer, tokenize_ref, seed):
    rng = random.Random(seed)
    limits = LimitsConfig(
        max_tokens=rng.choice([64, 120, 400]), max_response_tokens=rng.choice([12, 20, 25]), on_empty="score"
    )
    row = {name: make_text(rng, 30) for name in ("prompt", "reference", "chosen", "rejected")}
    wrapper = rng.choice(["sft", "pretrain"])
    theirs = tokenize_ref(
        {**{name: [{"role": "user", "content": text}] for name, text in row.items()}, "wrapper": wrapper},
        SlowTokenizer(tokenizer),
        limits.max_tokens,
        limits.max_response_tokens,
        is_reward=True,
        reward_token_id=tokenizer.score_id,
    )
    encoder = Encoder(tokenizer, limits, newline_before_empty=False)
    ((chosen, rejected),) = encoder.encode_pairs([PreferencePair(**row, wrapper=wrapper)])
    assert chosen.ids.tolist() == theirs["chosen_ids"]
    assert rejected.ids.tolist() == theirs["rejected_ids"]


def test_an_empty_text_is_where_upstream_trains_on_other_ids_than_it_scores(small_tokenizer, tokenize_ref):
    row = {"prompt": "Why?", "reference": "Because.", "chosen": "Because.", "rejected": ""}
    theirs = tokenize_ref(
        {name: [{"content": text}] for name, text in row.items()},
        SlowTokenizer(small_tokenizer),
        400,
        is_reward=True,
        reward_token_id=small_tokenizer.score_id,
    )
    limits = LimitsConfig(on_empty="score")
    ids = {}
    for newline in (True, False):
        encoder = Encoder(small_tokenizer, limits, newline_before_empty=newline)
        ((_, rejected),) = encoder.encode_pairs([PreferencePair(**row)])
        ids[newline] = rejected.ids.tolist()
    assert ids[False] == theirs["rejected_ids"]
    assert len(ids[True]) == len(ids[False]) + 1


@pytest.mark.parametrize("kind", ["ranking", "focal"])
@pytest.mark.parametrize("penalty", ["none", "log-barrier", "l2"])
def test_losses_are_upstream_s(kind, penalty):
    ranking, focal, barrier, l2 = take(
        "model/reward.py", "ranking_loss", "focal_loss", "log_barrier_penalty", "l2_penalty", nn=nn, torch=torch
    )
    generator = torch.Generator().manual_seed(0)
    rewards = [(4 * torch.randn(32, generator=generator)).requires_grad_() for _ in range(2)]
    chosen, rejected = rewards
    both = torch.cat(rewards)
    theirs = (ranking if kind == "ranking" else focal)(None, chosen, rejected, 1 / 32)
    if penalty == "log-barrier":
        theirs = theirs + 0.01 * barrier(None, both, -5, 5, avg_factor=1 / 32)
    elif penalty == "l2":
        theirs = theirs + 0.01 * l2(None, both, avg_factor=1 / 32)
    ours = pair_losses(chosen, rejected, LossConfig(kind=kind, penalty=penalty)).mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for found, expected in zip(
        torch.autograd.grad(ours, rewards, retain_graph=True), torch.autograd.grad(theirs, rewards), strict=True
    ):
        assert torch.allclose(found, expected, atol=1e-6)
