"""Parsing triples and pairs: what is accepted, and what each refusal says."""

import pytest

from polar_ray.errors import RowUnreadable, TripleError
from polar_ray.triples import PreferencePair, Scored, Triple, join_text

CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_a_triple_takes_strings_and_conversations():
    triple = Triple.from_dict({"prompt": CONVERSATION, "reference": "Hello", "output": "Hey", "id": 7})
    assert join_text(triple.prompt, "prompt") == "Be brief.\nHi"
    assert triple.wrapper == "sft"
    assert triple.id == "7"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"reference": "r", "output": "o"}, "prompt: .*found null"),
        ({"prompt": "p", "reference": 3, "output": "o"}, "reference: .*found int"),
        ({"prompt": "p", "reference": "r", "output": ["o"]}, r"output\[0\]: .*found str"),
        ({"prompt": "p", "reference": "r", "output": [{"role": "x"}]}, r"output\[0\]: .*no content"),
        ({"prompt": "p", "reference": "r", "output": [{"content": 1}]}, "content of type int"),
        ({"prompt": "p", "reference": "r", "output": "o", "wrapper": "chat"}, "wrapper: .*'chat'"),
        ({"prompt": "p", "reference": "r", "response": "o", "output": "o"}, "unknown field 'response'"),
    ],
)
def test_a_refusal_names_the_field_and_what_was_found(row, says):
    with pytest.raises(TripleError, match=says):
        Triple.from_dict(row)


def test_a_pair_has_two_answers():
    pair = PreferencePair.from_dict({"prompt": "p", "reference": "r", "chosen": "c", "rejected": CONVERSATION})
    assert pair.chosen == "c"
    with pytest.raises(TripleError, match="rejected"):
        PreferencePair.from_dict({"prompt": "p", "reference": "r", "chosen": "c"})


def test_a_lone_surrogate_is_unreadable():
    with pytest.raises(RowUnreadable, match=r"output: a lone surrogate \(U\+D83D\) at character 2"):
        join_text("ab\ud83d", "output")


def test_scored_says_whether_it_has_a_reward():
    assert Scored(1.5).is_ok
    assert not Scored(None, "triple_empty", "no text").is_ok
