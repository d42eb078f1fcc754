"""Dialects, shape by shape: what each client sends, and what it parses of the reply."""

import asyncio
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import JSONResponse

from polar_ray import Scorer, Triple
from polar_ray.config import EngineConfig
from polar_ray.errors import RequestInvalid, TripleError
from polar_ray.serving import openapi
from polar_ray.serving.dialects import DIALECTS
from polar_ray.serving.dialects.base import Answer
from polar_ray.serving.dialects.openai import GRADER_ERRORS
from polar_ray.triples import Rendered, Scored, TokenIds, join_text
from polar_ray.wire import error_reply
from tests.support.endpoint import api_client, serve_config

BY_PATH = {path: dialect for dialect in DIALECTS for path in dialect.paths}
TEXT = "P\nR<|reward|>P\nO[UNUSED_TOKEN_130]"
PLAIN = {"think": "keep"}


def answer(*rewards, cut_tokens=0):
    scored = [Scored(reward, tokens=7, cut_tokens=cut_tokens) for reward in rewards]
    return Answer(scored, "POLAR-7B", "r" * 64, tokens=7 * len(rewards), computed_tokens=7, seconds=0.5)


def read(path, body, query=None):
    return BY_PATH[path].read(body, query or {})


def write(path, body, *rewards, **changes):
    return BY_PATH[path].write(body, answer(*rewards, **changes))


RENDERED = [
    ("/classify", "text", TEXT, [Rendered(TEXT)]),
    ("/classify", "text", [TEXT, TEXT], [Rendered(TEXT)] * 2),
    ("/classify", "input_ids", [1, 2], [TokenIds([1, 2])]),
    ("/classify", "input_ids", [[1, 2], [3]], [TokenIds([1, 2]), TokenIds([3])]),
    *[
        (path, "input", value, rows)
        for path in ("/pooling", "/classify", "/lmdeploy/pooling", "/v1/embeddings")
        for value, rows in (
            (TEXT, [Rendered(TEXT)]),
            ([TEXT], [Rendered(TEXT)]),
            ([1, 2], [TokenIds([1, 2])]),
            ([[1, 2]], [TokenIds([1, 2])]),
            ([], []),
        )
    ],
]


@pytest.mark.parametrize(("path", "name", "value", "rows"), RENDERED)
def test_engines_are_asked_with_rendered_texts_or_ids(path, name, value, rows):
    assert read(path, {"model": "m", name: value}) == rows


@pytest.mark.parametrize(
    ("path", "body", "parse"),
    [
        # what each client does with the reply, in its own words
        ("/classify", {"text": [TEXT, TEXT]}, lambda r: [item["embedding"][0] for item in r]),
        ("/pooling", {"input": [TEXT, TEXT]}, lambda r: [item["data"][-1][0] for item in r["data"]]),
        ("/lmdeploy/pooling", {"input": [TEXT, TEXT]}, lambda r: [item["data"] for item in r["data"]]),
        ("/classify", {"input": [TEXT, TEXT]}, lambda r: [item["probs"][-1] for item in r["data"]]),
        ("/v1/embeddings", {"input": [TEXT, TEXT]}, lambda r: [item["embedding"][-1] for item in r["data"]]),
        ("/score", {"queries": "q", "documents": ["a", "b"]}, lambda r: [item["score"] for item in r["data"]]),
        ("/get_reward", {}, lambda r: r["rewards"]),
        ("/get_reward", {}, lambda r: r["scores"]),
        ("/llamafactory", {}, lambda r: r["scores"]),
    ],
)
def test_many_rewards_are_where_the_client_looks_for_them(path, body, parse):
    reply = json.loads(json.dumps(write(path, body, -1.54, 0.25)))
    assert parse(reply) == [-1.54, 0.25]


