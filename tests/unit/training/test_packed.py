"""The forward pass that is trained: the rewards of the engine, and the gradients of the unshared computation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_ray.engines.torch.engine import TorchEngine
from polar_ray.engines.torch.layout import pack
from polar_ray.model.polar import load_polar
from polar_ray.planning import Batch, Node, plan
from polar_ray.training import packed as packed_module
from polar_ray.training.packed import PackedPolar, plan_calls
from tests.support.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("packed") / "checkpoint")


@pytest.fixture(scope="module")
def model(folder):
    return PackedPolar(load_polar(folder))


def make_batch(lengths: list[tuple[int, list[int]]], seed: int = 0) -> Batch:
    """A group for each (prefix length, suffix lengths)."""
    rng = np.random.default_rng(seed)
    nodes, row = [], 0
    for prefix, suffixes in lengths:
        ids = [rng.integers(16, 512, size).astype(np.int32) for size in (prefix, *suffixes)]
        parent = None
        if prefix:
            parent = len(nodes)
            nodes.append(Node(ids[0]))
        nodes += [Node(own, parent, row + number) for number, own in enumerate(ids[1:])]
        row += len(suffixes)
    return Batch(tuple(nodes))


def gradients(model: PackedPolar, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    rewards = model(pack(batch))
    (rewards * torch.arange(1, len(rewards) + 1)).sum().backward()
    return rewards.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


LENGTHS = [(40, [9, 17]), (0, [30]), (80, [1, 1, 25]), (16, [5, 90]), (0, [1])]


def test_rewards_are_the_engine_s(folder, model):
    batch = make_batch(LENGTHS)
    with torch.no_grad():
        rewards = model(pack(batch)).numpy()
    assert np.abs(rewards - TorchEngine.load(folder).score(batch)).max() < 1e-4


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.lists(st.integers(1, 40), min_size=1, max_size=4)), min_size=1, max_size=5
    )
)
def test_shared_gradients_are_the_unshared_ones(model, lengths):
    batch = make_batch(lengths)
    shared_rewards, shared = gradients(model, batch)
    whole_rewards, whole = gradients(model, Batch.unshared(batch.sequences()))
    assert torch.allclose(shared_rewards, whole_rewards, atol=1e-4)
    for name, gradient in whole.items():
        assert (shared[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max().clamp(min=1e-3), name


def test_long_segments_are_computed_alone_and_alike(model, monkeypatch):
    batch = make_batch(LENGTHS)
    together, expected = gradients(model, batch)
    monkeypatch.setattr(packed_module, "BATCHED_KEYS", 1)
    calls = plan_calls(pack(batch))
    assert len(calls) == len(batch.nodes)
    alone, found = gradients(model, batch)
    assert torch.allclose(together, alone, atol=1e-4)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max().clamp(min=1e-3), name


def test_calls_cover_every_token_once_with_little_padding():
    packed = pack(make_batch([(50 + n % 7, [20 + n % 5, 18]) for n in range(40)]))
    calls = plan_calls(packed)
    written = torch.cat([call.written for call in calls])
    assert torch.equal(written.sort().values, torch.arange(len(packed.ids_T)))
    scores = sum(call.queries.numel() * call.keys.shape[1] for call in calls)
    needed = sum(len(segment.queries) * segment.n_keys for segment in packed.every_token)
    assert len(calls) < 10
    assert scores < 1.34 * needed


def test_rematerialised_activations_give_the_same_gradients(folder):
    batch = make_batch(LENGTHS)
    plain = PackedPolar(load_polar(folder))
    checkpointed = PackedPolar(load_polar(folder))
    checkpointed.polar.model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed.train()
    _, expected = gradients(plain.train(), batch)
    _, found = gradients(checkpointed, batch)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5), name


def test_planned_pairs_compute_what_they_share_once():
    rng = np.random.default_rng(0)
    prefix = rng.integers(16, 512, 100).astype(np.int32)
    sequences = [np.concatenate([prefix, rng.integers(16, 512, 20).astype(np.int32)]) for _ in range(2)]
    planned = plan(sequences, token_budget=1 << 20)
    assert planned.computed_tokens == 140
