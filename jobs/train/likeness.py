"""How alike two answers to a prompt are, as far as words and layout show it: a teacher for a small model.

Whether two answers come from one policy is a noisy label, and a small model that starts with it learns next to nothing.
A linear model over eight features of a pair of texts gets about as far as texts of this length allow, and what it gives
is a smooth target: any answers to a prompt can be graded by it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

CHARACTER_FEATURES = 20_000
ROWS_AT_A_TIME = 2_000


class Likeness:
    """Fitted on choices: which of two answers is by the policy that wrote the reference.

    Answers are named by their index in `texts`; `ended` says whether each came to its end or was cut at its limit.
    """

    def __init__(self, texts: Sequence[str], ended: Sequence[bool], choices: Sequence[tuple[int, int, int]]) -> None:
        """`choices` are (reference, chosen, rejected)."""
        self._texts = texts
        self._ended = np.asarray(ended, dtype=np.float64)
        reference, chosen, rejected = np.asarray(choices).T
        differences = self._features(reference, chosen) - self._features(reference, rejected)
        model = LogisticRegression(fit_intercept=False, C=1.0)
        model.fit(np.vstack([differences, -differences]), np.repeat([1, 0], len(differences)))
        self.weights: np.ndarray[Any, np.dtype[np.float64]] = model.coef_[0]

    def grades(self, reference: int, answers: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """How alike each is to the reference: higher is more; differences are log odds. float64[answers]."""
        features = self._features(np.full(len(answers), reference), np.asarray(answers))
        return np.asarray(features @ self.weights)

    def _features(self, one: Any, other: Any) -> Any:
        parts = [slice(start, start + ROWS_AT_A_TIME) for start in range(0, len(one), ROWS_AT_A_TIME)]
        return np.vstack([self._features_of(one[part], other[part]) for part in parts])

    def _features_of(self, one: Any, other: Any) -> Any:
        shared = [np.asarray(matrix[one].multiply(matrix[other]).sum(axis=1)).ravel() for matrix in self._matrices]
        ended = self._ended[one] == self._ended[other]
        return np.column_stack([*shared, ended, -np.abs(self._shapes[one] - self._shapes[other])])

    @cached_property
    def _matrices(self) -> list[Any]:
        """TF-IDF of words, of character trigrams and of marks, a row a text."""
        makers = (
            TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+"),
            TfidfVectorizer(sublinear_tf=True, analyzer="char", ngram_range=(1, 3), max_features=CHARACTER_FEATURES),
            TfidfVectorizer(sublinear_tf=True, token_pattern=r"[^\w\s]|\n"),
        )
        return [maker.fit_transform(self._texts) for maker in makers]

    @cached_property
    def _shapes(self) -> Any:
        shapes = np.array([_shape(text) for text in self._texts])
        return (shapes - shapes.mean(axis=0)) / (shapes.std(axis=0) + 1e-6)


def _shape(text: str) -> tuple[float, ...]:
    """Length, lines, how varied the words are, commas a word."""
    words = re.findall(r"\w+", text)
    count = max(1, len(words))
    return np.log1p(len(text)), np.log1p(text.count("\n")), len(set(words)) / count, text.count(",") / count
