"""One suite for every engine: the promises of `polar_ray.engines.base.Engine`."""

import numpy as np
import pytest

from polar_ray.engines.fake import FakeEngine
from polar_ray.engines.torch.engine import TorchEngine
from polar_ray.planning import Batch, Group, plan
from tests.support.checkpoints import write_checkpoint

TOLERANCE = {"fake": 0.0, "torch": 1e-4, "torch-bfloat16": 0.3}
"""How far the same sequence's rewards may lie apart in different company: rounding, at a standard deviation of 2."""


@pytest.fixture(scope="module", params=TOLERANCE)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def engine(name, tmp_path_factory):
    if name == "fake":
        engine = FakeEngine()
    else:
        dtype = "bfloat16" if name.endswith("bfloat16") else "float32"
        engine = TorchEngine.load(write_checkpoint(tmp_path_factory.mktemp("model")), dtype=dtype)
    yield engine
    engine.close()


def draw(lengths, seed=0):
    random = np.random.default_rng(seed)
    shared = random.integers(0, 512, 40)
    return [np.concatenate([shared, random.integers(0, 512, length)]).astype(np.int32) for length in lengths]


def whole(*sequences):
    return Batch(tuple(Group(ids[:0], (ids,), (row,)) for row, ids in enumerate(sequences)))


def test_one_float32_reward_for_each_sequence_in_order(engine, name):
    sequences = draw([5, 60, 17])
    rewards = engine.score(whole(*sequences))
    assert rewards.dtype == np.float32
    assert rewards.shape == (3,)
    assert np.isfinite(rewards).all()
    backwards = engine.score(whole(*sequences[::-1]))
    assert np.abs(rewards - backwards[::-1]).max() <= TOLERANCE[name]
    assert len(set(rewards.tolist())) == 3


def test_an_empty_batch_gives_an_empty_array(engine):
    rewards = engine.score(Batch(()))
    assert rewards.dtype == np.float32
    assert rewards.shape == (0,)


def test_company_does_not_change_a_reward(engine, name):
    sequences = draw([3, 90, 33, 34])
    alone = np.concatenate([engine.score(whole(ids)) for ids in sequences])
    assert np.abs(engine.score(whole(*sequences)) - alone).max() <= TOLERANCE[name]


def test_a_shared_prefix_does_not_change_a_reward(engine, name):
    sequences = draw([3, 90, 33, 34])
    alone = np.concatenate([engine.score(whole(ids)) for ids in sequences])
    (batch,) = plan(sequences, token_budget=10_000).batches
    assert batch.computed_tokens < batch.tokens
    assert np.abs(engine.score(batch) - alone[batch.rows]).max() <= TOLERANCE[name]


def test_one_token_is_a_sequence(engine):
    assert np.isfinite(engine.score(whole(np.array([9], dtype=np.int32)))).all()


def test_the_same_batch_gives_the_same_bits(engine):
    (batch,) = plan(draw([3, 90, 33]), token_budget=10_000).batches
    assert engine.score(batch).tobytes() == engine.score(batch).tobytes()


def test_the_budget_is_positive_and_sharing_has_a_limit_or_none(engine):
    assert engine.token_budget > 0
    assert engine.max_shared_length is None or engine.max_shared_length > 0


def test_close_may_be_called_twice(name, tmp_path):
    engine = FakeEngine() if name == "fake" else TorchEngine.load(write_checkpoint(tmp_path))
    engine.close()
    engine.close()
