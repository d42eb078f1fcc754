"""From token ids to batches: duplicates dropped, common prefixes shared, packed under a token budget, no padding.

Pure: ids in, batches out. The rows of a group share `2P + R` of their `2P + R + O` tokens, so a prefix computed once
is most of the work saved. Sharing is found in the ids, not in the columns: whatever two rows happen to have in common
from their first token on is shared if that saves more than any other grouping of the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
"""Token ids of one sequence, or of a part of it: int32, one dimension."""

Rewards = npt.NDArray[np.float32]

MIN_SHARED_TOKENS = 16
"""Shorter prefixes are not shared: each one is a call of its own in the attention, for every layer."""


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences with a common beginning: `prefix + suffix` for each suffix.

    `prefix` may be empty; every suffix has at least one token, because a reward is read at a sequence's own last
    token. `rows[i]` is the place of sequence `i` in what was given to `plan`.
    """

    prefix: Ids
    suffixes: tuple[Ids, ...]
    rows: tuple[int, ...]

    @property
    def computed_tokens(self) -> int:
        return len(self.prefix) + sum(map(len, self.suffixes))

    @property
    def tokens(self) -> int:
        return len(self.prefix) * len(self.suffixes) + sum(map(len, self.suffixes))


@dataclass(frozen=True)
class Batch:
    """What an engine computes in one call: groups, in order. Rewards come back one per sequence, in that order."""

    groups: tuple[Group, ...]

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """The place of each sequence in what was given to `plan`, in the order of the rewards."""
        return np.array([row for group in self.groups for row in group.rows], dtype=np.int64)

    @property
    def computed_tokens(self) -> int:
        """Tokens that go through the model: each prefix once."""
        return sum(group.computed_tokens for group in self.groups)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, as an engine without sharing would compute them."""
        return sum(group.tokens for group in self.groups)

    def __len__(self) -> int:
        return sum(len(group.suffixes) for group in self.groups)

    @property
    def is_single(self) -> bool:
        """Whether this is one sequence, computed whole."""
        return len(self) == 1 and len(self.groups[0].prefix) == 0

    def halves(self) -> tuple[Batch, Batch]:
        """The batch in two, prefixes kept; for finding the sequence that a failure belongs to. Needs two sequences."""
        if len(self.groups) > 1:
            middle = len(self.groups) // 2
            return Batch(self.groups[:middle]), Batch(self.groups[middle:])
        (group,) = self.groups
        middle = len(group.suffixes) // 2
        first = Group(group.prefix, group.suffixes[:middle], group.rows[:middle])
        second = Group(group.prefix, group.suffixes[middle:], group.rows[middle:])
        return Batch((first,)), Batch((second,))

    def singles(self) -> Iterator[Batch]:
        """Each sequence as a batch of its own, nothing shared."""
        for row, sequence in zip(self.rows.tolist(), self.sequences(), strict=True):
            yield Batch((Group(sequence[:0], (sequence,), (row,)),))

    def sequences(self) -> Iterator[Ids]:
        """Each sequence whole, for engines that share prefixes by themselves or not at all."""
        for group in self.groups:
            for suffix in group.suffixes:
                yield np.concatenate([group.prefix, suffix]) if len(group.prefix) else suffix


@dataclass(frozen=True)
class Plan:
    """Batches over the distinct sequences; `first_of[i]` is the first row whose sequence equals row `i`'s."""

    batches: tuple[Batch, ...]
    first_of: npt.NDArray[np.int64]

    @property
    def computed_tokens(self) -> int:
        return sum(batch.computed_tokens for batch in self.batches)

    def rewards(self, score: Callable[[Batch], Rewards]) -> Rewards:
        """One reward per row that was planned, float32, in order, from what `score` gives for each batch."""
        rewards = np.full(len(self.first_of), np.nan, dtype=np.float32)
        for batch in self.batches:
            rewards[batch.rows] = score(batch)
        return rewards[self.first_of]

    def computed_by_row(self) -> npt.NDArray[np.int64]:
        """Computed tokens of each row; a group's prefix is its first row's, and a duplicate costs nothing."""
        computed = np.zeros(len(self.first_of), dtype=np.int64)
        for batch in self.batches:
            for group in batch.groups:
                computed[list(group.rows)] = [len(suffix) for suffix in group.suffixes]
                computed[group.rows[0]] += len(group.prefix)
        return computed

    @property
    def duplicates(self) -> int:
        """Rows that get their reward from an identical row."""
        return int((self.first_of != np.arange(len(self.first_of))).sum())