@pytest.mark.parametrize(
    ("path", "parse"),
    [
        ("/slime", lambda r: r),
        ("/xtuner/judge", lambda r: r["score"]),
        ("/verify", lambda r: r["reward"]),
        ("/v1/fine_tuning/alpha/graders/run", lambda r: r["reward"]),
    ],
)
def test_one_reward_is_where_the_client_looks_for_it(path, parse):
    assert parse(json.loads(json.dumps(write(path, BY_PATH[path].example, -1.54)))) == -1.54


def test_one_text_is_answered_with_a_list_and_ids_that_stand_alone_with_an_object():
    assert [item["embedding"] for item in write("/classify", {"text": TEXT}, 1.5)] == [[1.5]]
    assert write("/classify", {"input_ids": [1, 2]}, 1.5)["embedding"] == [1.5]
    assert write("/classify", {"input_ids": [1, 2]}, 1.5)["meta_info"]["prompt_tokens"] == 7


def test_null_says_nothing():
    fields = ("truncate_prompt_tokens", "dimensions", "encoding_format", "padding", "a_later_field")
    assert read("/pooling", {"input": TEXT, **dict.fromkeys(fields)}) == [Rendered(TEXT)]
    reply = write("/pooling", {"input": TEXT, "use_activation": None, "activation": True}, 0.0)
    assert reply["data"][0]["data"] == [[0.5]]


@pytest.mark.parametrize("asked", [{}, {"use_activation": None}, {"use_activation": False}, {"activation": False}])
def test_rewards_are_raw_unless_an_activation_is_asked_for(asked):
    body = {"input": TEXT, **asked}
    assert read("/pooling", body)
    assert write("/pooling", body, -1.54)["data"][0]["data"] == [[-1.54]]


@pytest.mark.parametrize("path", ["/pooling", "/classify"])
def test_an_activation_that_is_asked_for_is_a_sigmoid(path):
    reply = write(path, {"input": TEXT, "use_activation": True}, -1.54, 800.0, -800.0)
    entries = [item.get("probs") or item["data"][0] for item in reply["data"]]
    assert [entry[0] for entry in entries] == pytest.approx([1 / (1 + math.exp(1.54)), 1.0, 0.0])


@pytest.mark.parametrize("names", [("queries", "documents"), ("text_1", "text_2"), ("data_1", "data_2")])
def test_score_takes_its_two_sides_under_all_their_names(names):
    query, document = names
    expected = [Triple("P", "R", "a"), Triple("P", "R", "b")]
    assert read("/score", {query: "P", document: ["a", "b"], "reference": "R"}) == expected
    assert read("/v1/score", {query: ["P", "P"], document: ["a", "b"], "reference": ["R", "R"]}) == expected
    assert read("/score", {query: {"prompt": "P", "reference": "R"}, document: ["a", "b"]}) == expected
    assert read("/score", {query: "P", document: "a", "references": "R"}) == expected[:1]


def test_openrlhf_sends_the_policys_own_markup():
    body = {
        "query": [
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
            "<think>two and\ntwo</think>\n\n4<|im_end|>\n",
            "plain prompt, plain answer",
        ],
        "prompts": [
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
            "plain prompt, ",
        ],
        "labels": ["4", "R"],
    }
    first, second = read("/get_reward", body)
    assert first == Triple("Be brief.\n2+2?", "4", "4")
    assert second == Triple("plain prompt, ", "R", "plain answer")
    assert read("/get_reward", body, PLAIN)[0].output == "<think>two and\ntwo</think>\n\n4"
    assert read("/get_reward", body, {"think": "strip"}) == [first, second]
    logs = write("/get_reward", body, 1.0, 2.0)["extra_logs"]
    assert all(isinstance(value, float) for values in logs.values() for value in values)


def test_a_query_that_does_not_begin_with_its_prompt_is_not_scored():
    body = {"query": ["rest of the prompt and answer"], "prompts": ["all the rest of the prompt"], "labels": ["R"]}
    (row,) = read("/get_reward", body)
    assert isinstance(row, TripleError)
    assert "the prompt was cut" in str(row)


