"""Baselines see what they should, in any script, and nothing else."""

import numpy as np
import pytest

from polar_ray.errors import TripleError
from polar_ray.evaluation.baselines import TERM, baseline_values, plain_texts
from polar_ray.triples import Triple


def values_of(reference, *outputs):
    return baseline_values(plain_texts([Triple("p", reference, output) for output in outputs]))


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("It's 80 km/h.", ["It", "s", "80", "km", "h"]),
        ("答案是 10 个。", ["答", "案", "是", "10", "个"]),
        ("选A，因为x=3", ["选", "A", "因", "为", "x", "3"]),
        ("ありがとう ok 감사", ["あ", "り", "が", "と", "う", "ok", "감", "사"]),
        ("naïve Straße", ["naïve", "Straße"]),
        ("…！", []),
    ],
)
def test_a_term_is_a_character_of_scripts_without_spaces_and_a_word_of_the_others(text, terms):
    assert TERM.findall(text) == terms


def test_lengths_are_characters_and_closer_ones_to_the_reference_are_higher():
    found = values_of("12345", "1234567890", "1234", "12345")
    assert found["longer"].tolist() == [10, 4, 5]
    assert found["closer_length"].tolist() == [-5, -1, 0]


@pytest.mark.parametrize(
    ("reference", "close", "far"),
    [
        ("The answer is 42 apples.", "So there are 42 apples", "So there are 17 pears"),
        ("夏至这一天白天最长", "是夏至", "是冬季"),
    ],
    ids=["English", "Chinese"],
)
def test_words_in_common_with_the_reference_raise_the_cosine(reference, close, far):
    cosines = values_of(reference, close, far, reference, "!!!")["tfidf"]
    assert cosines[2] == pytest.approx(1)
    assert cosines[0] > cosines[1]
    assert cosines[3] == 0


def test_equal_outputs_are_tied_to_the_last_bit():
    cosines = values_of("a b c d e f g", *["a c e " * n for n in (3, 3, 6, 6)])["tfidf"]
    assert cosines[0] == cosines[1]
    assert cosines[2] == cosines[3]


def test_what_is_no_text_has_no_value_and_messages_are_joined():
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    rows = [Triple("p", "ab cd", chat), TripleError("no"), Triple("p", "r", "a\ud800")]
    found = baseline_values(plain_texts(rows))
    assert found["longer"][0] == len("ab\ncd")
    assert found["tfidf"][0] == pytest.approx(1)
    for values in found.values():
        assert np.isnan(values).tolist() == [False, True, True]


def test_texts_without_any_word_have_no_cosine_but_zero():
    assert values_of("!", "?", "...")["tfidf"].tolist() == [0, 0]
