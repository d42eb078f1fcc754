"""The promises of `polar_ray.engines.base.Engine` as tests, for a module that imports them all.

The module has two fixtures of its own: `connect` makes an engine, and `claims` says how far it keeps the promises.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.planning import Batch, plan


@dataclass(frozen=True)
class Claims:
    tolerance: float
    """How far a sequence's rewards may lie apart in different company: rounding, at a standard deviation of 2."""

    same_bits: bool = True
    """Whether the same batch gives the same bits again."""

    any_sequence: bool = True
    """Whether it takes any ids, and not only whole triples."""


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
    return Batch.unshared(sequences)


def test_one_float32_reward_for_each_sequence_in_order(engine, claims):
    sequences = draw([5, 60, 17])
    rewards = engine.score(whole(*sequences))
    assert rewards.dtype == np.float32
    assert rewards.shape == (3,)
    assert np.isfinite(rewards).all()
    backwards = engine.score(whole(*sequences[::-1]))
    assert np.abs(rewards - backwards[::-1]).max() <= claims.tolerance
    assert len(set(rewards.tolist())) == 3


def test_an_empty_batch_gives_an_empty_array(engine):
    rewards = engine.score(Batch(()))
    assert rewards.dtype == np.float32
    assert rewards.shape == (0,)


def test_company_does_not_change_a_reward(engine, claims):
    sequences = draw([3, 90, 33, 34])
    alone = np.concatenate([engine.score(whole(ids)) for ids in sequences])
    assert np.abs(engine.score(whole(*sequences)) - alone).max() <= claims.tolerance


def test_a_shared_prefix_does_not_change_a_reward(engine, claims):
    sequences = draw([3, 90, 33, 34])
    alone = np.concatenate([engine.score(whole(ids)) for ids in sequences])
    (batch,) = plan(sequences, token_budget=10_000).batches
    assert batch.computed_tokens < batch.tokens
    assert np.abs(engine.score(batch) - alone[batch.rows]).max() <= claims.tolerance


def test_one_token_is_a_sequence(engine, claims):
    if not claims.any_sequence:
        pytest.skip("an endpoint takes whole triples only")
    assert np.isfinite(engine.score(whole(np.array([9], dtype=np.int32)))).all()


def test_the_same_batch_gives_the_same_bits(engine, claims):
    (batch,) = plan(draw([3, 90, 33]), token_budget=10_000).batches
    first, second = engine.score(batch), engine.score(batch)
    assert first.tobytes() == second.tobytes() or not claims.same_bits
    assert np.abs(first - second).max() <= claims.tolerance


def test_the_budget_is_positive_and_sharing_has_a_limit_or_none(engine):
    assert engine.token_budget > 0
    assert engine.max_shared_length is None or engine.max_shared_length > 0


def test_close_may_be_called_twice(engine):
    """The last of the suite: there are engines of which a process can have but one, and servers take a minute."""
    engine.close()
    engine.close()
