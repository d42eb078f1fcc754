"""The teacher of likeness learns what sets policies apart, and grades texts that it was not fitted on by it."""

from random import Random

import numpy as np
import pytest
from likeness import Likeness

WORDS = ["pears", "plums", "river", "garden", "stone", "cloud", "letter", "window", "summer", "candle", "market"]


def answer(rng: Random, policy: int) -> str:
    """Policy 0 writes long lines and commas, policy 1 short lines, policy 2 short ones in words of its own."""
    words = [f"{word}ish" if policy == 2 else word for word in rng.choices(WORDS, k=40 if policy == 0 else 15)]
    return ", ".join(words) if policy == 0 else "\n".join(words)


@pytest.fixture(scope="module")
def likeness() -> Likeness:
    """Over texts of three policies in turn, of which it is fitted on the first two thirds."""
    rng = Random(0)
    texts = [answer(rng, policy) for _ in range(60) for policy in range(3)]
    choices = []
    for _ in range(400):
        policy, other = rng.sample(range(3), 2)
        reference, chosen = rng.sample(range(policy, 120, 3), 2)
        choices.append((reference, chosen, rng.choice(range(other, 120, 3))))
    return Likeness(texts, [at % 3 != 0 for at in range(len(texts))], choices)


def test_an_answer_of_the_policy_is_graded_above_all_others(likeness: Likeness) -> None:
    for reference in range(120, 150):
        others = [at for at in range(150, 180) if at % 3 != reference % 3]
        same = [at for at in range(150, 180) if at % 3 == reference % 3]
        grades = likeness.grades(reference, [*same, *others])
        assert grades[: len(same)].min() > grades[len(same) :].max()


def test_differences_of_grades_are_log_odds(likeness: Likeness) -> None:
    rng = Random(1)
    assert likeness.weights.shape == (8,)
    margins = []
    for _ in range(300):
        policy, other = rng.sample(range(3), 2)
        reference, chosen = rng.sample(range(120 + policy, 180, 3), 2)
        grades = likeness.grades(reference, [chosen, rng.choice(range(120 + other, 180, 3))])
        margins.append(grades[0] - grades[1])
    assert (np.array(margins) > 2).mean() > 0.95, "policies this far apart are told apart with near certainty"


def test_a_text_is_most_like_itself(likeness: Likeness) -> None:
    grades = likeness.grades(3, [3, 6, 9, 12])
    assert grades.argmax() == 0
    assert likeness.grades(3, [6])[0] == pytest.approx(grades[1])
