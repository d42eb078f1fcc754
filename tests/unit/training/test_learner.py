"""Steps: accumulation, checkpoints, adapters, several workers. The same pairs always give the same weights."""

import copy

import numpy as np
import pytest
import torch

from polar_ray.config import TrainConfig
from polar_ray.corpus.storage import Location
from polar_ray.engines.torch.engine import TorchEngine
from polar_ray.engines.torch.layout import pack
from polar_ray.errors import ConfigError, TrainingError
from polar_ray.model.polar import load_polar
from polar_ray.planning import plan
from polar_ray.training.adapters import add_adapters
from polar_ray.training.export import gather_weights, write_weights
from polar_ray.training.learner import Learner, idle_pairs, pack_pairs
from polar_ray.training.packed import PackedPolar
from tests.support.checkpoints import write_checkpoint
from tests.support.gang import run_gang

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("learner") / "checkpoint")


def make_pairs(n_pairs: int, seed: int = 0):
    """(chosen, rejected) ids; a chosen output counts up, which can be learnt."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(n_pairs):
        prefix, size = rng.integers(16, 500, 30), int(rng.integers(4, 20))
        good, bad = np.arange(100, 100 + size), rng.integers(16, 500, size)
        pairs.append(tuple(np.concatenate([prefix, end, [9]]).astype(np.int32) for end in (good, bad)))
    return pairs


def packs_of(pairs, size: int, share_prefixes: bool = True):
    parts = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return [pack_pairs(*zip(*part, strict=True), share_prefixes=share_prefixes) for part in parts]


def make_learner(folder, **settings) -> Learner:
    config = TrainConfig(precision="float32", packs_per_step=4, **settings)
    model = load_polar(folder)
    if config.lora.rank:
        torch.manual_seed(0)
        add_adapters(model, config.lora)
    return Learner(model, config, CPU)


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in learner.model.named_parameters()}


def assert_same_steps(one, other, before) -> None:
    """AdamW divides by the gradients' size: what rounds near nothing may go the other way, and little else."""
    for name, start in before.items():
        moved = (one[name] - start).abs() > 5e-4
        off = (one[name] - other[name]).abs() > 1e-4
        assert off.float().mean() < 0.02 + 0.5 * (not moved.any()), name
        assert not moved.any() or off.float().mean() < 0.1 * moved.float().mean(), name


def largest_difference(one, other) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


FAST = {"optimizer": {"learning_rate": 1e-3}}


def test_accumulated_packs_make_the_step_of_one_large_pack(folder):
    pairs = make_pairs(8)
    whole, parts, alone = (make_learner(folder, **FAST) for _ in range(3))
    before = weights_of(whole)
    for _ in range(2):
        sums, norm = whole.step(packs_of(pairs, 8), 8, 1.0)
        for learner, packs in ((parts, packs_of(pairs, 3)), (alone, packs_of(pairs, 2, share_prefixes=False))):
            found, found_norm = learner.step(packs, 8, 1.0)
            assert found.loss == pytest.approx(sums.loss, rel=1e-3)
            assert found_norm == pytest.approx(norm, rel=1e-2)
    assert sums.computed_tokens < sums.tokens == found.tokens == found.computed_tokens
    assert_same_steps(weights_of(whole), weights_of(parts), before)
    assert_same_steps(weights_of(whole), weights_of(alone), before)


def test_it_learns(folder):
    learner = make_learner(folder, **FAST)
    first, _ = learner.step(packs_of(make_pairs(16), 8), 16, 1.0)
    for step in range(1, 12):
        last, _ = learner.step(packs_of(make_pairs(16, seed=step), 8), 16, 1.0)
    assert first.correct <= 11
    assert last.correct >= 14
    assert last.loss < first.loss / 4


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_goes_on_from_its_state_as_if_it_had_never_stopped(folder, kind):
    settings = {"optimizer": {"kind": kind, "learning_rate": 1e-3}}
    learner = make_learner(folder, **settings)
    for step in range(5):
        if step == 2:
            state = learner.state()
        learner.step(packs_of(make_pairs(4, seed=step), 2), 4, 1 - step / 10)
    resumed = make_learner(folder, **settings)
    resumed.restore(state)
    for step in range(2, 5):
        resumed.step(packs_of(make_pairs(4, seed=step), 2), 4, 1 - step / 10)
    assert largest_difference(weights_of(learner), weights_of(resumed)) == 0


