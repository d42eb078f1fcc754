"""Trainers that post a sample, or a few, to a reward URL: OpenRLHF, slime, xtuner v1, LLaMA-Factory.

Prompts may come in a chat template, and what a policy wrote comes with its end tokens and, often, its thinking; all of
that is taken off (`?think=keep` keeps the thinking). The reference is what each of them calls a label.
"""

from __future__ import annotations

from polar_ray.errors import RequestInvalid, TripleError
from polar_ray.policy_text import MISSING_REFERENCE, output_of, own_text
from polar_ray.serving.dialects import sglang
from polar_ray.serving.dialects.base import Answer, Dialect, Json
from polar_ray.serving.dialects.fields import THINKING, Query, first_of, need, rendered_rows, strings, triple_row
from polar_ray.triples import Row

PROMPT_FIELDS = ("prompt", "message", "messages", "raw_prompt")
LABEL_REMEDY = "it is the reference, which POLAR needs"

OPENRLHF_EXAMPLE = {
    "query": ["<|im_start|>user\n2 + 2 = ?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"],
    "prompts": ["<|im_start|>user\n2 + 2 = ?<|im_end|>\n<|im_start|>assistant\n"],
    "labels": ["4"],
}
SLIME_EXAMPLE = {"prompt": "2 + 2 = ?", "response": "4", "label": "4"}
XTUNER_EXAMPLE = {"response": "4", "label": "4", "extra_info": {"prompt": "2 + 2 = ?"}}
LLAMA_FACTORY_EXAMPLE = {"model": "model", "messages": sglang.EXAMPLE["text"]}


def read_openrlhf(body: dict[str, Json], query: Query) -> list[Row]:
    """`query` is prompt and output in the policy's own markup, `prompts` the first part of it, `labels` references."""
    queries = strings(need(body, "query", "it is the prompt with the output behind it"), "query")
    prompts = strings(need(body, "prompts", "without it the output cannot be told from the prompt"), "prompts")
    labels = need(body, "labels", f"{LABEL_REMEDY}; name its column with --data.label_key")
    labels = labels if isinstance(labels, list) else [labels]
    if not len(queries) == len(prompts) == len(labels):
        raise RequestInvalid("query, prompts and labels must have as many entries each")
    samples = zip(queries, prompts, labels, strict=True)
    return [_openrlhf_row(text, prompt, label, query) for text, prompt, label in samples]


def _openrlhf_row(text: str, prompt: str, label: Json, query: Query) -> Row:
    try:
        output = output_of(text, prompt)
    except TripleError as error:
        return error
    return triple_row(prompt, label, output, query, MISSING_REFERENCE["openrlhf"])


def write_openrlhf(body: dict[str, Json], answer: Answer) -> Json:
    """`rewards` for the loss, `scores` for filtering: the same number. `extra_logs` must be numeric."""
    tokens = [float(row.tokens) for row in answer.scored]
    cuts = [float(row.cut_tokens) for row in answer.scored]
    logs = {"polar_tokens": tokens, "polar_cut_tokens": cuts}
    return {"rewards": answer.rewards, "scores": answer.rewards, "extra_logs": logs}


def read_slime(body: dict[str, Json], query: Query) -> list[Row]:
    """One sample: `prompt` (messages, or a string that may be templated), `response`, `label`."""
    prompt, response = (need(body, name, "a sample has prompt, response and label") for name in ("prompt", "response"))
    label = need(body, "label", f"{LABEL_REMEDY}; name its column with --label-key")
    if isinstance(prompt, str) and isinstance(response, str):
        response = own_text(response, prompt)
    return [triple_row(prompt, label, response, query, MISSING_REFERENCE["slime"])]


def write_slime(body: dict[str, Json], answer: Answer) -> Json:
    """A bare number: what `--rm-type remote_rm` takes for the reward without `--reward-key`."""
    return answer.rewards[0]


def read_xtuner(body: dict[str, Json], query: Query) -> list[Row]:
    """`response`, `label`, and `extra_info` with the prompt in it.

    For a judger of one's own that fills `extra_info` for every sample: that of xtuner's own HTTP judger is a setting,
    the same for all samples, and would score them all against one prompt.
    """
    extra = body.get("extra_info")
    prompt = first_of(extra if isinstance(extra, dict) else {}, PROMPT_FIELDS, "prompt", "extra_info")
    response = need(body, "response", "it is the output to score")
    label = need(body, "label", LABEL_REMEDY)
    return [triple_row(prompt, label, response, query, MISSING_REFERENCE["xtuner"])]


def write_xtuner(body: dict[str, Json], answer: Answer) -> Json:
    """A dict, as xtuner wants it."""
    return {"score": answer.rewards[0]}


def read_llama_factory(body: dict[str, Json], query: Query) -> list[Row]:
    """`messages` are whole texts of prompt and response without a reference, so only rendered triples can be scored."""
    texts = strings(need(body, "messages", "send rendered triples"), "messages")
    if not all("<|reward|>" in text for text in texts):
        raise RequestInvalid(
            "messages: this contract has no reference, which POLAR needs; send texts as upstream's client renders them "
            "(prompt and reference, <|reward|>, prompt and output, score token), or use POST /v1/rewards"
        )
    return rendered_rows(texts, "messages")


def write_llama_factory(body: dict[str, Json], answer: Answer) -> Json:
    return {"scores": answer.rewards}


DIALECTS = (
    Dialect(
        "openrlhf",
        ("/get_reward",),
        "OpenRLHF's remote reward (--reward.remote_url)",
        read_openrlhf,
        write_openrlhf,
        OPENRLHF_EXAMPLE,
        THINKING,
    ),
    Dialect("slime", ("/slime",), "slime's remote_rm: a bare number", read_slime, write_slime, SLIME_EXAMPLE, THINKING),
    Dialect(
        "xtuner",
        ("/xtuner/judge",),
        "xtuner v1's judger, for one that puts each sample's prompt into extra_info",
        read_xtuner,
        write_xtuner,
        XTUNER_EXAMPLE,
        THINKING,
    ),
    Dialect(
        "llamafactory",
        ("/llamafactory",),
        "LLaMA-Factory's reward API, with rendered triples",
        read_llama_factory,
        write_llama_factory,
        LLAMA_FACTORY_EXAMPLE,
    ),
)
