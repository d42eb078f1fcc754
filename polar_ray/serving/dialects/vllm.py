"""vLLM's pooling server: `/pooling`, `/classify`, `/score`, `/v1/embeddings`, with rendered texts or token ids.

`use_activation` is honoured, with another default: vLLM would give POLAR's rewards through a sigmoid unless it is told
not to (`pooling_params.py`); here they are raw unless it is told to. A reward comes once per row, where vLLM's
token-wise pooling sends one number per token of which the last counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from polar_ray.errors import RequestInvalid, TripleError
from polar_ray.serving.dialects import sglang
from polar_ray.serving.dialects.base import Answer, Dialect, Json
from polar_ray.serving.dialects.fields import Query, need, rendered_rows, sigmoid
from polar_ray.triples import Row, Triple

REMEDY = "send rendered triples, or their token ids"

WITHOUT_EFFECT = {
    "model", "input", "user", "priority", "request_id", "add_special_tokens", "use_activation", "activation", "task",
    "mm_processor_kwargs", "cache_salt", "embed_dtype", "endianness",
}  # fmt: skip
"""Fields that do not change a reward here; `task` and `activation` are of older versions."""

REWARD_TASKS = (None, "classify", "token_classify", "reward", "score")
"""What vLLM calls them, over its versions."""

PAIRS = (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2"), ("queries", "items"))
"""How `/score` names the two sides, over its versions."""

EXAMPLE = {"model": "POLAR-7B", "input": sglang.EXAMPLE["text"]}

SCORE_EXAMPLE = {
    "model": "POLAR-7B",
    "queries": "What is the capital of China?",
    "documents": ["Beijing.", "Shanghai."],
    "reference": "Beijing.",
}


def _refuse_what_would_matter(body: dict[str, Json], known: set[str]) -> None:
    if body.get("encoding_format") not in (None, "float"):
        raise RequestInvalid("encoding_format: rewards are JSON numbers here; leave it out, or send float")
    for name in ("truncate_prompt_tokens", "dimensions"):
        if body.get(name) is not None:
            raise RequestInvalid(f"{name}: would give another number than POLAR's reward; leave it out")
    if body.get("task") not in REWARD_TASKS:
        raise RequestInvalid(f"task: only rewards are given here; leave it out, or send one of {REWARD_TASKS[1:]}")
    given = {name for name, value in body.items() if value is not None}
    strays = sorted(given - known - {"encoding_format", "truncation_side"})
    if strays:
        raise RequestInvalid(f"{strays[0][:40]!r}: not known here; leave it out")


def _activate(body: dict[str, Json], rewards: list[float]) -> list[float]:
    asked = body["use_activation"] if body.get("use_activation") is not None else body.get("activation")
    if asked not in (None, True, False):
        raise RequestInvalid("use_activation: expected true, false or null")
    return [sigmoid(reward) for reward in rewards] if asked else rewards


def read(body: dict[str, Json], query: Query) -> list[Row]:
    """`input`: a text, texts, ids or lists of ids."""
    _refuse_what_would_matter(body, WITHOUT_EFFECT)
    _activate(body, [])
    return rendered_rows(need(body, "input", REMEDY), "input")


def _envelope(prefix: str, answer: Answer, data: list[Json]) -> Json:
    return {
        "id": f"{prefix}-{answer.receipt_id[:16]}",
        "object": "list",
        "created": int(time.time()),
        "model": answer.model,
        "data": data,
        "usage": {"prompt_tokens": answer.tokens, "total_tokens": answer.tokens, "completion_tokens": 0},
    }


def _writer(prefix: str, entry: Callable[[int, float], Json]) -> Callable[[dict[str, Json], Answer], Json]:
    def write(body: dict[str, Json], answer: Answer) -> Json:
        rewards = _activate(body, answer.rewards)
        return _envelope(prefix, answer, [entry(index, reward) for index, reward in enumerate(rewards)])

    return write


def _pooled(index: int, reward: float) -> Json:
    return {"index": index, "object": "pooling", "data": [[reward]]}


def _classified(index: int, reward: float) -> Json:
    return {"index": index, "label": "LABEL_0", "probs": [reward], "num_classes": 1}


def _scored(index: int, reward: float) -> Json:
    return {"index": index, "object": "score", "score": reward}


def _embedded(index: int, reward: float) -> Json:
    return {"index": index, "object": "embedding", "embedding": [reward]}


def read_classify(body: dict[str, Json], query: Query) -> list[Row]:
    """vLLM's and SGLang's `/classify` share a path: `input` is vLLM's, `text` and `input_ids` are SGLang's."""
    if "input" in body:
        return read(body, query)
    return sglang.read(body, query)


def write_classify(body: dict[str, Json], answer: Answer) -> Json:
    if "input" in body:
        return _writer("classify", _classified)(body, answer)
    return sglang.write(body, answer)


def read_score(body: dict[str, Json], query: Query) -> list[Row]:
    """Queries are prompts, documents are outputs; the reference is a field beside them, or inside an object query."""
    names = next((pair for pair in PAIRS if pair[0] in body and pair[1] in body), None)
    if names is None:
        raise RequestInvalid("expected queries (prompts) and documents (outputs), or text_1 and text_2")
    _refuse_what_would_matter(body, WITHOUT_EFFECT | {*names, "reference", "references"})
    _activate(body, [])
    queries, documents = (value if isinstance(value, list) else [value] for value in (body[name] for name in names))
    if len(queries) not in (1, len(documents)):
        raise RequestInvalid(f"{names[0]}: expected one, or as many as {names[1]}")
    pairs = [_prompt_and_reference(one, place, body, len(queries)) for place, one in enumerate(queries)]
    pairs = pairs * len(documents) if len(pairs) == 1 else pairs
    return [_row(prompt, reference, output) for (prompt, reference), output in zip(pairs, documents, strict=True)]


def _prompt_and_reference(one: Json, place: int, body: dict[str, Json], n: int) -> tuple[Json, Json]:
    if isinstance(one, dict) and one.get("prompt") is not None and one.get("reference") is not None:
        return one["prompt"], one["reference"]
    given = body.get("reference", body.get("references"))
    references = given if isinstance(given, list) and all(isinstance(item, str) for item in given) else [given]
    if given is None or len(references) not in (1, n):
        raise RequestInvalid(
            "a query has no reference, which POLAR needs; send reference beside it (one, or one per query), or send as "
            "the query an object with prompt and reference"
        )
    return one, references[place if len(references) > 1 else 0]


def _row(prompt: Json, reference: Json, output: Json) -> Row:
    try:
        return Triple.from_dict({"prompt": prompt, "reference": reference, "output": output})
    except TripleError as error:
        return error


DIALECTS = (
    Dialect("vllm", ("/pooling",), "vLLM's /pooling: a raw reward per row", read, _writer("pool", _pooled), EXAMPLE),
    Dialect(
        "sglang and vllm",
        ("/classify",),
        "SGLang's /classify (text, input_ids) and vLLM's (input)",
        read_classify,
        write_classify,
        sglang.EXAMPLE,
    ),
    Dialect(
        "vllm",
        ("/score", "/v1/score"),
        "vLLM's /score: queries are prompts, documents outputs, and a reference beside them",
        read_score,
        _writer("score", _scored),
        SCORE_EXAMPLE,
    ),
    Dialect(
        "vllm",
        ("/v1/embeddings",),
        "an embedding of one element, the reward: what verl asks an SGLang engine for",
        read,
        _writer("embd", _embedded),
        EXAMPLE,
    ),
)