def test_a_state_of_other_settings_is_refused(folder):
    state = make_learner(folder, lora={"rank": 2}).state()
    with pytest.raises(TrainingError, match="other settings"):
        make_learner(folder).restore(state)


def test_a_gradient_that_is_not_finite_changes_nothing(folder):
    learner = make_learner(folder, **FAST)
    with torch.no_grad():
        learner.model.v_head.weight[0, 0] = float("nan")
    before = copy.deepcopy(weights_of(learner))
    with pytest.raises(TrainingError, match=r"norm is nan.*learning_rate"):
        learner.step(packs_of(make_pairs(2), 2), 2, 1.0)
    after = weights_of(learner)
    assert all(torch.equal(before[name], after[name]) for name in before if name != "v_head.weight")


def test_a_worker_without_a_pack_computes_next_to_nothing(folder):
    learner = make_learner(folder, **FAST)
    sums, norm = learner.step([idle_pairs(9)], 4, 1.0)
    assert (sums.pairs, sums.loss, norm) == (0, 0, 0)


def test_bfloat16_stays_close_to_float32(folder):
    pairs = make_pairs(8)
    exact, rounded = (
        Learner(load_polar(folder), TrainConfig(precision=precision, packs_per_step=1), CPU)
        for precision in ("float32", "bfloat16")
    )
    loss, norm = exact.step(packs_of(pairs, 8), 8, 1.0)
    rounded_loss, rounded_norm = rounded.step(packs_of(pairs, 8), 8, 1.0)
    assert rounded_loss.loss == pytest.approx(loss.loss, rel=0.1)
    assert rounded_norm == pytest.approx(norm, rel=0.1)
    assert all(weight.dtype == torch.float32 for weight in rounded.model.parameters())


def test_adapters_alone_are_trained_and_merged_when_written(folder, tmp_path):
    learner = make_learner(folder, lora={"rank": 4}, optimizer={"learning_rate": 1e-2})
    before = copy.deepcopy(weights_of(learner))
    for step in range(3):
        learner.step(packs_of(make_pairs(8, seed=step), 8), 8, 1.0)
    after = weights_of(learner)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora_" in name} | {"v_head.weight"}

    target = tmp_path / "written"
    target.mkdir()
    model = learner.model
    write_weights(gather_weights(model, torch.float32), model.checkpoint_config, folder, Location(str(target)))
    sequences = [ids for pair in make_pairs(3, seed=9) for ids in pair]
    (batch,) = plan(sequences, token_budget=1 << 20).batches
    model.eval()
    with torch.no_grad():
        expected = PackedPolar(model)(pack(batch)).numpy()
    # The model computes with adapters beside its layers, the engine with their product added to the weights.
    assert np.abs(TorchEngine.load(target).score(batch) - expected).max() < 1e-3


def test_targets_that_the_model_has_not_are_refused(folder):
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        make_learner(folder, lora={"rank": 2, "targets": ["nowhere"]})


def test_workers_together_make_the_steps_of_one(folder):
    learner = make_learner(folder, **FAST)
    before = weights_of(learner)
    alone = [learner.step(packs_of(make_pairs(8, seed=step), 2), 8, 1.0) for step in range(3)]
    expected = [(sums.loss, norm) for sums, norm in alone]
    for parallel in ("ddp", "fsdp"):
        results = run_gang("tests.unit.training.gang:steps", 2, str(folder), parallel)
        for steps, weights in results:
            assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in expected], rel=1e-3)
            assert [norm for _, norm in steps] == pytest.approx([norm for _, norm in expected], rel=1e-3)
            assert_same_steps(weights_of(learner), weights, before)