def test_slime_sends_its_prompt_templated():
    body = {"prompt": "<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n<think>\n", "label": "R"}
    body["response"] = "hm\n</think>\n\nO<|im_end|>"
    assert read("/slime", body) == [Triple("P", "R", "O")]
    assert read("/slime", body, PLAIN) == [Triple("P", "R", "<think>\nhm\n</think>\n\nO")]


def response(*texts):
    """One of OpenAI's Responses: a message for each text."""
    messages = [{"type": "message", "content": [{"type": "output_text", "text": text}]} for text in texts]
    return {"output": [{"type": "reasoning", "summary": []}, *messages]}


TEMPLATED = "<|turn>user\nP<turn|>\n<|turn>model\n"
WRITTEN = "hm</think>O<turn|>"

IN_MARKUP = {
    "/get_reward": {"query": [TEMPLATED + WRITTEN], "prompts": [TEMPLATED], "labels": ["R"]},
    "/slime": {"prompt": TEMPLATED, "response": WRITTEN, "label": "R"},
    "/xtuner/judge": {"response": WRITTEN, "label": "R", "extra_info": {"prompt": TEMPLATED}},
    "/verify": {"responses_create_params": {"input": TEMPLATED}, "response": response(WRITTEN), "label": "R"},
    "/v1/fine_tuning/alpha/graders/run": {"model_sample": WRITTEN, "item": {"input": TEMPLATED, "label": "R"}},
}


@pytest.mark.parametrize(("path", "body"), IN_MARKUP.items())
def test_every_trainers_road_takes_the_same_markup_off(path, body):
    (row,) = read(path, body)
    assert (row.prompt, row.reference, join_text(row.output, "output")) == ("P", "R", "O")


def test_vllms_score_takes_its_texts_as_they_are():
    body = {"queries": TEMPLATED, "documents": [WRITTEN], "reference": "R"}
    assert read("/score", body) == [Triple(TEMPLATED, "R", WRITTEN)]


NO_REFERENCE = [
    ("/get_reward", {"query": ["pO"], "prompts": ["p"], "labels": [None]}, "--data.label_key"),
    ("/get_reward", {"query": ["pO"], "prompts": ["p"], "labels": [""]}, "--data.label_key"),
    ("/slime", {"prompt": "P", "response": "O", "label": ""}, "--label-key"),
    ("/slime", {"prompt": "P", "response": "O", "label": [{"role": "assistant", "content": ""}]}, "--label-key"),
    ("/xtuner/judge", {"response": "O", "label": "", "extra_info": {"prompt": "P"}}, "ground_truth"),
    ("/verify", {"responses_create_params": {"input": "P"}, "response": response("O"), "label": ""}, "reference or"),
    ("/v1/fine_tuning/alpha/graders/run", {"item": {"prompt": "P", "label": ""}, "model_sample": "O"}, "reference or"),
]


@pytest.mark.parametrize(("path", "body", "says"), NO_REFERENCE)
def test_a_reference_of_nothing_gets_no_reward_where_empty_outputs_do(path, body, says):
    (row,) = read(path, body)
    assert isinstance(row, TripleError)
    assert re.search(f"reference: empty or null.*{says}", str(row))

    async def test():
        async with api_client(serve_config(limits={"on_empty": "score"})) as (client, _):
            return await client.post(path, json=body), await client.post("/slime", json=EMPTY_OUTPUT)

    refused, scored = asyncio.run(test())
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "triple_invalid")
    assert (scored.status_code, type(scored.json())) == (200, float)


EMPTY_OUTPUT = {"prompt": "P", "response": "", "label": "R"}


@pytest.mark.parametrize("path", [path for path, dialect in BY_PATH.items() if "think" in dialect.parameters])
def test_another_word_for_thinking_is_refused(path):
    with pytest.raises(RequestInvalid, match="think: expected one of"):
        read(path, BY_PATH[path].example, {"think": "KEEP"})


