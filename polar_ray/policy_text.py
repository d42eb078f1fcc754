"""From a policy's own text to what POLAR reads: without think blocks, end-of-text tokens and chat templates.

Used where a trainer hands over what the policy produced instead of the prompt's messages and the answer's text.
"""

from __future__ import annotations

import re

THINK = re.compile(r"<think>.*?</think>(.*)", re.DOTALL)

END_TOKENS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<|eom_id|>", "</s>", "<eos>",
    "<end_of_turn>", "<｜end▁of▁sentence｜>", "<|end▁of▁sentence|>",
)  # fmt: skip
"""With which the usual policies end a turn or a text."""

BEGIN_TOKENS = ("<|begin_of_text|>", "<bos>", "<s>", "<｜begin▁of▁sentence｜>", "<|begin▁of▁sentence|>")

TURNS = (
    re.compile(r"<\|im_start\|>(?P<role>[^\n]*)\n(?P<content>.*?)(?:<\|im_end\|>\n?|\Z)", re.DOTALL),
    re.compile(
        r"<\|start_header_id\|>(?P<role>.*?)<\|end_header_id\|>\n\n(?P<content>.*?)(?:<\|eot_id\|>|\Z)", re.DOTALL
    ),
    re.compile(r"<start_of_turn>(?P<role>[^\n]*)\n(?P<content>.*?)(?:<end_of_turn>\n?|\Z)", re.DOTALL),
    re.compile(r"<[｜|](?P<role>User|Assistant)[｜|]>(?P<content>.*?)(?=<[｜|](?:User|Assistant)[｜|]>|\Z)", re.DOTALL),
    re.compile(r"\[INST\](?P<role>)(?P<content>.*?)\[/INST\]", re.DOTALL),
)
"""ChatML (Qwen, InternLM), Llama 3, Gemma, DeepSeek, Mistral."""


def strip_thinking(text: str) -> str:
    """What follows the first think block, stripped of white space; a text without one as it is.

    Upstream's rule (POLAR repository, `src/polar/reward_func.py`, `extract_thinking_content`).
    """
    found = THINK.search(text)
    return found.group(1).strip() if found else text


def output_of(query: str, prompt: str) -> str:
    """The policy's output in `query`, which begins with `prompt`: without end tokens. A query that does not begin so
    is taken for the output itself."""
    return strip_special_end(query.removeprefix(prompt))


def strip_special_end(text: str) -> str:
    """The text without the end tokens that a policy closed it with; one that has none as it is."""
    while (stripped := _without_end_token(text)) != text:
        text = stripped
    return text


def plain_prompt(prompt: str) -> str:
    """The contents of a templated prompt's turns, joined by newlines as POLAR joins messages; a prompt whose markup is
    not one of `TURNS` as it is. The empty turn that asks the policy to go on is left out."""
    for token in BEGIN_TOKENS:
        prompt = prompt.removeprefix(token)
    for turn in TURNS:
        contents = [found.group("content").strip() for found in turn.finditer(prompt)]
        if contents:
            return "\n".join(content for content in contents if content)
    return prompt


def _without_end_token(text: str) -> str:
    trimmed = text.rstrip()
    token = next((token for token in END_TOKENS if trimmed.endswith(token)), None)
    return text if token is None else trimmed.removesuffix(token)
