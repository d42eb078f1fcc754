"""Signs that rewards are not what they seem, from small sums that add up: of a request, a unit, a job.

None of them is proof. Rewards that drift, that go with length or that echo the reference pay for are what a policy
that games its reward model, a broken prompt template and a changed corpus all look like.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from pydantic import BaseModel, Field

from polar_ray.triples import Row, Scored, Triple, join_text

REWARD_BIN = 0.25
"""Width of a histogram bin in reward units; published POLAR-7B rewards run from about -12 to 1."""

LONG_REFERENCE_CHARACTERS = 40
"""An output that contains a shorter reference may just be right: "Paris." is in every good answer."""

DRIFT_BINS = 10
"""Into which the reference's rewards are divided, about equally many in each."""

REFERENCE_ROWS = 1000
RECENT_ROWS = 1000
"""Two samples of one distribution of this size are some 0.02 apart."""

FEWEST_RECENT_ROWS = 500

NO_VARIANCE = 1e-9
"""Of rewards: standard deviations of 3e-5 are an engine's rounding."""


class Spread(BaseModel):
    """How far apart rewards within groups are. A group: neighbouring rows with one prompt and reference."""

    groups: int = 0
    """Groups of at least two rewarded rows."""

    zero_groups: int = 0
    """Groups whose rewards are all equal; to a group-relative trainer they teach nothing."""

    bins: dict[int, int] = Field(default_factory=dict)
    """Bin `b` holds groups whose highest and lowest reward are `b * REWARD_BIN` to the next apart."""


