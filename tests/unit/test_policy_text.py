"""What a policy wrote, without its markup: on real templates, and on what is none."""

import importlib.util
import json
import time
from datetime import datetime
from pathlib import Path

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from polar_ray.errors import RowUnreadable, TripleError
from polar_ray.policy_text import (
    END_TOKENS,
    MISSING_REFERENCE,
    output_of,
    own_text,
    plain_prompt,
    strip_special_end,
    strip_thinking,
    triple_of,
    written,
)
from polar_ray.triples import Triple

THINKING = [
    ("4", "4"),
    ("<think>two\nand two</think>\n\n4 ", "4"),
    ("before <think>a</think> 4", "4"),
    ("<think>a</think> 4 <think>b</think> 5", "4 <think>b</think> 5"),
    ("<think>a<think>b</think> 4", "4"),
    ("<think>never closed", "<think>never closed"),
    ("opened by the template</think> 4", "4"),
    ("opened by the template</think> 4 <think>b</think> 5", "4 <think>b</think> 5"),
    ("</think>4", "4"),
    (" 4 ", " 4 "),
    ("In R1, `</think>` ends it.", "In R1, `</think>` ends it."),
    ('so "</think>" it is', 'so "</think>" it is'),
    ("as `</think>` says</think> 4", "4"),
    ("two</think>4", "4"),
    ("<think></think>", ""),
]


@pytest.mark.parametrize(("text", "left"), THINKING)
def test_the_first_think_block_and_what_is_before_it_go(text, left):
    assert strip_thinking(text) == left


@pytest.mark.parametrize("token", END_TOKENS)
def test_end_tokens_go_however_many_they_are(token):
    assert strip_special_end(f"4{token}") == "4"
    assert strip_special_end(f"4 {token}\n{token}{token}\n") == "4 "


def test_a_text_without_end_tokens_keeps_its_spaces_and_what_stands_inside():
    assert strip_special_end(" 4 \n") == " 4 \n"
    assert strip_special_end("4\n<|im_end|>\x1c\u3000</s> \n") == "4\n"
    assert strip_special_end("<|im_end|> ends a turn") == "<|im_end|> ends a turn"
    assert strip_special_end("<|im_end|>") == strip_special_end("") == ""


def test_the_output_is_what_follows_the_prompt():
    assert output_of("What? 4</s>", "What? ") == "4</s>"
    with pytest.raises(TripleError, match="query: expected the prompt and what follows it"):
        output_of("hat? 4", "What? ")


def test_a_think_block_that_the_prompt_opened_is_part_of_the_output():
    prompt = "<|im_start|>assistant\n<think>\n"
    assert own_text("two and two\n</think>\n\n4", prompt) == "<think>\ntwo and two\n</think>\n\n4"
    assert own_text("4", "<|im_start|>assistant\n") == "4"
    assert strip_thinking(output_of(f"{prompt}two and two\n</think>\n\n4", prompt)) == "4"


TEMPLATES = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n 2+2?\n<|im_end|>\n<|im_start|>assistant\n",
        "Be brief.\n 2+2?\n",
    ),
    "chatml, several turns": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n",
        "Hi\nHello\n2+2?",
    ),
    "chatml, thinking opened": (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "2+2?",
    ),
    "chatml, thinking off": (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "2+2?",
    ),
    "chatml, prefilled": (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nThe sum is",
        "2+2?\nThe sum is",
    ),
    "chatml, the template's empty system turn": (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n",
        "2+2?",
    ),
    "chatml, an empty question": (
        "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n",
        "",
    ),
    "chatml, a question about thinking": (
        "<|im_start|>user\n</think> means what?<|im_end|>\n<|im_start|>user\nAnd a</think>?",
        "</think> means what?\nAnd a</think>?",
    ),
    "llama 3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Be brief.\n2+2?",
    ),
    "llama 4": (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\n2+2?<|eot|><|header_start|>assistant<|header_end|>\n\n",
        "2+2?",
    ),
    "gemma": (
        "<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n",
        "2+2?",
    ),
    "mistral": (
        "<s>[INST] Hi [/INST] Hello</s>[INST] 2+2? [/INST]",
        "Hi\nHello\n2+2?",
    ),
    "mistral, with a system prompt": (
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]2+2?[/INST]",
        "Be brief.\n2+2?",
    ),
    "deepseek": (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>Hello<｜end▁of▁sentence｜>"
        "<｜User｜>2+2?<｜Assistant｜><think>\n",
        "Be brief.\nHi\nHello\n2+2?",
    ),
    "deepseek, thinking off": ("<｜begin▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜></think>", "2+2?"),
    "deepseek, thinking off in an earlier turn": (
        "<｜User｜>Hi<｜Assistant｜></think>Hello<｜end▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜><think>",
        "Hi\nHello\n2+2?",
    ),
    "deepseek, without its begin token": ("Be brief.<｜User｜>2+2?<｜Assistant｜>", "Be brief.\n2+2?"),
    "deepseek, in ascii": ("<|begin▁of▁sentence|>Be brief.<|User|>2+2?<|Assistant|>", "Be brief.\n2+2?"),
    "phi-4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>2+2?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>",
        "Be brief.\n2+2?",
    ),
    "phi-4-mini": ("<|system|>Be brief.<|end|><|user|>2+2?<|end|><|assistant|>", "Be brief.\n2+2?"),
    "glm-4, thinking off": ("[gMASK]<sop><|user|>\n2+2?<|assistant|>\n<think></think>", "2+2?"),
    "gpt-oss, with a tool": (
        "<|start|>user<|message|>2+2?<|end|><|start|>assistant to=functions.sum<|channel|>commentary json<|message|>"
        "[2, 2]<|call|><|start|>functions.sum to=assistant<|channel|>commentary<|message|>4<|end|><|start|>assistant",
        "2+2?\n[2, 2]\n4",
    ),
    "gpt-oss, prefilled": (
        "<|start|>user<|message|>2+2?<|end|><|start|>assistant<|channel|>final<|message|>The sum",
        "2+2?\nThe sum",
    ),
}


