"""From what a trainer hands over to what POLAR reads: without chat templates, end-of-text tokens and think blocks.

`triple_of` is the one place for it: every road on which a trainer hands over a sample goes through it, once. The texts
may be hostile or degenerate (a policy that repeats `<think>` for ever), so everything here takes linear time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from polar_ray.errors import TripleError
from polar_ray.triples import Message, Text, Triple, join_text, parse_text

THINK, END_OF_THINK = "<think>", "</think>"

END_TOKENS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|end_of_text|>", "<|end|>", "<|return|>",
    "<|call|>", "</s>", "<eos>", "<pad>", "<end_of_turn>", "<turn|>", "<|finetune_right_pad_id|>", "<|user|>",
    "<|observation|>", "<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>", "<EOS_TOKEN>", "<｜end▁of▁sentence｜>",
    "<|end▁of▁sentence|>",
)  # fmt: skip
"""With which the usual policies end a turn or a text, or fill up behind it."""

DEEPSEEK_BEGIN = ("<｜begin▁of▁sentence｜>", "<|begin▁of▁sentence|>")
GLM_BEGIN = "[gMASK]<sop>"
BEGIN_TOKENS = ("<|begin_of_text|>", "<|startoftext|>", "<bos>", "<s>", "<BOS_TOKEN>", GLM_BEGIN, *DEEPSEEK_BEGIN)

MISSING_REFERENCE = {
    "openrlhf": "it is the label: name the references' column with --data.label_key",
    "slime": "it is the label: name the references' column with --label-key",
    "verl": "it is the ground_truth: put it into the data set's reward_model",
    "xtuner": "it is the label: put it into the data set's reward_model as ground_truth",
}
"""What to do about a sample without a reference, by the trainer that sent it."""

POLICY_ROLES = ("assistant", "model", "chatbot")


def _any_of(texts: Sequence[str]) -> str:
    return "|".join(map(re.escape, texts))


_END_IN_REVERSE = re.compile(rf"(?:\s*+(?:{_any_of([token[::-1] for token in END_TOKENS])}))*+")
_BEGIN = re.compile(rf"(?:{_any_of(BEGIN_TOKENS)})*+")
_UNOPENED_END = re.compile(rf"(?<![`'\"]){END_OF_THINK}(?![`'\"])")
_CLOSED_THINK = re.compile(rf"(?:{THINK})?\s*+{END_OF_THINK}\s*+")


@dataclass(frozen=True)
class Markup:
    """A template in which every turn begins with a head that holds its role, and is closed by an end."""

    head: re.Pattern[str]
    """Its group is the role; bounded in length, so that looking for it takes linear time."""

    end: re.Pattern[str]
    """With what may stand before the next turn's head."""

    begin: str = ""
    """A begin token without which the text is of another template."""


def _markup(head: str, end: str, begin: str = "") -> Markup:
    return Markup(re.compile(head), re.compile(end), begin)


MARKUPS = (
    # ChatML: Qwen, InternLM, LFM2, Nemotron 3, SmolLM; with <|im_sep|> Phi-4
    _markup(r"<\|im_start\|>([^<\n]{1,32})(?:\n|<\|im_sep\|>)", r"<\|im_end\|>\n*+"),
    # Llama 3
    _markup(r"<\|start_header_id\|>([^<\n]{1,32})<\|end_header_id\|>\n\n", r"<\|eo[tm]_id\|>\n*+"),
    # Llama 4
    _markup(r"<\|header_start\|>([^<\n]{1,32})<\|header_end\|>\n\n", r"<\|eo[tm]\|>\n*+"),
    # Gemma 1 to 3
    _markup(r"<start_of_turn>([^<\n]{1,32})\n", r"<end_of_turn>\n*+"),
    # Gemma 4
    _markup(r"<\|turn>([^<\n]{1,32})\n", r"<turn\|>\n*+"),
    # Phi-3, Phi-3.5, Phi-4-mini
    _markup(r"<\|(system|user|assistant|tool)\|>\n?", r"<\|end\|>\n*+"),
    # gpt-oss, whose open turn ends within its head
    _markup(
        r"<\|start\|>([^<\n ]{1,64})(?: [^<\n]{1,64})?(?:<\|channel\|>[^<\n]{1,64})?(?:<\|message\|>|\Z)",
        r"<\|(?:end|return|call|eot)\|>\n*+",
    ),
    # GLM-4, where the next turn's head is what closes a turn
    _markup(
        r"<\|(system|user|assistant|observation)\|>\n?", r"(?=<\|(?:system|user|assistant|observation)\|>)", GLM_BEGIN
    ),
    # Cohere's Command and Aya
    _markup(
        r"<\|START_OF_TURN_TOKEN\|><\|([A-Z]{1,32})_TOKEN\|>(?:<\|START_RESPONSE\|>)?",
        r"(?:<\|END_RESPONSE\|>)?<\|END_OF_TURN_TOKEN\|>\n*+",
    ),
)

DEEPSEEK = re.compile(r"<[｜|](User|Assistant)[｜|]>")
_DEEPSEEKS_TURN = re.compile(r"<[｜|]Assistant[｜|]>\s*+(?:</?think>\s*+)*+\Z")
MISTRAL = re.compile(r"\[/?INST\]|\[/?SYSTEM_PROMPT\]|</s>")


def triple_of(prompt: object, reference: object, output: object, *, remedy: str, keep_thinking: bool = False) -> Triple:
    """A sample as a trainer hands it over: the prompt without its template, the output as `written` gives it.

    Raises `TripleError` for a field that is neither a string nor messages, and for a prompt or a reference that is
    null or empty, whatever the endpoint's limits say of empty fields: a policy may answer with nothing, but a sample
    without a reference is a data set that was set up wrongly. `remedy` says what to do about that.
    """
    bare = plain_prompt(prompt) if isinstance(prompt, str) else prompt
    return Triple(
        _present(bare, "prompt", "send its text or its messages"),
        _present(reference, "reference", remedy),
        written(parse_text(output, "output"), keep_thinking=keep_thinking),
    )


