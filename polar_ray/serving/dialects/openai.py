"""Contracts around OpenAI's objects: NeMo-Gym's `/seed_session` and `/verify`, and the run of a grader.

Sources: NVIDIA-NeMo/Gym `nemo_gym/base_resources_server.py`; OpenAI's `fine_tuning/alpha/graders/run`.
"""

from __future__ import annotations

from polar_ray.errors import RequestInvalid
from polar_ray.serving.dialects.base import Answer, Dialect, Json
from polar_ray.serving.dialects.fields import THINKING, Query, check_can_be_echoed, first_of, need, triple_row
from polar_ray.triples import Row

REFERENCE_FIELDS = ("reference", "label", "expected_answer", "ground_truth", "reference_answer")
PROMPT_FIELDS = ("prompt", "messages", "question", "input")
REMEDY = f"send it as {' or '.join(REFERENCE_FIELDS)}"

GRADER_ERRORS = (
    "formula_parse_error", "invalid_variable_error", "model_grader_parse_error", "model_grader_refusal_error",
    "model_grader_server_error", "other_error", "python_grader_runtime_error", "python_grader_server_error",
    "sample_parse_error", "truncated_observation_error", "unresponsive_reward_error",
)  # fmt: skip
"""Flags of the contract. A reply with a reward has none of them but the one for what limits cut."""

GRADER_ERROR_DETAILS = (
    "model_grader_server_error_details", "python_grader_runtime_error_details", "python_grader_server_error_type",
)  # fmt: skip
"""Texts that go with some of the flags."""

VERIFY_EXAMPLE = {
    "responses_create_params": {"input": [{"role": "user", "content": "2 + 2 = ?"}]},
    "response": {
        "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "4"}]}]
    },
    "reference": "4",
}
SEED_EXAMPLE = {key: VERIFY_EXAMPLE[key] for key in ("responses_create_params", "reference")}
GRADER_EXAMPLE = {
    "grader": {"type": "score_model", "name": "polar"},
    "model_sample": "4",
    "item": {"prompt": "2 + 2 = ?", "reference": "4"},
}


def read_seed_session(body: dict[str, Json], query: Query) -> list[Row]:
    """No rows. NeMo-Gym's agents begin every rollout with this call; a reward needs no state, so it does nothing."""
    return []


def write_seed_session(body: dict[str, Json], answer: Answer) -> Json:
    """NeMo-Gym's `BaseSeedSessionResponse`, which has no fields."""
    return {}


def read_verify(body: dict[str, Json], query: Query) -> list[Row]:
    """The prompt is the request's input, the output the response's text, the reference a field beside them."""
    check_can_be_echoed(body, "the request")
    params = need(body, "responses_create_params", "it holds the prompt as input")
    response = need(body, "response", "it holds the output")
    if not isinstance(params, dict) or not isinstance(response, dict):
        raise RequestInvalid("responses_create_params and response must be objects")
    metadata = body.get("verifier_metadata")
    fields = {**(metadata if isinstance(metadata, dict) else {}), **body}
    reference = first_of(fields, REFERENCE_FIELDS, "reference", "the request")
    prompt = need(params, "input", "it is the prompt")
    return [triple_row(_conversation(prompt, params), reference, _output(response), query, REMEDY)]


def write_verify(body: dict[str, Json], answer: Answer) -> Json:
    """The request's own fields, and the reward."""
    return {**body, "reward": answer.rewards[0]}


def read_grader(body: dict[str, Json], query: Query) -> list[Row]:
    """`item` holds prompt and reference, `model_sample` is the output."""
    check_can_be_echoed(body.get("grader"), "grader")
    item = need(body, "item", "it holds prompt and reference")
    if not isinstance(item, dict):
        raise RequestInvalid("item: expected an object with prompt and reference")
    prompt = first_of(item, PROMPT_FIELDS, "prompt", "item")
    reference = first_of(item, REFERENCE_FIELDS, "reference", "item")
    return [triple_row(prompt, reference, need(body, "model_sample", "it is the output to score"), query, REMEDY)]


def write_grader(body: dict[str, Json], answer: Answer) -> Json:
    grader = body.get("grader")
    named = grader if isinstance(grader, dict) else {}
    (row,) = answer.scored
    errors: dict[str, Json] = {**dict.fromkeys(GRADER_ERRORS, False), **dict.fromkeys(GRADER_ERROR_DETAILS)}
    errors["truncated_observation_error"] = row.cut_tokens > 0
    return {
        "reward": answer.rewards[0],
        "sub_rewards": {},
        "metadata": {
            "name": str(named.get("name", "polar")),
            "type": str(named.get("type", "score_model")),
            "errors": errors,
            "execution_time": answer.seconds,
            "scores": {"polar": answer.rewards[0]},
            "sampled_model_name": None,
            "token_usage": answer.tokens,
        },
        "model_grader_token_usage_per_model": {},
    }


def _conversation(given: Json, params: dict[str, Json]) -> Json:
    """A Responses input as messages: parts of a content joined, instructions first as the API has them.

    A string without instructions stays one: it may be templated.
    """
    instructions = params.get("instructions")
    if isinstance(given, str) and not isinstance(instructions, str):
        return given
    turns = [given] if isinstance(given, str) else given
    if not isinstance(turns, list):
        raise RequestInvalid("responses_create_params.input: expected a string or a list of messages")
    messages = [_message(turn) for turn in turns]
    return [{"role": "system", "content": instructions}, *messages] if isinstance(instructions, str) else messages


def _message(turn: Json) -> dict[str, str]:
    if isinstance(turn, str):
        return {"role": "user", "content": turn}
    if not isinstance(turn, dict):
        raise RequestInvalid("responses_create_params.input: expected a string or a list of messages")
    content = turn.get("content")
    if isinstance(content, str):
        return {"role": str(turn.get("role", "user")), "content": content}
    parts = content if isinstance(content, list) else ()
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if not texts:
        raise RequestInvalid("responses_create_params.input: a turn has no text; POLAR reads texts only")
    return {"role": str(turn.get("role", "user")), "content": "\n".join(texts)}


def _output(response: dict[str, Json]) -> Json:
    """The texts of a response's messages, each a message; reasoning and tool calls are none.

    A response that was cut short while the policy still reasoned is an empty output. Raises `RequestInvalid` for one
    that is no response.
    """
    output = response.get("output")
    if not isinstance(output, list):
        raise RequestInvalid("response: has no list of output items; its messages' output_text is the output to score")
    parts = [
        part
        for item in output
        if isinstance(item, dict) and item.get("type") == "message" and isinstance(item.get("content"), list)
        for part in item["content"]
        if isinstance(part, dict) and part.get("type") == "output_text" and isinstance(part.get("text"), str)
    ]
    return [{"role": "assistant", "content": part["text"]} for part in parts]


DIALECTS = (
    Dialect(
        "nemo_gym",
        ("/seed_session",),
        "NeMo-Gym's /seed_session: nothing to seed",
        read_seed_session,
        write_seed_session,
        SEED_EXAMPLE,
    ),
    Dialect("nemo_gym", ("/verify",), "NeMo-Gym's /verify", read_verify, write_verify, VERIFY_EXAMPLE, THINKING),
    Dialect(
        "openai",
        ("/v1/fine_tuning/alpha/graders/run",),
        "the run of a grader, in OpenAI's shape",
        read_grader,
        write_grader,
        GRADER_EXAMPLE,
        THINKING,
    ),
)
