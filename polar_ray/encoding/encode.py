"""From a triple to the exact ids POLAR reads.

    ids = [bos] + SP(P + sep + R) + [separator] + SP(P + sep + O) + [score]        sep = "\\n", or "" for "pretrain"

P, R and O are upstream's texts, quirks included, because rewards move when a newline does
(xtuner 0.2.0, `xtuner/utils/rm_utils.py`). Two things differ on purpose. Upstream sends text, so a nested spelling
such as `<|rew<|reward|>ard|>` survives its one-pass filter and becomes a second separator on the server; ours are ids,
and every control id that a segment yields is removed and counted. And where upstream's prompt budget falls to zero
its slice keeps the whole prompt; here that row is `TripleTooLong`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from polar_ray.config import LimitsConfig
from polar_ray.encoding.tokenizer import SEPARATOR, PolarTokenizer
from polar_ray.errors import EmptyText, TripleError, TripleTooLong
from polar_ray.planning import Ids, common_length
from polar_ray.triples import PreferencePair, Rendered, Row, Text, TokenIds, Triple, Wrapper, join_text

ENCODING_VERSION = 1
"""Part of every receipt; raised whenever some triple encodes to other ids than before."""

FRAME_TOKENS = 4
"""What upstream sets aside before it shares out `max_tokens`: final token, separator and two newlines."""

RENDERED_SLACK_TOKENS = 64
"""By how much a rendered text may pass `max_tokens`: upstream cuts ids and sends text, and cut texts tokenise anew."""

CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
"""Replacements in this order, everywhere: InternLM2's slow tokenizer calls transformers' clean-up whenever it decodes,
and upstream decodes every text once, in training as well."""


@dataclass(frozen=True, slots=True)
class EncodedTriple:
    """One sequence, ready for a model, with an account of what was changed on the way.

    `ids[:shareable]`, which goes on beyond `halfway`, does not depend on the output: bos, prompt and reference,
    separator, and the pieces of the prompt's repetition. `cut_tokens` are those that limits removed, per field, counted
    as upstream counts.
    """

    ids: Ids
    halfway: int
    """Tokens up to the separator and with it; sequences that begin alike so far are of one group."""

    shareable: int
    prompt_cut_tokens: int = 0
    reference_cut_tokens: int = 0
    output_cut_tokens: int = 0
    removed: tuple[str, ...] = ()
    """Control tokens that stood in the texts, or that their pieces would have made, and were removed; in order."""

    @property
    def cut_tokens(self) -> int:
        return self.prompt_cut_tokens + self.reference_cut_tokens + self.output_cut_tokens

    @property
    def removed_control_tokens(self) -> int:
        return len(self.removed)


@dataclass(slots=True)
class _Draft:
    """The texts of one triple after upstream's sanitising and cutting."""

    prompt: str
    reference: str
    output: str
    separators: tuple[str, str]
    """Before the reference, before the output."""

    cut: tuple[int, int, int]
    removed: list[str]

    @property
    def first(self) -> str:
        return f"{self.prompt}{self.separators[0]}{self.reference}"

    @property
    def second(self) -> str:
        return f"{self.prompt}{self.separators[1]}{self.output}"


