"""The planner: every sequence once, the budget kept, and as much shared as can be."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_ray.planning import EXTRA_BATCH_SHARE, MIN_SHARED_TOKENS, plan


def ids(*values):
    return np.array(values, dtype=np.int32)


def stem(seed, length):
    return np.random.default_rng(seed).integers(0, 1000, length, dtype=np.int32)


@st.composite
def forests(draw):
    """Sequences that grow out of each other, with repeats: what prompts, references and groups look like in ids."""
    sequences = [stem(0, draw(st.integers(1, 60)))]
    for seed in range(1, draw(st.integers(1, 25))):
        parent = sequences[draw(st.integers(0, len(sequences) - 1))]
        kept = draw(st.integers(0, len(parent)))
        grown = np.concatenate([parent[:kept], stem(seed, draw(st.integers(0, 40)))]).astype(np.int32)
        sequences.append(grown if len(grown) else ids(seed))
    return sequences


@given(forests(), st.integers(1, 300), st.booleans())
def test_every_sequence_is_covered_once_and_whole(sequences, token_budget, share_prefixes):
    planned = plan(sequences, token_budget=token_budget, share_prefixes=share_prefixes)
    covered = {}
    for batch in planned.batches:
        for row, sequence in zip(batch.rows.tolist(), batch.sequences(), strict=True):
            assert row not in covered
            covered[row] = sequence
    assert set(covered) == set(planned.first_of.tolist())
    for row, first in enumerate(planned.first_of.tolist()):
        assert np.array_equal(covered[first], sequences[row])
        assert first <= row


@given(forests(), st.integers(1, 300))
def test_a_batch_passes_the_budget_only_for_a_single_sequence(sequences, token_budget):
    for batch in plan(sequences, token_budget=token_budget).batches:
        assert batch.computed_tokens <= token_budget or len(batch) == 1


@given(forests(), st.integers(1, 300))
def test_sharing_never_costs_and_never_takes_a_sequences_last_token(sequences, token_budget):
    shared = plan(sequences, token_budget=token_budget)
    alone = plan(sequences, token_budget=token_budget, share_prefixes=False)
    assert shared.computed_tokens <= alone.computed_tokens
    for batch in shared.batches:
        for place, node in enumerate(batch.nodes):
            following = [other for other in batch.nodes if other.parent == place]
            assert len(node.ids) >= (MIN_SHARED_TOKENS if following else 1)
            assert bool(following) == (node.row is None)
            assert len(following) != 1


@given(forests())
def test_the_same_input_gives_the_same_plan(sequences):
    first, second = (plan(sequences, token_budget=64) for _ in range(2))
    assert [batch.rows.tolist() for batch in first.batches] == [batch.rows.tolist() for batch in second.batches]


def test_a_group_shares_all_it_has_in_common():
    prefix = stem(1, 100)
    rows = [np.concatenate([prefix, stem(10 + k, 20)]) for k in range(4)]
    planned = plan(rows, token_budget=10_000)
    assert planned.computed_tokens == 100 + 4 * 20


@given(forests())
def test_nearly_all_that_can_be_shared_is(sequences):
    """All that a trie of them has but a last token where one sequence begins another, and short nodes."""
    (batch,) = plan(sequences, token_budget=10_000).batches
    texts = set(map(bytes, sequences))
    trie = {text[:end] for text in texts for end in range(4, len(text) + 1, 4)}
    begin_others = sum(any(other != text and other.startswith(text) for other in texts) for text in texts)
    assert len(trie) <= batch.computed_tokens <= len(trie) + begin_others + (MIN_SHARED_TOKENS - 1) * len(texts)


@settings(max_examples=15, deadline=None)
@given(forests(), st.integers(20, 200))
def test_no_other_way_to_cut_costs_less(sequences, token_budget):
    planned = plan(sequences, token_budget=token_budget)
    ordered = [sequence for batch in planned.batches for sequence in batch.sequences()]
    assert [ids.tolist() for ids in ordered] == sorted(ids.tolist() for ids in ordered)
    extra = EXTRA_BATCH_SHARE * token_budget

    @cache
    def least(start):
        """Of all cuts of the sequences from `start` on, tried one by one."""
        if start == len(ordered):
            return 0
        costs = {end: plan(ordered[start:end], token_budget=10_000) for end in range(start + 1, len(ordered) + 1)}
        return min(
            planned.computed_tokens + extra + least(end)
            for end, planned in costs.items()
            if planned.computed_tokens <= token_budget or end == start + 1
        )

    # Nodes that are short in all sequences may not be so in a run of them, and the other way round.
    assert planned.computed_tokens + extra * len(planned.batches) <= least(0) + MIN_SHARED_TOKENS * len(ordered)


def test_groups_within_groups_share_at_every_level():
    prompt = stem(1, 50)
    references = [np.concatenate([prompt, stem(2 + k, 200)]) for k in range(2)]
    rows = [
        np.concatenate([reference, stem(10 + 3 * r + k, 10)])
        for r, reference in enumerate(references)
        for k in range(3)
    ]
    assert plan(rows, token_budget=10_000).computed_tokens == 50 + 2 * 200 + 6 * 10


def test_strangers_beside_a_tight_group_share_what_they_have_in_common():
    common = stem(1, 40)
    tight = np.concatenate([common, stem(2, 100)])
    rows = [np.concatenate([tight, stem(10 + k, 5)]) for k in range(3)]
    rows += [np.concatenate([common, stem(20 + k, 30)]) for k in range(3)]
    assert plan(rows, token_budget=10_000).computed_tokens == 40 + (100 + 15) + 90


def test_a_group_beyond_the_budget_is_split_with_its_prefix_again():
    prefix = stem(1, 100)
    rows = [np.concatenate([prefix, stem(10 + k, 50)]) for k in range(10)]
    planned = plan(rows, token_budget=300)
    assert all(batch.computed_tokens <= 300 for batch in planned.batches)
    assert planned.computed_tokens == 3 * 100 + 10 * 50


def test_duplicates_are_computed_once():
    rows = [stem(1, 30), stem(2, 30), stem(1, 30), stem(1, 30)]
    planned = plan(rows, token_budget=1000)
    assert planned.first_of.tolist() == [0, 1, 0, 0]
    assert planned.duplicates == 2
    assert planned.computed_tokens == 60


def test_long_sequences_stay_unshared_where_the_model_asks():
    prefix = stem(1, 100)
    rows = [np.concatenate([prefix, stem(10 + k, 50)]) for k in range(2)]
    assert plan(rows, token_budget=1000, max_shared_length=149).computed_tokens == 300
    assert plan(rows, token_budget=1000, max_shared_length=150).computed_tokens == 200


def test_nothing_to_plan():
    planned = plan([], token_budget=10)
    assert planned.batches == ()
    assert planned.duplicates == 0


@pytest.mark.parametrize("n_groups", [1, 2])
def test_halves_keep_prefixes_and_lose_nothing(n_groups):
    rows = [np.concatenate([stem(g, 50), stem(10 + 4 * g + k, 9)]) for g in range(n_groups) for k in range(4)]
    (batch,) = plan(rows, token_budget=10_000).batches
    first, second = batch.halves()
    assert sorted([*first.rows.tolist(), *second.rows.tolist()]) == list(range(4 * n_groups))
    assert first.computed_tokens < first.tokens
    assert [single.is_single for single in batch.singles()] == [True] * 4 * n_groups
