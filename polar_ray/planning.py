"""From token ids to batches: duplicates dropped, common prefixes shared, packed under a token budget, no padding.

Pure: ids in, batches out. The rows of a group share `2P + R` of their `2P + R + O` tokens, so a prefix computed once
is most of the work saved; rows of one prompt or one system prompt share that again. Sharing is found in the ids, not in
the columns: sorted, sequences form a trie, and a batch is a run of them, each node of it computed once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
"""Token ids of one sequence, or of a part of it: int32, one dimension."""

Rewards = npt.NDArray[np.float32]

MIN_SHARED_TOKENS = 16
"""Shorter parts of a prefix are no node of their own: each one is a call in the attention, for every layer."""

EXTRA_BATCH_SHARE = 1 / 16
"""What one batch more may cost instead of a prefix computed again, as a share of the budget: a batch has costs of its
own, and one that is far from full runs slower."""


@dataclass(frozen=True, slots=True)
class Node:
    """Ids that follow those of another node: the end of a sequence, or a prefix that several have in common."""

    ids: Ids
    """At least one."""

    parent: int | None = None
    """Place in the batch of the node that comes before, a smaller one than this node's; None at the beginning."""

    row: int | None = None
    """Place in what was given to `plan` of the sequence that ends here; None where sequences go on."""


@dataclass(frozen=True)
class Batch:
    """What an engine computes in one call: a trie of sequences, each node before those that follow it.

    Rewards come back one per sequence, in the order of the nodes that end them.
    """

    nodes: tuple[Node, ...]

    @classmethod
    def unshared(cls, sequences: Iterable[Ids]) -> Batch:
        """Every sequence whole, numbered from 0."""
        return cls(tuple(Node(ids, row=row) for row, ids in enumerate(sequences)))

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """The place of each sequence in what was given to `plan`, in the order of the rewards."""
        return np.array([node.row for node in self.nodes if node.row is not None], dtype=np.int64)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """How many tokens of its sequences come before each node."""
        starts: list[int] = []
        for node in self.nodes:
            starts.append(0 if node.parent is None else starts[node.parent] + len(self.nodes[node.parent].ids))
        return tuple(starts)

    @property
    def computed_tokens(self) -> int:
        """Tokens that go through the model: each prefix once."""
        return sum(len(node.ids) for node in self.nodes)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, as an engine without sharing would compute them."""
        ends = zip(self.starts, self.nodes, strict=True)
        return sum(start + len(node.ids) for start, node in ends if node.row is not None)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_single(self) -> bool:
        """Whether this is one sequence, computed whole."""
        return len(self.nodes) == 1

    def path(self, place: int) -> list[int]:
        """Places of the nodes before the one at `place`, from the beginning."""
        before: list[int] = []
        parent = self.nodes[place].parent
        while parent is not None:
            before.append(parent)
            parent = self.nodes[parent].parent
        return before[::-1]

    def halves(self) -> tuple[Batch, Batch]:
        """The batch in two, prefixes kept; for finding the sequence that a failure belongs to. Needs two sequences."""
        ends = [place for place, node in enumerate(self.nodes) if node.row is not None]
        middle = len(ends) // 2
        return self._only(ends[:middle]), self._only(ends[middle:])

    def singles(self) -> Iterator[Batch]:
        """Each sequence as a batch of its own, nothing shared."""
        for row, sequence in zip(self.rows.tolist(), self.sequences(), strict=True):
            yield Batch((Node(sequence, row=row),))

    def sequences(self) -> Iterator[Ids]:
        """Each sequence whole, for engines that share prefixes by themselves or not at all."""
        for place, node in enumerate(self.nodes):
            if node.row is not None:
                parts = [self.nodes[before].ids for before in self.path(place)]
                yield np.concatenate([*parts, node.ids]) if parts else node.ids

    def _only(self, ends: Sequence[int]) -> Batch:
        kept = sorted({*ends, *(before for end in ends for before in self.path(end))})
        moved = {place: number for number, place in enumerate(kept)}
        nodes = (self.nodes[place] for place in kept)
        return Batch(tuple(Node(n.ids, None if n.parent is None else moved[n.parent], n.row) for n in nodes))


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
        """Computed tokens of each row; a prefix is its first row's, and a duplicate costs nothing."""
        computed = np.zeros(len(self.first_of), dtype=np.int64)
        for batch in self.batches:
            shared = 0
            for node in batch.nodes:
                if node.row is None:
                    shared += len(node.ids)
                else:
                    computed[node.row] = shared + len(node.ids)
                    shared = 0
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

    ordered = [sequences[row] for row in order]
    shared = [0] * len(order)
    if share_prefixes:
        shared = _shared_lengths(ordered, max_shared_length or max(map(len, sequences), default=0))
    runs = _cut(list(map(len, ordered)), shared, token_budget)
    batches = (Batch(tuple(_grow(ordered[run], shared[run], order[run]))) for run in runs)
    return Plan(tuple(batches), first_of)


