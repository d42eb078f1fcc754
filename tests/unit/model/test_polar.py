"""The torch module against the independent reference."""

import numpy as np
import pytest
import torch

from polar_ray.model.checkpoint import Checkpoint
from polar_ray.model.polar import PolarForReward, load_polar
from polar_ray.model.rope import Rope
from tests.support.checkpoints import write_checkpoint
from tests.support.reference import Reference

TOLERANCE = 1e-4
"""Rewards in float32 differ from the reference's by the order of summation only."""

SHAPES = {
    "no grouping, heads of 16": {"num_key_value_heads": 4},
    "pairs, heads of 32": {"hidden_size": 128},
    "fours, heads of 64": {"hidden_size": 256, "num_key_value_heads": 1},
    "one head of 128": {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
    "theta of POLAR-7B": {"rope_theta": 50000000, "max_position_embeddings": 262144},
    "plain rope": {"rope_scaling": None},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic rope, exceeded": {"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 3.0}},
}


def draw(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [torch.from_numpy(random.integers(0, 512, length)) for length in lengths]


def pad(sequences, side):
    width = max(map(len, sequences))
    ids, mask = torch.full((len(sequences), width), 2), torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
        ids[row, place], mask[row, place] = sequence, 1
    return ids, mask


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_padded_rewards_equal_the_reference_on_either_side(tmp_path, fields):
    folder = write_checkpoint(tmp_path, **fields)
    sequences = draw([8, 40, 64, 65, 130, 250])
    expected = Reference(folder).rewards(sequences)
    model = load_polar(folder)
    with torch.inference_mode():
        for side in ("right", "left"):
            assert (model(*pad(sequences, side)) - expected).abs().max() < TOLERANCE
        for sequence, reward in zip(sequences, expected, strict=True):
            assert (model(sequence[None]) - reward).abs().max() < TOLERANCE


@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_the_static_base_of_sglang_is_there_on_request(tmp_path, factor):
    folder = write_checkpoint(tmp_path, rope_scaling={"type": "dynamic", "factor": factor})
    sequences = draw([30, 200])
    plain, static = Reference(folder).rewards(sequences), Reference(folder, "sglang-static").rewards(sequences)
    assert (plain - static).abs().max() > 1e-2
    with torch.inference_mode():
        found = load_polar(folder, rope_base="sglang-static")(*pad(sequences, "right"))
    assert (found - static).abs().max() < TOLERANCE


def test_the_static_base_is_three_to_the_power_for_a_factor_of_two(tmp_path):
    config = Checkpoint.open(write_checkpoint(tmp_path, rope_theta=50000000, hidden_size=512)).config
    assert Rope.of(config, "sglang-static").base(1) == pytest.approx(1.526e8, rel=1e-3)
    assert Rope.of(config, "sglang-static").longest_with_one_base is None
    assert Rope.of(config).longest_with_one_base == 32768


def test_a_module_built_without_storage_is_filled_to_the_last_buffer(tmp_path):
    model = load_polar(write_checkpoint(tmp_path))
    assert not list(model.named_buffers())
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.3), (torch.float16, 0.05)], ids=str)
def test_half_precision_stays_near(tmp_path, dtype, bound):
    folder = write_checkpoint(tmp_path, dtype=dtype)
    sequences = draw([20, 100, 300])
    with torch.inference_mode():
        rewards = load_polar(folder)(*pad(sequences, "right"))
    assert rewards.dtype == torch.float32
    assert (rewards - Reference(folder).rewards(sequences)).abs().max() < bound


def test_a_new_model_trains(tmp_path):
    model = PolarForReward(Checkpoint.open(write_checkpoint(tmp_path)).config)
    ids, mask = pad(draw([12, 30]), "right")
    chosen, rejected = model(ids, mask)
    torch.nn.functional.softplus(rejected - chosen).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
