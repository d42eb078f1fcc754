"""From a policy's own text to what POLAR reads: without think blocks, end-of-text tokens and chat templates.

Used where a trainer hands over what the policy produced instead of the prompt's messages and the answer's text. The
texts may be hostile or degenerate (a policy that repeats `<think>` for ever), so everything here takes linear time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from polar_ray.errors import TripleError

THINK, END_OF_THINK = "<think>", "</think>"

END_TOKENS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|end_of_text|>", "<|end|>", "</s>",
    "<eos>", "<pad>", "<end_of_turn>", "<｜end▁of▁sentence｜>", "<|end▁of▁sentence|>",
)  # fmt: skip
"""With which the usual policies end a turn or a text, or fill up behind it."""

BEGIN_TOKENS = ("<|begin_of_text|>", "<bos>", "<s>", "<｜begin▁of▁sentence｜>", "<|begin▁of▁sentence|>")

LONGEST_ROLE = 32
"""Characters; what is longer between the marks of a turn's head is no role, and the text no template's."""


@dataclass(frozen=True)
class Markup:
    """A template in which every turn has a head with its role, and a mark at its end."""

    head: str
    after_role: str
    end: str


MARKUPS = (
    Markup("<|im_start|>", "\n", "<|im_end|>"),  # ChatML: Qwen, InternLM
    Markup("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),  # Llama 3
    Markup("<|header_start|>", "<|header_end|>\n\n", "<|eot|>"),  # Llama 4
    Markup("<start_of_turn>", "\n", "<end_of_turn>"),  # Gemma
)

DEEPSEEK = re.compile(r"<[｜|](?:User|Assistant)[｜|]>")
MISTRAL = re.compile(r"\[/?INST\]|\[/?SYSTEM_PROMPT\]|</s>")


def strip_thinking(text: str) -> str:
    """What follows the first think block, stripped of white space; a text without one as it is.

    Upstream's rule (POLAR repository, `src/polar/reward_func.py`, `extract_thinking_content`).
    """
    begin = text.find(THINK)
    end = -1 if begin < 0 else text.find(END_OF_THINK, begin)
    return text if end < 0 else text[end + len(END_OF_THINK) :].strip()


def output_of(query: str, prompt: str) -> str:
    """The policy's output in `query`, which must begin with `prompt`; see `own_text`. Raises `TripleError`."""
    if not query.startswith(prompt):
        raise TripleError(
            "query: expected the prompt and what follows it; the policy's tokenizer does not give the prompt back as "
            "it was, or the prompt was cut: allow longer ones",
            field="query",
        )
    return own_text(query[len(prompt) :], prompt)


def own_text(output: str, prompt: str) -> str:
    """What a policy wrote after `prompt`, without end tokens. A think block that the prompt opened, as some templates
    do, is part of it."""
    output = strip_special_end(output)
    return f"{THINK}\n{output}" if prompt.rstrip().endswith(THINK) else output


def strip_special_end(text: str) -> str:
    """The text without the end tokens that a policy closed it with; one that has none as it is."""
    end = kept = len(text)
    while end:
        token = next((token for token in END_TOKENS if text.endswith(token, 0, end)), None)
        if token is not None:
            end = kept = end - len(token)
        elif text[end - 1].isspace():
            end -= 1
        else:
            break
    return text[:kept]


def plain_prompt(prompt: str) -> str:
    """The contents of a templated prompt's turns, joined by newlines as POLAR joins messages.

    Known are ChatML, Llama 3 and 4, Gemma, DeepSeek and Mistral; a prompt in other markup, or with text outside its
    turns, stays as it is. The open turn in which the policy is to go on counts only for text that was put into its
    mouth. A system turn that the template itself adds cannot be told from one of the data, and counts.
    """
    for token in BEGIN_TOKENS:
        prompt = prompt.removeprefix(token)
    contents = _contents(prompt)
    return prompt if contents is None else "\n".join(contents)


def _contents(prompt: str) -> list[str] | None:
    markup = next((markup for markup in MARKUPS if prompt.startswith(markup.head)), None)
    if markup is not None:
        return _headed_turns(prompt, markup)
    if prompt.startswith(("[INST]", "[SYSTEM_PROMPT]")):
        return [content for content in (part.strip() for part in MISTRAL.split(prompt)) if content]
    system, *turns = DEEPSEEK.split(prompt)
    if not turns:
        return None
    closed = [strip_special_end(turn) for turn in turns[:-1]]
    return [*([system] if system else []), *closed, *_open_turn(turns[-1])]


def _headed_turns(text: str, markup: Markup) -> list[str] | None:
    contents: list[str] = []
    at = 0
    while at < len(text):
        role = at + len(markup.head)
        head_end = text.find(markup.after_role, role, role + LONGEST_ROLE + len(markup.after_role))
        if not text.startswith(markup.head, at) or head_end < 0:
            return None
        begin = head_end + len(markup.after_role)
        end = text.find(markup.end, begin)
        if end < 0:
            return [*contents, *_open_turn(text[begin:])]
        contents.append(text[begin:end])
        at = end + len(markup.end)
        while text.startswith("\n", at):
            at += 1
    return contents


def _open_turn(text: str) -> list[str]:
    """What was put into the policy's mouth, if anything; a think block, empty or just opened, is nothing."""
    written = strip_thinking(strip_special_end(text))
    return [] if written.strip() in ("", THINK, END_OF_THINK) else [written]