def common_length(a: Ids, b: Ids) -> int:
    """Length of the prefix that `a` and `b` have in common."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def _shared_lengths(ordered: Sequence[Ids], max_shared_length: int) -> list[int]:
    """How many tokens each of the sorted sequences shares with the one before it, 0 for the first.

    The lengths that neighbours share are the depths of the sequences' trie. Where a node would have fewer than
    `MIN_SHARED_TOKENS` of its own, what follows it grows out of its parent instead.
    """
    common = [0, *(_shareable_length(a, b, max_shared_length) for a, b in pairwise(ordered))][: len(ordered)]
    before = _nearest_smaller(common)
    after = [len(common) - 1 - place for place in reversed(_nearest_smaller(common[::-1]))]
    lengths = {-1: 0, len(common): 0}
    for place in sorted(range(len(common)), key=common.__getitem__):
        parent = max(lengths[before[place]], lengths[after[place]])
        lengths[place] = common[place] if common[place] - parent >= MIN_SHARED_TOKENS else parent
    return [lengths[place] for place in range(len(common))]


def _nearest_smaller(values: Sequence[int]) -> list[int]:
    """Where before each value the nearest smaller one is; -1 if there is none."""
    nearest: list[int] = []
    rising: list[int] = []
    for place, value in enumerate(values):
        while rising and values[rising[-1]] >= value:
            rising.pop()
        nearest.append(rising[-1] if rising else -1)
        rising.append(place)
    return nearest


def _shareable_length(a: Ids, b: Ids, max_shared_length: int) -> int:
    """Length of the common prefix; at least one token stays on each side for the reward's position."""
    return 0 if max(len(a), len(b)) > max_shared_length else common_length(a[:-1], b[:-1])


def _cut(lengths: Sequence[int], shared: Sequence[int], token_budget: int) -> list[slice]:
    """The sorted sequences in runs whose tries fit the budget, so that the tokens computed and `EXTRA_BATCH_SHARE` for
    each run are the least together: a run's first sequence is computed whole, what it shares with the one before again.

    The shortest path through the places to cut at. A start that has become too early for one end is so for all later
    ones, and one that is no better than a later one is never needed again: so starts wait in a queue.
    """
    up_to = [0, *accumulate(length - common for length, common in zip(lengths, shared, strict=True))]
    least, begun = [0.0], []
    starts: deque[tuple[float, int]] = deque()
    for end in range(1, len(up_to)):
        cost = least[-1] + shared[end - 1] + EXTRA_BATCH_SHARE * token_budget
        while starts and starts[-1][0] > cost:
            starts.pop()
        starts.append((cost, end - 1))
        while (start := starts[0][1]) < end - 1 and up_to[end] - up_to[start] + shared[start] > token_budget:
            starts.popleft()
        least.append(starts[0][0])
        begun.append(start)
    runs = []
    end = len(lengths)
    while end:
        runs.append(slice(begun[end - 1], end))
        end = begun[end - 1]
    return runs[::-1]


def _grow(sequences: Sequence[Ids], shared: Sequence[int], rows: Sequence[int]) -> Iterator[Node]:
    """The nodes of a run of sorted sequences that share so many tokens with the one before each."""
    path: list[tuple[int, int]] = []  # of the prefixes that are still shared: where each ends, and its place
    place = 0
    for number, (ids, row) in enumerate(zip(sequences, rows, strict=True)):
        depth = shared[number] if number else 0
        while path and path[-1][0] > depth:
            path.pop()
        for end in _depths_after(shared, number, depth):
            yield Node(ids[depth:end], path[-1][1] if path else None)
            path.append((end, place))
            depth, place = end, place + 1
        yield Node(ids[depth:], path[-1][1] if path else None, row)
        place += 1


def _depths_after(shared: Sequence[int], number: int, depth: int) -> list[int]:
    """Where, beyond `depth`, later sequences leave the one with this number, the first place first."""
    depths: list[int] = []
    for later in range(number + 1, len(shared)):
        if shared[later] <= depth:
            break
        if not depths or shared[later] < depths[-1]:
            depths.append(shared[later])
    return depths[::-1]