@pytest.mark.parametrize(("prompt", "plain"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_becomes_its_contents_joined_by_newlines(prompt, plain):
    assert plain_prompt(prompt) == plain


TRL = importlib.util.find_spec("trl")
TEMPLATES_OF_TRL = sorted(
    file
    for folder in (TRL.submodule_search_locations if TRL else ())
    for file in Path(folder, "chat_templates").glob("*.jinja")
    if not file.stem.endswith("_training")
)
"""Those of many families, as their models have them."""

READS_PARTS_ONLY = {"idefics3", "llava_next", "smolvlm"}
"""Of models that see: their messages' contents are lists."""

WRITES_INTO_THE_SYSTEM_TURN = {
    "cohere2", "gptoss", "llama3_1", "llama3_2", "muse_glimmer", "qwen2_5", "qwen2_5_vl", "qwen3_8",
}  # fmt: skip

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hi, what does <|x|> mean?"},
    {"role": "assistant", "content": "Nothing.\n\nReally [nothing]."},
    {"role": "user", "content": "2 + 2 = ?"},
]


def rendered(file, messages):
    def refuse(why):
        raise TemplateError(why)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    begin = "<｜begin▁of▁sentence｜>" if "deepseek" in file.stem else "<bos>"
    source = file.read_text().replace(" endgeneration ", " endif ").replace(" generation ", " if true ")
    return environment.from_string(source).render(
        messages=messages, add_generation_prompt=True, bos_token=begin, eos_token="<eos>", tools=None
    )


def contents(messages):
    return "\n".join(message["content"] for message in messages)


@pytest.mark.parametrize("file", TEMPLATES_OF_TRL, ids=lambda file: file.stem)
def test_real_templates_become_their_conversations_contents(file):
    if file.stem in READS_PARTS_ONLY:
        pytest.skip("takes no strings")
    plain = plain_prompt(rendered(file, TURNS))
    if file.stem in WRITES_INTO_THE_SYSTEM_TURN:
        assert plain.endswith(f"\n{contents(TURNS)}")
        assert "<|" not in plain.removesuffix(contents(TURNS))
    else:
        assert plain == contents(TURNS)


@pytest.mark.parametrize("file", TEMPLATES_OF_TRL, ids=lambda file: file.stem)
def test_real_templates_system_turns_are_contents_too(file):
    if file.stem in READS_PARTS_ONLY | {"gemma"}:
        pytest.skip("takes no strings, or no system turn")
    plain = plain_prompt(rendered(file, [SYSTEM, *TURNS]))
    if file.stem == "gemma3":  # has no system turn either, and puts it before the question
        assert plain == f"{SYSTEM['content']}\n\n{contents(TURNS)}"
    elif file.stem in WRITES_INTO_THE_SYSTEM_TURN - {"qwen2_5", "qwen2_5_vl"}:
        assert SYSTEM["content"] in plain.removesuffix(contents(TURNS))
    else:
        assert plain == contents([SYSTEM, *TURNS])


LEFT_ALONE = [
    "2+2?",
    "  2+2?\n",
    "",
    "What does <|im_start|>user\nmean?<|im_end|>",
    "<|im_start|>user\n2+2?<|im_end|> and then <|im_start|>",
    "<|im_start|>a text that is far too long to be a role, and goes on and on\n",
    "User: 2+2?\nAssistant:",
    "### Instruction:\n2+2?\n### Response:\n",
    "Write [INST] around it [/INST]",
    "[INST] and [/INST] mark an instruction.",
    "In DeepSeek, <｜User｜> comes before <｜Assistant｜>. Why?",
    "<|User|>: hello there",
    "[INST] is a mark of what?",
    "Which model uses <|User|> and <|Assistant|> as marks?",
    "Is <｜User｜> one token?",
    "<|user|> is a mark of what?",
    "<|im_start|>user\nan example that nobody closed",
    "<|user|>\n2+2?</s>\n<|assistant|>\n",
    "<|user|>\n2+2?<|assistant|>\n",
]


@pytest.mark.parametrize("prompt", LEFT_ALONE)
def test_a_prompt_in_no_known_markup_stays_as_it_is(prompt):
    assert plain_prompt(prompt) == prompt


REMEDY = MISSING_REFERENCE["slime"]


def test_a_trainers_sample_is_freed_of_all_markup():
    prompt = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert triple_of(prompt, "4", "hm\n</think>\n\n4<|im_end|>\n", remedy=REMEDY) == Triple("2+2?", "4", "4")
    kept = triple_of(prompt, "4", "hm\n</think>\n\n4<|im_end|>\n", remedy=REMEDY, keep_thinking=True)
    assert kept.output == "hm\n</think>\n\n4"
    again = triple_of("2+2?", "4", "4", remedy=REMEDY)
    assert again == Triple("2+2?", "4", "4")


def test_every_message_is_freed_by_itself_and_one_that_only_thought_goes():
    output = [
        {"role": "assistant", "content": "<think>a</think>4<|im_end|>"},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "<think>b</think>"},
        {"role": "assistant", "content": "<think>c</think>5"},
    ]
    found = written(output)
    assert [message["content"] for message in found] == ["4", "", "5"]
    assert [message["role"] for message in found] == ["assistant", "tool", "assistant"]
    assert written([]) == []


