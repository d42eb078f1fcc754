"""Texts that upstream's client rendered, and ids that somebody else encoded: scored as they are, or refused."""

import numpy as np
import pytest

from polar_ray.config import LimitsConfig
from polar_ray.encoding.encode import RENDERED_SLACK_TOKENS, Encoder
from polar_ray.encoding.tokenizer import SEPARATOR
from polar_ray.errors import TripleError, TripleTooLong
from polar_ray.triples import Rendered, TokenIds, Triple

TRIPLES = [
    Triple("What is the capital of China?", "Beijing.", "Shanghai."),
    Triple("中国的首都是哪里？", "北京。", "上海！"),
    Triple("The sky is", " blue", " green", wrapper="pretrain"),
    Triple("2+2?\nAnd 3+3?", "4\n6", "  5 "),
]


def render(triple: Triple, score: str) -> str:
    """As upstream's client does with texts that need no sanitising and no cut."""
    sep = "" if triple.wrapper == "pretrain" else "\n"
    return f"{triple.prompt}{sep}{triple.reference}{SEPARATOR}{triple.prompt}{sep}{triple.output}{score}"


@pytest.fixture
def encoder(tokenizer):
    return Encoder(tokenizer, LimitsConfig())


@pytest.mark.parametrize("triple", TRIPLES)
def test_a_rendered_triple_has_the_ids_of_the_triple(encoder, triple):
    expected = encoder.encode(triple)
    rendered = encoder.encode_rendered(Rendered(render(triple, encoder.tokenizer.score_literal)))
    given = encoder.encode_ids(TokenIds(expected.ids.tolist()))
    assert rendered.ids.tolist() == given.ids.tolist() == expected.ids.tolist()
    assert rendered.ids.dtype == given.ids.dtype == np.int32
    assert rendered.halfway == given.halfway == expected.halfway
    assert rendered.ids[: rendered.shareable].tolist() == expected.ids[: rendered.shareable].tolist()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no frame at all",
        "P\nR<|reward|>P\nO",
        "P\nRP\nO{score}",
        "P\nR<|reward|>P\nO<|reward|>P\nO{score}",
        "P\nR<|reward|>P\nO{score}{score}",
        "P\nR{score}<|reward|>P\nO{score}",
        "P\n</s>R<|reward|>P\nO{score}",
        "P\nR<|reward|>P\nO<|im_end|>{score}",
        "P\nR<|reward|>P\nO{score} ",
        "P\nR<|rew<|reward|>ard|>P\nO{score}<|reward|>",
        "P\n\ud800R<|reward|>P\nO{score}",
    ],
)
def test_a_text_with_another_frame_or_a_forged_token_is_refused(encoder, text):
    with pytest.raises(TripleError):
        encoder.encode_rendered(Rendered(text.replace("{score}", encoder.tokenizer.score_literal)))


def test_ids_with_another_frame_are_refused(encoder):
    tokenizer = encoder.tokenizer
    bos, sep, score = tokenizer.bos_id, tokenizer.separator_id, tokenizer.score_id
    good = encoder.encode(TRIPLES[0]).ids.tolist()
    assert encoder.encode_ids(TokenIds(good)).ids.tolist() == good
    for bad in (
        [], good[1:], good[:-1], [bos, *good], [*good, score], [*good[:-1], sep, score], [bos, bos, sep, score],
        [bos, tokenizer.vocab_size, sep, score], [bos, -1, sep, score], [bos, 2**40, sep, score], [bos, score, sep],
        [good[1], bos, *good[2:]],
    ):  # fmt: skip
        with pytest.raises(TripleError):
            encoder.encode_ids(TokenIds(bad))


def test_who_encodes_must_cut_as_well(tokenizer):
    encoder = Encoder(tokenizer, LimitsConfig(max_tokens=100))
    filler = Encoder(tokenizer, LimitsConfig()).encode(TRIPLES[0]).ids[1]
    frame = [tokenizer.bos_id, tokenizer.separator_id, tokenizer.score_id]
    fits = [frame[0], *[int(filler)] * (97 + RENDERED_SLACK_TOKENS), *frame[1:]]
    assert len(encoder.encode_ids(TokenIds(fits)).ids) == 100 + RENDERED_SLACK_TOKENS
    with pytest.raises(TripleTooLong, match=r"limits\.max_tokens = 100"):
        encoder.encode_ids(TokenIds([fits[0], *fits[1:2], *fits[1:]]))


def test_a_bad_row_of_any_form_keeps_its_place(encoder):
    error = TripleError("from the request")
    rows = encoder.encode_rows([TRIPLES[0], Rendered("x"), TokenIds([1]), error, TRIPLES[1]])
    assert [isinstance(row, TripleError) for row in rows] == [False, True, True, True, False]
    assert rows[3] is error