def written(output: Text, *, keep_thinking: bool = False) -> Text:
    """What a policy wrote, without end tokens and, unless it is to be kept, without its think block.

    Of a conversation each message by itself; one that was nothing else goes. Call it once: where a policy wrote two
    think blocks, a second call takes the second.
    """

    def bare(text: str) -> str:
        text = strip_special_end(text)
        return text if keep_thinking else strip_thinking(text)

    if isinstance(output, str):
        return bare(output)
    messages: list[Message] = [{**message, "content": bare(message["content"])} for message in output]
    return [new for new, old in zip(messages, output, strict=True) if new["content"] or not old["content"]]


def _present(text: object, field: str, remedy: str) -> Text:
    parsed: Text = "" if text is None else parse_text(text, field)
    if not join_text(parsed, field):
        raise TripleError(f"{field}: empty or null, and POLAR needs it; {remedy}", field=field)
    return parsed


def strip_thinking(text: str) -> str:
    """What follows the first think block, stripped of white space; a text without a closed one as it is.

    Upstream's rule (POLAR repository, `src/polar/reward_func.py`, `extract_thinking_content`), and beyond it: a block
    needs no `<think>`, unless its `</think>` stands in quotes or backticks. The templates of DeepSeek-R1's distills and
    of Qwen3's thinking models end with it, so that their policies write the rest of the block only, and most trainers
    hand over what the policy wrote. Upstream would score the reasoning as the answer. Thinking in other marks (Gemma 4,
    gpt-oss) is not known here and counts as text.
    """
    begin, unopened = text.find(THINK), _UNOPENED_END.search(text)
    if unopened is not None and not 0 <= begin < unopened.start():
        return text[unopened.end() :].strip()
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
    """What a policy wrote after `prompt`. A think block that the prompt opened, as some templates do, is part of it."""
    return f"{THINK}\n{output}" if prompt.rstrip().endswith(THINK) else output


def strip_special_end(text: str) -> str:
    """The text without the end tokens that a policy closed it with; one that has none as it is."""
    end = _END_IN_REVERSE.match(text[::-1])
    return text[: len(text) - end.end()] if end else text


def plain_prompt(prompt: str) -> str:
    """The contents of a templated prompt's turns, joined by newlines as POLAR joins messages.

    Known are the templates of `MARKUPS`, DeepSeek's and Mistral's; a prompt in other markup, or with text outside its
    turns, stays as it is, less its begin tokens. The open turn in which the policy is to go on counts only for text
    that was put into its mouth. What a template itself puts into the system turn cannot be told from data, and counts:
    Qwen 2.5's "You are Qwen", gpt-oss' and Llama 3.1's and 3.2's headings, of which some have today's date, so that
    rewards change with the day. Messages have none of that.
    """
    begin = _BEGIN.match(prompt)
    began = begin[0] if begin else ""
    text = prompt[len(began) :]
    contents = _contents(text, began)
    return text if contents is None else "\n".join(contents)


def _contents(text: str, began: str) -> list[str] | None:
    for markup in MARKUPS:
        if markup.begin in began and (turns := _headed_turns(text, markup)) is not None:
            return turns
    if text.startswith(("[INST]", "[SYSTEM_PROMPT]")) and text.rstrip().endswith("[/INST]"):
        return [content for content in (part.strip() for part in MISTRAL.split(text)) if content]
    return _deepseek_turns(text) if _is_deepseeks(text, began) else None


def _headed_turns(text: str, markup: Markup) -> list[str] | None:
    contents: list[str] = []
    at = 0
    while at < len(text):
        head = markup.head.match(text, at)
        if head is None:
            return None
        role, begin = head[1].lower(), head.end()
        end = markup.end.search(text, begin)
        if end is None:
            is_open_turn = at > 0 and not markup.head.search(text, begin)
            return [*contents, *_open_turn(role, text[begin:])] if is_open_turn else None
        content = _closed_turn(role, text[begin : end.start()])
        if content or role != "system":  # Nemotron 3's template adds an empty one
            contents.append(content)
        at = end.end()
    return contents or None


def _is_deepseeks(text: str, began: str) -> bool:
    """Whether DeepSeek's marks are a template's here: a prompt may well mention them."""
    if any(token in began for token in DEEPSEEK_BEGIN):
        return True
    return bool(_DEEPSEEKS_TURN.search(text))


def _deepseek_turns(text: str) -> list[str] | None:
    system, *rest = DEEPSEEK.split(text)
    if not rest:
        return None
    turns = [(role.lower(), strip_special_end(turn)) for role, turn in zip(rest[::2], rest[1::2], strict=True)]
    closed = [_closed_turn(role, turn) for role, turn in turns[:-1]]
    return [*([system] if system else []), *closed, *_open_turn(*turns[-1])]


def _closed_turn(role: str, text: str) -> str:
    """A turn's content; a think block without a thought, as templates put before earlier answers, is none of it."""
    empty = _CLOSED_THINK.match(text) if role in POLICY_ROLES else None
    return text[empty.end() :] if empty else text


def _open_turn(role: str, text: str) -> list[str]:
    """What was put into the policy's mouth, if anything; a think block, empty or just opened, is nothing."""
    if role not in POLICY_ROLES:
        return [text]
    said = strip_thinking(strip_special_end(text))
    return [] if said.strip() in ("", THINK) else [said]