class Moments(BaseModel):
    """Sums over pairs of numbers, from which their correlation follows."""

    n: float = 0
    x: float = 0
    y: float = 0
    xx: float = 0
    yy: float = 0
    xy: float = 0

    def add(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        """Pairs, of which `xs` and `ys` are the halves."""
        self.n += len(xs)
        self.x += sum(xs)
        self.y += sum(ys)
        self.xx += sum(x * x for x in xs)
        self.yy += sum(y * y for y in ys)
        self.xy += sum(x * y for x, y in zip(xs, ys, strict=True))

    def __iadd__(self, other: Moments) -> Moments:
        for name in Moments.model_fields:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def scale(self, factor: float) -> None:
        """Let every pair so far count for `factor` of what it did."""
        for name in Moments.model_fields:
            setattr(self, name, getattr(self, name) * factor)

    @property
    def correlation(self) -> float | None:
        """Pearson's; None where one of the two does not vary."""
        if not self.n:
            return None
        varies_x, varies_y = _variance(self.n, self.x, self.xx), _variance(self.n, self.y, self.yy)
        if not varies_x or not varies_y:
            return None
        together = self.xy / self.n - self.x / self.n * self.y / self.n
        return max(-1.0, min(1.0, together / math.sqrt(varies_x * varies_y)))


class RewardHealth(BaseModel):
    """Of rewarded rows whose texts are known."""

    rows: int = 0
    equal_echoes: int = 0
    """Outputs that are the reference."""

    contained_echoes: int = 0
    """Outputs that hold the whole of a reference of `LONG_REFERENCE_CHARACTERS` or more, and something else."""

    length: Moments = Field(default_factory=Moments)
    """Characters of the output, and reward."""

    length_in_groups: Moments = Field(default_factory=Moments)
    """The same, less the means of the row's group: what a group-relative trainer sees."""

    def __iadd__(self, other: RewardHealth) -> RewardHealth:
        self.rows += other.rows
        self.equal_echoes += other.equal_echoes
        self.contained_echoes += other.contained_echoes
        self.length += other.length
        self.length_in_groups += other.length_in_groups
        return self


def examine(rows: Sequence[Row], scored: Sequence[Scored]) -> tuple[RewardHealth, Spread]:
    """What rows and their rewards look like. Only triples with a reward count."""
    health, spread = RewardHealth(), Spread()
    all_lengths: list[float] = []
    all_rewards: list[float] = []
    own_lengths: list[float] = []
    own_rewards: list[float] = []
    for group in _groups(rows, scored):
        rewards = [reward for _, reward in group]
        outputs = [join_text(triple.output, "output") for triple, _ in group]
        lengths = [len(output) for output in outputs]
        reference = join_text(group[0][0].reference, "reference").strip()
        for output in outputs:
            _note_echo(health, reference, output.strip())
        all_lengths += lengths
        all_rewards += rewards
        if len(group) < 2:
            continue
        mean_length, mean_reward = sum(lengths) / len(group), math.fsum(rewards) / len(group)
        own_lengths += [length - mean_length for length in lengths]
        own_rewards += [reward - mean_reward for reward in rewards]
        width = max(rewards) - min(rewards)
        spread.groups += 1
        spread.zero_groups += width == 0
        step = math.floor(width / REWARD_BIN)
        spread.bins[step] = spread.bins.get(step, 0) + 1
    health.rows = len(all_rewards)
    health.length.add(all_lengths, all_rewards)
    health.length_in_groups.add(own_lengths, own_rewards)
    return health, spread


def reward_bin(reward: float) -> int:
    """Bin `b` holds rewards from `b * REWARD_BIN` to the next."""
    return math.floor(reward / REWARD_BIN)


def drift(reference: Mapping[int, float], recent: Mapping[int, float]) -> float | None:
    """How far `recent` rewards lie from `reference`, both by `reward_bin`: the population stability index.

    That is the sum over ranges of (share then less share before) times the logarithm of their ratio, over ranges that
    hold about a tenth of the reference each; 0 for equal ones. By a common rule less than 0.1 is no change and more
    than 0.25 a large one. None where either is empty.
    """
    before, after = sum(reference.values()), sum(recent.values())
    if not before or not after:
        return None
    edges = _edges(reference)
    was, now = (_shares(bins, edges) for bins in (reference, recent))
    return sum((b - a) * math.log(b / a) for a, b in zip(was, now, strict=True))


class RecentHealth:
    """A stream's latest rewards beside its first. Older ones count less and less."""

    def __init__(self) -> None:
        self._reference: dict[int, float] = {}
        self._reference_rows = 0
        self._recent: dict[int, float] = {}
        self._length, self._length_in_groups = Moments(), Moments()

    def add(self, reward_bins: Mapping[int, int], health: RewardHealth) -> None:
        """The next rows of the stream."""
        rows = sum(reward_bins.values())
        if self._reference_rows < REFERENCE_ROWS:
            _merge(self._reference, reward_bins)
            self._reference_rows += rows
        else:
            while sum(self._recent.values()) > RECENT_ROWS:
                self._recent = {place: count / 2 for place, count in self._recent.items()}
            _merge(self._recent, reward_bins)
        for mine, theirs in ((self._length, health.length), (self._length_in_groups, health.length_in_groups)):
            while mine.n > RECENT_ROWS:
                mine.scale(0.5)
            mine += theirs

    @property
    def drift(self) -> float | None:
        """Of the latest rows from the first `REFERENCE_ROWS`; None until there are enough of both."""
        return drift(self._reference, self._recent) if sum(self._recent.values()) >= FEWEST_RECENT_ROWS else None

    @property
    def length_correlation(self) -> float | None:
        return self._length.correlation if self._length.n >= FEWEST_RECENT_ROWS else None

    @property
    def length_correlation_in_groups(self) -> float | None:
        return self._length_in_groups.correlation if self._length_in_groups.n >= FEWEST_RECENT_ROWS else None


def mean_of_bins(reward_bins: Mapping[int, float]) -> float:
    """Of rewards (at least one) taken to lie in the middle of their bins."""
    return sum((place + 0.5) * n for place, n in reward_bins.items()) * REWARD_BIN / sum(reward_bins.values())


def _variance(n: float, total: float, squares: float) -> float:
    """0 where what there is may be rounding, of the sums or of the numbers."""
    found = squares / n - (total / n) ** 2
    return found if found > NO_VARIANCE * max(1.0, squares / n) else 0.0


def _edges(reference: Mapping[int, float]) -> list[int]:
    """Where the ranges of `drift` after the first begin. The first and the last lie beyond the reference."""
    full, seen, edges = sum(reference.values()) / DRIFT_BINS, 0.0, [min(reference)]
    for place in sorted(reference):
        if seen >= full:
            edges.append(place)
            seen = 0.0
        seen += reference[place]
    return [*edges, max(reference) + 1]


def _shares(bins: Mapping[int, float], edges: Sequence[int]) -> list[float]:
    """Of each range; half a row more in each, so that an empty one is far away and not infinitely far."""
    counts = [0.5] * (len(edges) + 1)
    for place, count in bins.items():
        counts[bisect_right(edges, place)] += count
    return [count / sum(counts) for count in counts]


def _groups(rows: Sequence[Row], scored: Sequence[Scored]) -> Iterator[list[tuple[Triple, float]]]:
    """Rewarded triples with their rewards, neighbours with one prompt and reference together."""
    found = [
        (row, result.reward)
        for row, result in zip(rows, scored, strict=True)
        if isinstance(row, Triple) and result.reward is not None
    ]
    for _, members in groupby(found, key=lambda member: (member[0].prompt, member[0].reference)):
        yield list(members)


def _note_echo(health: RewardHealth, reference: str, output: str) -> None:
    if output == reference:
        health.equal_echoes += 1
    elif len(reference) >= LONG_REFERENCE_CHARACTERS and reference in output:
        health.contained_echoes += 1


def _merge(mine: dict[int, float], theirs: Mapping[int, int]) -> None:
    for place, count in theirs.items():
        mine[place] = mine.get(place, 0.0) + count
