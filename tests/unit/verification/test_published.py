"""Rewards are read from a card as people publish them; its code is never run."""

import json
from dataclasses import replace

import pytest

from polar_ray.errors import InputError
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.verification.published import read_card, read_cards, read_goldens

CARD = """
# A model

```python
data = [
    {
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "reference": [{"role": "assistant", "content": "4"}],
        "output": [{"role": "assistant", "content": "4"}]
    },
    {
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "reference": [{"role": "assistant", "content": "4"}],
        "output": [{"role": "assistant", "content": "5"}]
    }
]
```

```python
model = AutoModel.from_pretrained("somebody/model")
print(rewards)
# [-0.5, -1.1e1] for previous example data
# [1, 2, 3] is somebody else's
```

```python
prompt = "Say two lines."
reference = "One.\\nTwo."
outputs = [
    # the same
    "One.\\nTwo.",
    "None.",  # another
]
raise SystemExit("this is not run")
data = [{"prompt": prompt, "output": output} for output in outputs]
client = Client(server_type="sglang")
```

```txt
Output: One.
Two.
Reward: 0.25

Output: None.
Reward: -3.5

Output: Never asked for.
Reward: 9
```
"""


def test_rows_and_rewards_find_each_other():
    rows = list(read_card(CARD, "README.md"))
    assert [row.reward for row in rows] == [-0.5, -11.0, 0.25, -3.5]
    assert [row.engine for row in rows] == ["transformers", "transformers", "sglang", "sglang"]
    assert rows[1].triple.output[0]["content"] == "5"
    assert rows[2].triple.output == "One.\nTwo."
    assert {row.triple.reference for row in rows[2:]} == {"One.\nTwo."}


@pytest.mark.parametrize(
    "card", ["", "```python\nthis is not python\n```", "```python\noutputs = [1]\n```", "```txt\n"]
)
def test_a_card_without_examples_has_none(card):
    assert list(read_card(card, "README.md")) == []


def test_cards_in_two_languages_give_a_triple_once(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "README_zh-CN.md").write_text(CARD.replace("Say two lines.", "说两行。"))
    rows = read_cards(tmp_path)
    assert len(rows) == 6
    assert {row.source for row in rows} == {"README.md", "README_zh-CN.md"}


def test_our_own_card_is_read():
    assert len(read_cards(EMBEDDED_FOLDER)) == 6


def test_goldens_are_rows_with_rewards(tmp_path):
    file = tmp_path / "goldens.json"
    row = {"prompt": "p", "reference": "r", "output": "o", "reward": -1, "engine": "lmdeploy", "seed_text": {}}
    file.write_text(json.dumps([row, {**row, "engine": None}]))
    first, second = read_goldens(file)
    assert (first.reward, first.engine, first.triple.output) == (-1.0, "lmdeploy", "o")
    assert second == replace(first, engine=None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[]", "expected a list of objects"),
        ("[3]", "row 0: expected an object, found int"),
        ('[{"prompt": "p", "reference": "r", "output": "o", "reward": "1"}]', "row 0: reward = '1': expected a number"),
        ('[{"prompt": "p", "reference": "r", "reward": 1}]', "row 0: output"),
    ],
)
def test_bad_goldens_name_row_and_field(tmp_path, content, words):
    file = tmp_path / "goldens.json"
    file.write_text(content)
    with pytest.raises(InputError, match=words):
        read_goldens(file)