def test_dialects_of_what_a_policy_wrote_say_that_think_may_be_asked():
    asked = {path for path, dialect in BY_PATH.items() if "think" in dialect.parameters}
    assert asked == set(IN_MARKUP)
    names = {one["name"] for one in openapi.dialect(BY_PATH["/slime"])["parameters"]}
    assert names == {"deadline_s", "priority", "expect_receipt", "think"}
    assert "think" not in {one["name"] for one in openapi.dialect(BY_PATH["/pooling"])["parameters"]}


def test_slime_sends_strings_or_messages():
    message = [{"role": "user", "content": "P"}]
    for prompt in ("P", message):
        body = {"prompt": prompt, "response": "O<|eot_id|>", "label": "R", "metadata": {}}
        assert read("/slime", body) == [Triple(prompt, "R", "O")]


@pytest.mark.parametrize("name", ["prompt", "message", "messages", "raw_prompt"])
def test_xtuners_judger_finds_the_prompt_in_extra_info(name):
    body = {"response": "O", "label": "R", "extra_info": {name: "P"}}
    assert read("/xtuner/judge", body) == [Triple("P", "R", "O")]


@pytest.mark.parametrize("place", ["reference", "label", "expected_answer", "ground_truth"])
def test_nemo_gym_keeps_the_body_and_finds_the_reference(place):
    output = [
        {"type": "reasoning", "summary": []},
        {"type": "message", "content": [{"type": "output_text", "text": "4"}, {"type": "refusal", "refusal": "no"}]},
    ]
    messages = [{"role": "user", "content": "2+2?"}]
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "2+2?"}]}]
    for prompt, read_as in (("2+2?", "2+2?"), (messages, messages), (parts, messages)):
        body = {"responses_create_params": {"input": prompt}, "response": {"output": output}}
        for holder in ({place: "R"}, {"verifier_metadata": {place: "R"}}):
            (row,) = read("/verify", {**body, **holder})
            assert row == Triple(read_as, "R", [{"role": "assistant", "content": "4"}])
    assert write("/verify", body, 1.5) == {**body, "reward": 1.5}


def test_nemo_gyms_instructions_stand_before_the_input():
    params = {"instructions": "Be brief.", "input": "2+2?"}
    (row,) = read("/verify", {"responses_create_params": params, "response": response("4"), "label": "R"})
    assert [message["content"] for message in row.prompt] == ["Be brief.", "2+2?"]


def test_every_message_of_a_response_loses_its_own_think_block():
    texts = ("<think>a</think>First.", "<think>b</think>Second.<|im_end|>")
    body = {"responses_create_params": {"input": "P"}, "response": response(*texts), "label": "R"}
    (row,) = read("/verify", body)
    assert join_text(row.output, "output") == "First.\nSecond."
    (kept,) = read("/verify", body, PLAIN)
    assert join_text(kept.output, "output") == "<think>a</think>First.\n<think>b</think>Second."


