"""How differently two answers are written: what is counted of them, and the odds that one policy wrote both.

Shares of some kinds of pieces in the two halves of a sequence (Burrows's Delta), how many different pieces they have in
common, how long they are and whether both were finished: in a logistic model these tell better whether one policy wrote
both than the reward of a small model does. `add_style.py` writes that model into a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sources import Sources, held_out

from polar_ray.encoding.encode import EncodedTriple
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.triples import PreferencePair

MARKS = {"comma": ",", "stop": ".", "quote": "'", "star": "*", "dash": "-", "call": "!", "double": '"', "colon": ":"}
WORDS = (
    "and And",
    "the The",
    "that which That",
    "of",
    "or Or",
    "help assist happy please Please sorry Sorry",
    "this This these These",
    "to To",
    "if If",
    "AI language model",
    "so So also Also",
    "you You your Your",
    "a A an An",
    "is are Is was were",
    "be been being",
)
"""Kinds of pieces whose shares are compared, beside those with a mark in them and empty lines: of 67 that a person
would think of, the ones that a greedy search on training pairs took first."""

FINISHED = ".!?\"')`"
"""How the last piece of an answer ends that was not cut at its limit."""

KIND_COUNT = 1 + len(MARKS) + len(WORDS)


@dataclass(frozen=True)
class Style:
    """The logistic model. Its features are negative: the more the halves differ, the lower."""

    kinds: NDArray[np.float64]
    spread: NDArray[np.float64]
    """What a difference of shares is divided by, kind by kind."""

    common: float
    longer: float
    shorter: float
    square: float
    ended: float

    def log_odds(self, measured: NDArray[np.float64]) -> NDArray[np.float64]:
        """That one policy wrote both halves, up to a constant, of `measured` `[sequences, measures]`."""
        others = (self.common, self.longer, self.shorter, self.square, self.ended)
        return np.asarray(_features(measured, self.spread) @ np.array([*self.kinds, *others]))


@dataclass(frozen=True)
class Half:
    """What is counted of one half, which is prompt and answer without the tokens of the frame."""

    kinds: NDArray[np.float64]
    pieces: frozenset[int]
    tokens: int
    ended: bool


def kinds_of(pieces: Sequence[str]) -> NDArray[np.float64]:
    """Which kinds each piece is of, `[pieces, kinds]`, 0 or 1."""
    texts = [piece.replace("\u2581", " ") for piece in pieces]
    bare = [text.strip(" ") for text in texts]
    empty_line = [text.count("\n") >= 2 for text in texts]
    marks = [[mark in text for text in bare] for mark in MARKS.values()]
    words = [[text in kind.split() for text in bare] for kind in WORDS]
    return np.array([empty_line, *marks, *words], dtype=np.float64).T


def endings_of(pieces: Sequence[str]) -> NDArray[np.bool_]:
    """Of each piece, whether an answer that ends with it looks finished."""
    return np.array([bool(bare) and bare[-1] in FINISHED for bare in (piece.strip("\u2581 ") for piece in pieces)])


class Counter:
    """Counts halves of encoded pairs, as the added heads do."""

    def __init__(self, tokenizer: PolarTokenizer) -> None:
        pieces = [tokenizer.piece(id) for id in range(tokenizer.vocab_size)]
        ordinary = ~tokenizer.is_control
        self.kinds = kinds_of(pieces) * ordinary[:, None]
        self.endings = endings_of(pieces) & ordinary

    def measure(self, sequences: Sequence[EncodedTriple]) -> NDArray[np.float64]:
        """`[sequences, measures]`: differences of the halves' shares of kinds; what share of all tokens is a piece that
        both have; the second half's share of all tokens, less one half; and whether just one half was finished."""
        return np.array([self._measure(sequence) for sequence in sequences])

    def _measure(self, sequence: EncodedTriple) -> NDArray[np.float64]:
        first, second = (
            self._count(sequence.ids[1 : sequence.halfway - 1]),
            self._count(sequence.ids[sequence.halfway : -1]),
        )
        before, after = first.tokens + 1, second.tokens + 2  # with the frame: one token before, separator and score
        shares = second.kinds / after - first.kinds / before
        common = len(first.pieces & second.pieces) / (before + after)
        return np.array([*shares, common, after / (before + after) - 0.5, float(first.ended != second.ended)])

    def _count(self, ids: NDArray[np.int32]) -> Half:
        ended = bool(len(ids)) and bool(self.endings[ids[-1]])
        return Half(self.kinds[ids].sum(0), frozenset(ids.tolist()), len(ids), ended)


def fit(pairs: Sequence[tuple[EncodedTriple, EncodedTriple]], counter: Counter) -> Style:
    """The logistic model of which output is by the policy that wrote the reference."""
    chosen, rejected = (counter.measure([pair[side] for pair in pairs]) for side in (0, 1))
    spread = np.abs(chosen[:, :KIND_COUNT]).mean(0) * 1.25 + 1e-9
    differences = _features(chosen, spread) - _features(rejected, spread)
    scales = differences.std(0) + 1e-12
    model = LogisticRegression(fit_intercept=False, C=0.01, max_iter=300)
    model.fit(np.vstack([differences, -differences]) / scales, np.repeat([1, 0], len(differences)))
    weights = model.coef_[0] / scales
    print(f"{(differences @ weights > 0).mean():.1%} of {len(pairs):,} training pairs by style alone")
    return Style(weights[:KIND_COUNT], spread, *map(float, weights[KIND_COUNT:]))


def _features(measured: NDArray[np.float64], spread: NDArray[np.float64]) -> NDArray[np.float64]:
    kinds, (common, length, ended) = measured[:, :KIND_COUNT] / spread, measured[:, KIND_COUNT:].T
    columns = (common, -np.maximum(0, length), -np.maximum(0, -length), -(length**2), -ended)
    return np.column_stack([-kinds * np.tanh(2 * kinds), *columns])


def training_pairs(sources: Sources) -> Iterator[PreferencePair]:
    """The same-policy pairs that are not held out, but those that cannot be scored or told apart."""
    for pair in sources.same_policy_pairs():
        outputs = pair.reference, pair.chosen, pair.rejected
        if not held_out(pair.question) and all(map(str.strip, outputs)) and pair.chosen != pair.rejected:
            yield PreferencePair(pair.prompt, *outputs, wrapper=pair.wrapper)