@pytest.mark.parametrize("nothing", [None, "", [], [{"role": "user", "content": ""}]], ids=str)
def test_only_the_output_may_be_empty(nothing):
    with pytest.raises(TripleError, match=r"reference: empty or null.*--label-key"):
        triple_of("p", nothing, "o", remedy=REMEDY)
    with pytest.raises(TripleError, match="prompt: empty or null"):
        triple_of(nothing, "r", "o", remedy=REMEDY)
    if nothing is not None:
        assert triple_of("p", "r", nothing, remedy=REMEDY).output == nothing


def test_a_template_around_nothing_is_an_empty_prompt():
    with pytest.raises(TripleError, match="prompt: empty or null"):
        triple_of("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n", "r", "o", remedy=REMEDY)


def test_a_reference_of_white_space_is_somebodys_reference():
    assert triple_of("p", " ", "o", remedy=REMEDY).reference == " "


@pytest.mark.parametrize("field", [3, {"a": 1}, [3], [{"role": "user"}]], ids=str)
def test_what_is_no_text_is_said_to_be_none(field):
    for sample in ((field, "r", "o"), ("p", field, "o"), ("p", "r", field)):
        with pytest.raises(TripleError, match="expected a"):
            triple_of(*sample, remedy=REMEDY)
    with pytest.raises(RowUnreadable, match="lone surrogate"):
        triple_of("p", "\ud800", "o", remedy=REMEDY)


@pytest.mark.parametrize(
    ("read", "piece"),
    [
        (strip_thinking, "<think>"),
        (strip_thinking, "</think>"),
        (strip_special_end, "</s> "),
        (strip_special_end, " "),
        (strip_special_end, "\n</s>x"),
        *[
            (plain_prompt, f"{markup}{rest}")
            for markup in ("<|turn>", "<|user|>", "[gMASK]<sop><|user|>", "<|start|>", "<|START_OF_TURN_TOKEN|>")
            for rest in ("", "user\n", "<|USER_TOKEN|>", "user<|message|>")
        ],
        (plain_prompt, "<|start|>user<|message|><|end|>"),
        (plain_prompt, "<|im_start|>assistant\n<think><|im_end|>"),
        (plain_prompt, "<bos>"),
        (plain_prompt, "<｜User｜><｜Assistant｜></think>"),
        (written, "<think></s>"),
        (plain_prompt, "<|im_start|>"),
        (plain_prompt, "<|im_start|>user\n"),
        (plain_prompt, "<|start_header_id|>"),
        (plain_prompt, "[INST]"),
        (plain_prompt, "<｜User｜>"),
    ],
)
def test_a_policy_that_repeats_itself_costs_no_more_than_its_length(read, piece):
    began = time.perf_counter()
    read(piece * (1_000_000 // len(piece)))
    assert time.perf_counter() - began < 5  # quadratic time took half a minute for a tenth of this


def test_trailing_white_space_is_no_work_for_an_event_loop():
    began = time.perf_counter()
    assert strip_special_end(f"4{' ' * 3_000_000}").endswith(" ")
    assert time.perf_counter() - began < 1  # character by character took a second for each million
