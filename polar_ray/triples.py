"""What is scored and what comes back: `Triple`, `PreferencePair`, `Scored`; parsing from dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, get_args

from polar_ray.errors import RowUnreadable, TripleError

Wrapper = Literal["sft", "pretrain"]
"""How prompt and response are joined: `sft` by a newline, `pretrain` by nothing (upstream's names)."""

Message = Mapping[str, Any]
"""One turn, `{"role": ..., "content": ...}`. POLAR reads the content only; roles are dropped, as upstream does."""

Text = str | Sequence[Message]
"""A field of a triple: a string, or a conversation whose contents are joined by newlines."""

STATUS_OK = "ok"
"""`reward_status` of a row that has a reward. Every other status is the `code` of an error in `polar_ray.errors`."""

TEXT_FIELDS = ("prompt", "reference", "output")
PAIR_FIELDS = ("prompt", "reference", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Triple:
    """One thing to score: how close `output` is to what the author of `reference` would answer to `prompt`."""

    prompt: Text
    reference: Text
    output: Text
    wrapper: Wrapper = "sft"
    id: str | None = None

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Triple:
        """A triple from a mapping with upstream's keys; unknown keys are refused, so a typo cannot go unseen.

        Raises `TripleError` naming the field, the value's type and the remedy.
        """
        _refuse_unknown_keys(row, {*TEXT_FIELDS, "wrapper", "id"})
        texts = {name: parse_text(row.get(name), name) for name in TEXT_FIELDS}
        given_id = row.get("id")
        return cls(**texts, wrapper=parse_wrapper(row.get("wrapper")), id=None if given_id is None else str(given_id))


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one prompt, of which `chosen` is the better by `reference`'s light."""

    prompt: Text
    reference: Text
    chosen: Text
    rejected: Text
    wrapper: Wrapper = "sft"

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> PreferencePair:
        """A pair from a mapping with upstream's keys. Raises `TripleError` as `Triple.from_dict` does."""
        _refuse_unknown_keys(row, {*PAIR_FIELDS, "wrapper"})
        texts = {name: parse_text(row.get(name), name) for name in PAIR_FIELDS}
        return cls(**texts, wrapper=parse_wrapper(row.get("wrapper")))


@dataclass(frozen=True, slots=True)
class Rendered:
    """A triple as one text, as upstream's client renders it for an engine: `P\\nR<|reward|>P\\nO[UNUSED_TOKEN_130]`."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A triple as the ids that somebody's encoder made of it, whole."""

    ids: Sequence[int]


Row = Triple | Rendered | TokenIds | TripleError
"""What can be asked to be scored, or the error that says why one row of a request cannot be."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A triple's outcome: a reward, or the code and the sentence of what went wrong. Never neither, never both.

    `tokens` counts the encoded sequence, `cut_tokens` the tokens that limits removed from prompt, reference and
    output together, `removed_control_tokens` the control tokens that stood in the texts. All three are 0 when the
    triple failed before it was encoded.
    """

    reward: float | None
    status: str = STATUS_OK
    detail: str | None = None
    tokens: int = 0
    cut_tokens: int = 0
    removed_control_tokens: int = 0
    id: str | None = None

    @property
    def is_ok(self) -> bool:
        return self.status == STATUS_OK


def parse_text(value: object, field: str) -> Text:
    """`value` as a field of a triple. Raises `TripleError` where it is neither a string nor a list of messages."""
    if isinstance(value, str):
        return value
    if value is None:
        raise TripleError(f"{field}: expected a string or a list of messages, found null; fill it in", field=field)
    if is_sequence(value):
        for position, message in enumerate(value):
            _check_message(message, f"{field}[{position}]")
        return value
    found = type(value).__name__
    raise TripleError(f"{field}: expected a string or a list of messages, found {found}; convert it", field=field)


def parse_wrapper(value: object) -> Wrapper:
    """`value` as a wrapper; null means `sft`. Raises `TripleError` for anything else."""
    if value is None or value == "sft":
        return "sft"
    if value == "pretrain":
        return "pretrain"
    raise TripleError(f"wrapper: expected one of {get_args(Wrapper)}, found {str(value)[:20]!r}", field="wrapper")


def join_text(text: Text, field: str) -> str:
    """The one string POLAR reads for a field: contents of messages joined by a newline, as upstream's client does.

    Raises `RowUnreadable` for a lone surrogate, which no UTF-8 tokenizer can represent, and `TripleError` for what is
    neither a string nor messages.
    """
    text = parse_text(text, field)
    joined = text if isinstance(text, str) else "\n".join(message["content"] for message in text)
    try:
        joined.encode()
    except UnicodeEncodeError as error:
        raise RowUnreadable(
            f"{field}: a lone surrogate (U+{ord(joined[error.start]):04X}) at character {error.start}; repair the text",
            field=field,
        ) from None
    return joined


def is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether `value` is a list or tuple, the shapes in which conversations arrive."""
    return isinstance(value, (list, tuple))


def _check_message(message: object, where: str) -> None:
    if not isinstance(message, Mapping):
        raise TripleError(f"{where}: expected a message with role and content, found {type(message).__name__}")
    content = message.get("content")
    if not isinstance(content, str):
        found = "no content" if content is None else f"content of type {type(content).__name__}"
        raise TripleError(f"{where}: expected a message whose content is a string, found {found}")


def _refuse_unknown_keys(row: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(row) - known)
    if unknown:
        raise TripleError(f"unknown field {unknown[0]!r}; the fields are {', '.join(sorted(known))}", field=unknown[0])
