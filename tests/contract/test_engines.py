"""One suite for every engine: the promises of `polar_ray.engines.base.Engine`."""

import numpy as np
import pytest

from polar_ray.config import EngineConfig
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.fake import FakeEngine
from polar_ray.engines.ranks import RanksEngine
from polar_ray.engines.serve import ServeEngine
from polar_ray.engines.torch.engine import TorchEngine
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.planning import Batch, Group, plan
from tests.support.endpoint import running_endpoint, serve_config

TOLERANCE = {"fake": 0.0, "torch": 1e-4, "torch-bfloat16": 0.3, "torch-2-ranks": 1e-4, "serve": 1e-4}
"""How far the same sequence's rewards may lie apart in different company: rounding, at a standard deviation of 2."""


@pytest.fixture(scope="module", params=TOLERANCE)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def connect(name):
    """Makes an engine of the kind; one that asks an endpoint gets a real one, over the torch engine."""
    if name == "fake":
        yield FakeEngine
    elif name == "serve":
        with running_endpoint(serve_config(engine={"kind": "torch", "device": "cpu", "dtype": "float32"})) as address:
            yield lambda: ServeEngine.connect(address, max_in_flight=2, token_budget=10_000)
    elif name == "torch-2-ranks":
        config = EngineConfig(device="cpu", dtype="float32", tensor_parallel_size=2)
        yield lambda: RanksEngine.start(EMBEDDED_FOLDER, config)
    else:
        dtype = "bfloat16" if name.endswith("bfloat16") else "float32"
        yield lambda: TorchEngine.load(EMBEDDED_FOLDER, dtype=dtype)


@pytest.fixture(scope="module")
def engine(connect):
    engine = connect()
    yield engine
    engine.close()


def draw(lengths, seed=0):
    """Sequences in POLAR's frame, with so many tokens of their own after forty that they share."""
    tokenizer = PolarTokenizer(EMBEDDED_FOLDER)
    ordinary = np.flatnonzero(~tokenizer.is_control)
    random = np.random.default_rng(seed)
    shared = [tokenizer.bos_id, *random.choice(ordinary, 38), tokenizer.separator_id]
    return [
        np.array([*shared, *random.choice(ordinary, length - 1), tokenizer.score_id], dtype=np.int32)
        for length in lengths
    ]


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


def test_one_token_is_a_sequence(engine, name):
    if name == "serve":
        pytest.skip("an endpoint takes whole triples only")
    assert np.isfinite(engine.score(whole(np.array([9], dtype=np.int32)))).all()


def test_the_same_batch_gives_the_same_bits(engine):
    (batch,) = plan(draw([3, 90, 33]), token_budget=10_000).batches
    assert engine.score(batch).tobytes() == engine.score(batch).tobytes()


def test_the_budget_is_positive_and_sharing_has_a_limit_or_none(engine):
    assert engine.token_budget > 0
    assert engine.max_shared_length is None or engine.max_shared_length > 0


def test_close_may_be_called_twice(connect):
    engine = connect()
    engine.close()
    engine.close()