def plan(
    sequences: Sequence[Ids],
    *,
    token_budget: int,
    share_prefixes: bool = True,
    max_shared_length: int | None = None,
) -> Plan:
    """Batches of at most `token_budget` computed tokens that cover every distinct sequence once.

    A sequence longer than the budget gets a batch of its own. Sequences longer than `max_shared_length` are computed
    unshared, for models whose rotary base depends on the length of the whole sequence. The same input always gives
    the same plan.
    """
    keys = [sequence.astype(">i4").tobytes() for sequence in sequences]  # big-endian bytes sort as the ids do
    first_of = np.arange(len(sequences), dtype=np.int64)
    first_with: dict[bytes, int] = {}
    for row, key in enumerate(keys):
        first_of[row] = first_with.setdefault(key, row)
    order = sorted(first_with.values(), key=keys.__getitem__)

    if share_prefixes:
        limit = max_shared_length or max(map(len, sequences), default=0)
        shared = _best_groups([sequences[row] for row in order], limit)
    else:
        shared = [(0, [place]) for place in range(len(order))]
    groups = [_build_group(sequences, [order[place] for place in places], length) for length, places in shared]
    parts = [part for group in groups for part in _split(group, token_budget)]
    parts.sort(key=lambda part: (-part.computed_tokens, part.rows))
    return Plan(tuple(_pack(parts, token_budget)), first_of)


def common_length(a: Ids, b: Ids) -> int:
    """Length of the prefix that `a` and `b` have in common."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


@dataclass(slots=True)
class _Node:
    """A set of sequences that agree on their first `depth` ids, with the best grouping found for it."""

    depth: int
    children: list[_Node] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    groups: list[tuple[int, list[int]]] = field(default_factory=list)
    saved_tokens: int = 0

    def close(self) -> _Node:
        """Choose which children to merge at this depth and which to leave as they were grouped below.

        Merging a child saves `depth` tokens for each of its sequences, less one `depth` for the prefix itself;
        leaving it saves what it saved below. Each child's choice is independent of the others'.
        """
        merged = [child for child in self.children if self.depth * len(child.places) > child.saved_tokens]
        kept = [child for child in self.children if self.depth * len(child.places) <= child.saved_tokens]
        merged_places = [place for child in merged for place in child.places]
        gain = self.depth * (len(merged_places) - 1) - sum(child.saved_tokens for child in merged)
        self.places = [place for child in self.children for place in child.places]
        self.saved_tokens = sum(child.saved_tokens for child in self.children) + max(0, gain)
        if gain > 0:
            self.groups = [(self.depth, merged_places), *(group for child in kept for group in child.groups)]
        else:
            self.groups = [group for child in self.children for group in child.groups]
        self.children = []
        return self


def _best_groups(ordered: list[Ids], max_shared_length: int) -> list[tuple[int, list[int]]]:
    """(prefix length, places) of groups over sorted distinct sequences, so that the tokens saved are the most.

    The common prefixes of sorted sequences form a tree; it is built with a stack from the lengths that neighbours
    share, and each node is closed as soon as the sort leaves it.
    """
    root = _Node(0)
    stack = [root]
    for place, sequence in enumerate(ordered):
        carry = _Node(0, places=[place], groups=[(0, [place])])
        following = ordered[place + 1] if place + 1 < len(ordered) else sequence[:0]
        depth = _shareable_length(sequence, following, max_shared_length)
        while stack[-1].depth > depth:
            stack[-1].children.append(carry)
            carry = stack.pop().close()
        if stack[-1].depth == depth:
            stack[-1].children.append(carry)
        else:
            stack.append(_Node(depth, [carry]))
    return root.close().groups


def _shareable_length(a: Ids, b: Ids, max_shared_length: int) -> int:
    """Length of the common prefix worth sharing; at least one token stays on each side for the reward's position."""
    if max(len(a), len(b)) > max_shared_length:
        return 0
    common = common_length(a[:-1], b[:-1])
    return common if common >= MIN_SHARED_TOKENS else 0


def _build_group(sequences: Sequence[Ids], rows: list[int], length: int) -> Group:
    return Group(sequences[rows[0]][:length], tuple(sequences[row][length:] for row in rows), tuple(rows))


def _split(group: Group, token_budget: int) -> Iterator[Group]:
    """The group in parts that fit the budget, each with the prefix again; as few and as even as possible."""
    room = max(token_budget - len(group.prefix), 1)
    n_parts = max(1, -(-sum(map(len, group.suffixes)) // room))
    target = sum(map(len, group.suffixes)) / n_parts
    start, used = 0, 0
    for end, suffix in enumerate(group.suffixes):
        if end > start and (used + len(suffix) > room or used >= target):
            yield Group(group.prefix, group.suffixes[start:end], group.rows[start:end])
            start, used = end, 0
        used += len(suffix)
    yield Group(group.prefix, group.suffixes[start:], group.rows[start:])


def _pack(parts: list[Group], token_budget: int) -> Iterator[Batch]:
    """Parts in the order given, as many to a batch as the budget allows."""
    taken: list[Group] = []
    used = 0
    for part in parts:
        if taken and used + part.computed_tokens > token_budget:
            yield Batch(tuple(taken))
            taken, used = [], 0
        taken.append(part)
        used += part.computed_tokens
    if taken:
        yield Batch(tuple(taken))
