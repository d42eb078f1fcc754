"""SGLang's `/classify`, as xtuner 0.2's `RewardModelClient` and POLAR's own client ask it.

A real SGLang server answers one `text` with an object, on which that client fails, retries eight times and returns
None. Here one text is answered with a list of one, which is what it iterates over; ids that stand alone are answered
with an object, as SGLang does.
"""

from __future__ import annotations

from polar_ray.errors import RequestInvalid
from polar_ray.serving.dialects.base import Answer, Json
from polar_ray.serving.dialects.fields import Query, is_ids, rendered_rows
from polar_ray.triples import Row

EXAMPLE = {
    "model": "POLAR-7B",
    "text": [
        "What is the capital of China?\nBeijing.<|reward|>What is the capital of China?\nShanghai.[UNUSED_TOKEN_130]"
    ],
}


def read(body: dict[str, Json], query: Query) -> list[Row]:
    """`text`, rendered as upstream's client renders, or `input_ids`."""
    forms = [name for name in ("text", "input_ids") if body.get(name) is not None]
    if len(forms) != 1:
        raise RequestInvalid("expected one of text and input_ids: rendered triples, or their token ids")
    return rendered_rows(body[forms[0]], forms[0])


def write(body: dict[str, Json], answer: Answer) -> Json:
    """One object per row, its reward the only element of `embedding`."""
    replies = [
        {
            "embedding": [reward],
            "meta_info": {"id": f"{answer.receipt_id[:16]}-{index}", "prompt_tokens": row.tokens, "cached_tokens": 0},
        }
        for index, (reward, row) in enumerate(zip(answer.rewards, answer.scored, strict=True))
    ]
    return replies[0] if is_ids(body.get("input_ids")) else replies