class Encoder:
    """Encodes triples, and pairs for training, for one checkpoint under one set of limits."""

    def __init__(self, tokenizer: PolarTokenizer, limits: LimitsConfig, *, newline_before_empty: bool = True) -> None:
        """`newline_before_empty=False` is how upstream's training differs from its client: prompt and an empty text are
        joined by nothing (xtuner 0.2.0, `xtuner/dataset/preference_dataset.py`, lines 218 to 233)."""
        self.tokenizer = tokenizer
        self.limits = limits
        self._newline_before_empty = newline_before_empty

    def encode(self, triple: Triple) -> EncodedTriple:
        """The ids of one triple. Raises a `TripleError` that says which field cannot be encoded and why."""
        encoded = self.encode_many([triple])[0]
        if isinstance(encoded, TripleError):
            raise encoded
        return encoded

    def encode_rows(self, rows: Sequence[Row]) -> list[EncodedTriple | TripleError]:
        """As `encode_many`, for rows in any form; an error that stands for a row stays. Safe in any thread."""
        triples = iter(self.encode_many([row for row in rows if isinstance(row, Triple)]))
        return [next(triples) if isinstance(row, Triple) else self._encode_other(row) for row in rows]

    def _encode_other(self, row: Rendered | TokenIds | TripleError) -> EncodedTriple | TripleError:
        try:
            if isinstance(row, Rendered):
                return self.encode_rendered(row)
            return self.encode_ids(row) if isinstance(row, TokenIds) else row
        except TripleError as error:
            return error

    def encode_many(self, triples: Sequence[Triple]) -> list[EncodedTriple | TripleError]:
        """Each triple's ids, or the error that stands in their place; in order, neighbours unaffected.

        The final length can pass `max_tokens` by a few tokens, because cut texts are tokenised again; so it does
        upstream.
        """
        found = self._encode_drafts(
            [
                self._try_drafts(triple.prompt, triple.reference, {"output": triple.output}, triple.wrapper)
                for triple in triples
            ]
        )
        return [row if isinstance(row, TripleError) else row[0] for row in found]

    def encode_pairs(self, pairs: Sequence[PreferencePair]) -> list[tuple[EncodedTriple, EncodedTriple] | TripleError]:
        """(chosen, rejected) of each pair, or the error that says which field is at fault; in order.

        Each is what its triple encodes to, but where the prompt must be cut: it is cut alike for both, to what the
        longer output leaves, as upstream does in training.
        """
        found = self._encode_drafts(
            [
                self._try_drafts(
                    pair.prompt, pair.reference, {"chosen": pair.chosen, "rejected": pair.rejected}, pair.wrapper
                )
                for pair in pairs
            ]
        )
        return [row if isinstance(row, TripleError) else (row[0], row[1]) for row in found]

    def _encode_drafts(self, rows: Sequence[list[_Draft] | TripleError]) -> list[list[EncodedTriple] | TripleError]:
        """The sequence of every draft; each text is tokenised once, whatever it is a part of."""
        drafts = [draft for row in rows if not isinstance(row, TripleError) for draft in row]
        texts = dict.fromkeys(text for draft in drafts for text in (draft.first, draft.second, draft.prompt))
        segments = {
            text: np.array(ids, dtype=np.int32)
            for text, ids in zip(texts, self.tokenizer.encode(list(texts)), strict=True)
        }
        return [
            row if isinstance(row, TripleError) else [self._assemble(draft, segments) for draft in row] for row in rows
        ]

    def encode_rendered(self, rendered: Rendered) -> EncodedTriple:
        """The ids of a text that upstream's client rendered: sanitised, cut and framed by that client, not again here.

        The text must have one separator and end with its only score token; any other control token, spelt out or
        made by pieces, is a forgery. Raises `TripleError`, or `TripleTooLong` beyond `max_tokens`.
        """
        tokenizer = self.tokenizer
        text = join_text(rendered.text, "text")
        halves = text.removesuffix(tokenizer.score_literal).split(SEPARATOR)
        if not text.endswith(tokenizer.score_literal) or len(halves) != 2:
            raise TripleError(
                f"text: expected prompt and reference, {SEPARATOR}, prompt and output, {tokenizer.score_literal}, as "
                f"upstream's client renders a triple; found {len(halves) - 1} separators and "
                f"{'a' if text.endswith(tokenizer.score_literal) else 'no'} score token at the end",
                field="text",
            )
        first, second = (np.array(ids, dtype=np.int32) for ids in tokenizer.encode(halves))
        for half, ids in zip(halves, (first, second), strict=True):
            if tokenizer.special_pattern.search(half) or tokenizer.is_control[ids].any():
                raise TripleError(
                    "text: a control token stands inside a segment; take it out of the texts", field="text"
                )
        return self._framed(first, second)

    def encode_ids(self, given: TokenIds) -> EncodedTriple:
        """Ids that somebody else encoded, if they are framed as POLAR's are. Raises `TripleError` if not."""
        tokenizer = self.tokenizer
        try:
            ids = np.array(given.ids, dtype=np.int64)
        except OverflowError:
            raise TripleError(f"ids: one is outside the {tokenizer.vocab_size} pieces", field="ids") from None
        outside = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
        if len(outside):
            raise TripleError(f"ids: {outside[0]} is outside the {tokenizer.vocab_size} pieces", field="ids")
        controls = ids[tokenizer.is_control[ids]].tolist()
        expected = [tokenizer.bos_id, tokenizer.separator_id, tokenizer.score_id]
        if controls != expected or ids[0] != tokenizer.bos_id or ids[-1] != tokenizer.score_id:
            raise TripleError(
                f"ids: expected {expected[0]} first, one {expected[1]} inside, {expected[2]} last and no other control "
                f"id; found control ids {controls[:8]}",
                field="ids",
            )
        middle = int((ids == tokenizer.separator_id).argmax())
        return self._framed(ids[1:middle].astype(np.int32), ids[middle + 1 : -1].astype(np.int32))

    def _framed(self, first: Ids, second: Ids) -> EncodedTriple:
        """A sequence of two halves that are ids already; where the prompt ends in them is not known."""
        if len(first) + len(second) + 3 > self.limits.max_tokens + RENDERED_SLACK_TOKENS:
            raise TripleTooLong(
                f"{len(first) + len(second) + 3} tokens, and limits.max_tokens = {self.limits.max_tokens}; whoever "
                "encodes must cut as well",
                field="text",
            )
        halfway = 2 + len(first)
        return EncodedTriple(self._join(first, second), halfway, halfway + common_length(first, second))

    def _try_drafts(
        self, prompt: Text, reference: Text, outputs: Mapping[str, Text], wrapper: Wrapper
    ) -> list[_Draft] | TripleError:
        try:
            return self._drafts(prompt, reference, outputs, wrapper)
        except TripleError as error:
            return error

    def _drafts(self, prompt: Text, reference: Text, outputs: Mapping[str, Text], wrapper: Wrapper) -> list[_Draft]:
        """One draft for each of `outputs`, by the names of their fields; prompt and reference are the same in all."""
        names = ("prompt", "reference", *outputs)
        texts = [
            join_text(text, name) for name, text in zip(names, (prompt, reference, *outputs.values()), strict=True)
        ]
        removed = [self.tokenizer.special_pattern.findall(text) for text in texts]
        if self._surely_fit(texts):
            kept, cut = [self.sanitise(text) for text in texts], [0] * len(texts)
        else:
            kept, cut = self._cut(names, texts)
        if self.limits.on_empty == "error":
            for name, text in zip(names, kept, strict=True):
                if not text:
                    raise EmptyText(f"{name}: no text; fill it in, or set limits.on_empty = score", field=name)
        first = self._separator(kept[1], wrapper)
        return [
            _Draft(
                kept[0],
                kept[1],
                kept[place],
                (first, self._separator(kept[place], wrapper)),
                (cut[0], cut[1], cut[place]),
                [*removed[0], *removed[1], *removed[place]],
            )
            for place in range(2, len(texts))
        ]

    def _separator(self, response: str, wrapper: Wrapper) -> str:
        joined_by_nothing = wrapper == "pretrain" or not (response or self._newline_before_empty)
        return "" if joined_by_nothing else "\n"

    def sanitise(self, text: str) -> str:
        """What upstream's encode-decode round trip makes of an uncut text: literals deleted, spaces cleaned up."""
        return _clean_up(self.tokenizer.special_pattern.sub("", text).replace("\u2581", " "))

    def _surely_fit(self, texts: list[str]) -> bool:
        """Whether no limit can be reached, by a bound that needs no tokeniser: a token covers at least one byte."""
        prompt, reference, *outputs = (len(text.encode()) + 1 for text in texts)
        output = max(outputs)
        return max(reference, output) <= self.limits.max_response_tokens and prompt <= self._prompt_budget(
            reference, output
        )

    def _prompt_budget(self, reference_tokens: int, output_tokens: int) -> int:
        return (self.limits.max_tokens - FRAME_TOKENS - reference_tokens - output_tokens) // 2

    def _cut(self, names: Sequence[str], texts: list[str]) -> tuple[list[str], list[int]]:
        """The texts (prompt, reference, outputs) within the limits, and the tokens each lost."""
        ids = [self.tokenizer.encode_special(text) for text in texts]
        most = self.limits.max_response_tokens
        responses = [response[:most] if self.limits.cut_side == "right" else response[-most:] for response in ids[1:]]
        n_reference, n_output = len(responses[0]), max(map(len, responses[1:]))
        budget = self._prompt_budget(n_reference, n_output)
        if budget < 1:
            raise TripleTooLong(
                f"reference and output take {n_reference + n_output} of max_tokens = "
                f"{self.limits.max_tokens} and leave the prompt nothing; raise limits.max_tokens or lower "
                "limits.max_response_tokens",
                field="prompt",
            )
        kept = [ids[0][-budget:], *responses]
        cut = [len(before) - len(after) for before, after in zip(ids, kept, strict=True)]
        if sum(cut) and self.limits.on_too_long == "error":
            name, tokens = next(pair for pair in zip(names, cut, strict=True) if pair[1])
            raise TripleTooLong(
                f"{name}: {tokens} tokens too long; shorten it, raise limits.max_tokens or limits.max_response_tokens, "
                "or set limits.on_too_long = cut",
                field=name,
            )
        special = self.tokenizer.special_ids
        return [_clean_up(self.tokenizer.decode([id for id in part if id not in special])) for part in kept], cut

    def _assemble(self, draft: _Draft, segments: dict[str, Ids]) -> EncodedTriple:
        tokenizer = self.tokenizer
        first, second = segments[draft.first], segments[draft.second]
        removed = list(draft.removed)
        for_first, for_second = tokenizer.is_control[first], tokenizer.is_control[second]
        if for_first.any() or for_second.any():
            # The prompt stands in both segments; what it smuggles is one token of the text.
            again = int(tokenizer.is_control[segments[draft.prompt]].sum())
            smuggled = [*first[for_first].tolist(), *second[for_second].tolist()[again:]]
            removed += [tokenizer.piece(id) for id in smuggled]
            first, second = first[~for_first], second[~for_second]
        halfway = 2 + len(first)
        shareable = halfway + common_length(second, segments[draft.prompt])
        return EncodedTriple(self._join(first, second), halfway, shareable, *draft.cut, removed=tuple(removed))

    def _join(self, first: Ids, second: Ids) -> Ids:
        """The two halves in POLAR's frame."""
        tokenizer = self.tokenizer
        frame = [
            np.array([id], dtype=np.int32) for id in (tokenizer.bos_id, tokenizer.separator_id, tokenizer.score_id)
        ]
        return np.concatenate([frame[0], first, frame[1], second, frame[2]])


def _clean_up(text: str) -> str:
    for spaced, closed in CLEAN_UP:
        text = text.replace(spaced, closed)
    return text