def test_a_response_that_ended_while_it_reasoned_is_an_empty_output():
    body = {"responses_create_params": {"input": "P"}, "response": response(), "label": "R"}
    (row,) = read("/verify", body)
    assert join_text(row.output, "output") == ""

    async def test(on_empty):
        async with api_client(serve_config(limits={"on_empty": on_empty})) as (client, _):
            return await client.post("/verify", json=body)

    refused, scored = asyncio.run(test("error")), asyncio.run(test("score"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "triple_empty")
    assert (scored.status_code, type(scored.json()["reward"])) == (200, float)


def test_nemo_gyms_agents_may_begin_a_session():
    async def test():
        async with api_client(serve_config()) as (client, _):
            return await client.post("/seed_session", json=BY_PATH["/seed_session"].example)

    seeded = asyncio.run(test())
    assert (seeded.status_code, seeded.json()) == (200, {})


def test_a_grader_says_what_was_cut():
    body = {"grader": {"name": "mine", "type": "polar"}, "model_sample": "O", "item": {"prompt": "P", "reference": "R"}}
    assert read("/v1/fine_tuning/alpha/graders/run", body) == [Triple("P", "R", "O")]
    reply = write("/v1/fine_tuning/alpha/graders/run", body, 1.5, cut_tokens=3)
    assert reply["metadata"]["name"] == "mine"
    assert reply["metadata"]["execution_time"] == 0.5
    assert {name for name in GRADER_ERRORS if reply["metadata"]["errors"][name]} == {"truncated_observation_error"}


REFUSED = [
    ("/classify", {}, "one of text and input_ids"),
    ("/classify", {"text": TEXT, "input_ids": [1]}, "one of text and input_ids"),
    ("/classify", {"text": 3}, "a text, a list of texts, token ids"),
    ("/pooling", {"model": "m"}, "send rendered triples"),
    ("/pooling", {"input": TEXT, "truncate_prompt_tokens": 10}, "another number than POLAR's reward"),
    ("/pooling", {"input": TEXT, "dimensions": 1}, "another number"),
    ("/pooling", {"input": TEXT, "encoding_format": "base64"}, "send float"),
    ("/pooling", {"input": TEXT, "use_activation": "yes"}, "true, false or null"),
    ("/pooling", {"input": TEXT, "messages": []}, "'messages': not known here"),
    ("/pooling", {"input": TEXT, "task": "embed"}, "only rewards are given here"),
    ("/pooling", {"input": [[True]]}, "a text"),
    ("/score", {"queries": "P", "documents": ["a"]}, "send reference beside it"),
    ("/score", {"queries": ["P", "Q"], "documents": ["a"], "reference": "R"}, "as many as documents"),
    ("/score", {"documents": ["a"]}, "expected queries"),
    ("/get_reward", {"query": ["q"], "prompts": ["p"]}, "the reference, which POLAR needs.*--data.label_key"),
    ("/get_reward", {"query": ["q"], "labels": ["r"]}, "without it the output cannot be told"),
    ("/get_reward", {"query": ["q"], "prompts": ["p"], "labels": []}, "as many entries each"),
    ("/slime", {"prompt": "P", "response": "O"}, "label is missing; it is the reference.*--label-key"),
    ("/xtuner/judge", {"response": "O", "label": "R"}, "extra_info has no prompt.*send it as prompt or message or"),
    ("/xtuner/judge", {"response": "O", "label": "R", "prompt": "P"}, "extra_info has no prompt"),
    ("/xtuner/judge", {"response": "O", "label": "R", "extra_info": "P"}, "extra_info has no prompt"),
    ("/xtuner/judge", {"response": "O", "label": "R", "extra_info": {}}, "extra_info has no prompt"),
    ("/llamafactory", {"model": "m", "messages": ["a whole text"]}, "no reference, which POLAR needs"),
    ("/verify", {"responses_create_params": {"input": "P"}, "response": {"output": []}}, "no reference"),
    ("/verify", {"responses_create_params": {"input": "P"}, "response": {}, "label": "R"}, "no list of output"),
    ("/verify", {"responses_create_params": {"input": "P"}, "response": {"output": "4"}, "label": "R"}, "no list of"),
    ("/v1/fine_tuning/alpha/graders/run", {"item": {"prompt": "P"}, "model_sample": "O"}, "item has no reference"),
]


@pytest.mark.parametrize(("path", "body", "says"), REFUSED)
def test_what_a_contract_lacks_is_asked_for_in_a_sentence(path, body, says):
    with pytest.raises(RequestInvalid, match=says):
        read(path, body)


def test_a_bad_sample_is_an_error_in_its_place():
    (row,) = read("/slime", {"prompt": "P", "response": "O", "label": {"answer": 4}})
    assert isinstance(row, TripleError)


any_text = st.text(st.characters(exclude_categories=()), max_size=5)
"""Lone surrogates are among them: JSON's escapes can spell them."""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(any_text, children, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("path", BY_PATH)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_json_object_is_answered_with_a_bug(path, data):
    """The real example with any of its parts, at any depth, replaced by anything."""
    body = json.loads(json.dumps(BY_PATH[path].example))
    target, key = body, data.draw(st.sampled_from(sorted(body)))
    while isinstance(target[key], dict) and target[key] and data.draw(st.booleans()):
        target = target[key]
        key = data.draw(st.sampled_from(sorted(target)))
    target[data.draw(st.just(key) | any_text)] = data.draw(json_values)
    try:
        rows = read(path, body)
    except RequestInvalid as error:
        error_reply(error).model_dump_json()
        return
    assert all(isinstance(row, Triple | Rendered | TokenIds | TripleError) for row in rows)
    if not any(isinstance(row, TripleError) for row in rows):
        JSONResponse(BY_PATH[path].write(body, answer(*[1.0] * len(rows))))


@pytest.mark.parametrize("path", BY_PATH)
def test_every_example_is_scored_as_the_scorer_scores_its_rows(path):
    dialect = BY_PATH[path]
    config = serve_config(engine={"kind": "torch", "device": "cpu", "dtype": "float32"})
    example = json.loads(json.dumps(dialect.example).replace("[UNUSED_TOKEN_130]", "{score}"))

    async def test():
        async with api_client(config) as (client, service):
            score = service.model.scorer.encoder.tokenizer.score_literal
            body = json.loads(json.dumps(example).replace("{score}", score))
            return body, await client.post(path, json=body)

    body, response = asyncio.run(test())
    assert response.status_code == 200, response.text
    with Scorer.open(engine=EngineConfig(device="cpu", dtype="float32")) as scorer:
        rewards = [row.reward for row in scorer.score(dialect.read(body, {}))]
    numbers = [float(number) for number in numbers_in(response.json())]
    for reward in rewards:
        assert any(abs(number - reward) < 1e-5 for number in numbers)


def numbers_in(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, float) else []


HOSTILE = [
    ("/pooling", b'{"input": "x", "\\ud800": 1}'),
    ("/pooling", b'{"input": [1, 99999999999999999999999]}'),
    ("/classify", b'{"input_ids": [-99999999999999999999999]}'),
    ("/v1/rewards", b'{"ids": [[99999999999999999999999]]}'),
    ("/verify", json.dumps({**BY_PATH["/verify"].example, "more": "\ud800"}).encode()),
    ("/verify", json.dumps({**BY_PATH["/verify"].example, "more": math.nan}).encode()),
    ("/v1/fine_tuning/alpha/graders/run", b'{"grader": {"name": "\\ud800"}, "model_sample": "O", "item": {}}'),
    ("/slime", b'{"prompt": "P", "response": "\\ud800", "label": "R"}'),
]


@pytest.mark.parametrize(("path", "body"), HOSTILE)
def test_what_json_lets_in_and_not_out_is_the_callers_fault(path, body):
    async def test():
        async with api_client(serve_config()) as (client, _):
            return await client.post(path, content=body)

    response = asyncio.run(test())
    codes = {"request_invalid", "triple_invalid", "row_unreadable"}
    found = {row["status"] for row in response.json().get("rewards", ())} or {response.json()["error"]["code"]}
    assert response.status_code in (200, 400, 422)
    assert found <= codes


def test_a_failed_row_fails_the_call_with_its_own_error():
    async def test():
        async with api_client(serve_config()) as (client, _):
            forged = await client.post("/classify", json={"text": ["no frame", "none either"]})
            empty = await client.post("/slime", json={"prompt": "P", "response": "", "label": "R"})
            notjson = await client.post("/slime", content=b"[1]")
            late = await client.post("/slime?deadline_s=-1", json={"prompt": "P", "response": "O", "label": "R"})
            return forged, empty, notjson, late

    forged, empty, notjson, late = asyncio.run(test())
    assert (forged.status_code, forged.json()["error"]["code"]) == (422, "triple_invalid")
    assert forged.json()["error"]["details"]["failed_rows"] == 2
    assert (empty.status_code, empty.json()["error"]["code"]) == (422, "triple_empty")
    assert (notjson.status_code, late.status_code) == (400, 400)
