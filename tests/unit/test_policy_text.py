"""What a policy wrote, without its markup: on real templates, and on what is none."""

import time

import pytest

from polar_ray.errors import TripleError
from polar_ray.policy_text import (
    END_TOKENS,
    output_of,
    own_text,
    plain_prompt,
    strip_special_end,
    strip_thinking,
)

THINKING = [
    ("4", "4"),
    ("<think>two\nand two</think>\n\n4 ", "4"),
    ("before <think>a</think> 4", "4"),
    ("<think>a</think> 4 <think>b</think> 5", "4 <think>b</think> 5"),
    ("<think>a<think>b</think> 4", "4"),
    ("<think>never closed", "<think>never closed"),
    ("never opened</think> 4", "never opened</think> 4"),
    (" 4 ", " 4 "),
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
    assert strip_special_end("<|im_end|> ends a turn") == "<|im_end|> ends a turn"


def test_the_output_is_what_follows_the_prompt():
    assert output_of("What? 4</s>", "What? ") == "4"
    with pytest.raises(TripleError, match="query: expected the prompt and what follows it"):
        output_of("hat? 4", "What? ")


def test_a_think_block_that_the_prompt_opened_is_part_of_the_output():
    prompt = "<|im_start|>assistant\n<think>\n"
    assert own_text("two and two\n</think>\n\n4<|im_end|>", prompt) == "<think>\ntwo and two\n</think>\n\n4"
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
    "chatml, an empty system turn": (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n",
        "\n2+2?",
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
}


@pytest.mark.parametrize(("prompt", "plain"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_becomes_its_contents_joined_by_newlines(prompt, plain):
    assert plain_prompt(prompt) == plain


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
]


@pytest.mark.parametrize("prompt", LEFT_ALONE)
def test_a_prompt_in_no_known_markup_stays_as_it_is(prompt):
    assert plain_prompt(prompt) == prompt


@pytest.mark.parametrize(
    ("read", "piece"),
    [
        (strip_thinking, "<think>"),
        (strip_thinking, "</think>"),
        (strip_special_end, "</s> "),
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
