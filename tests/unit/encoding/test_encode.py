"""What the encoder promises whatever the texts are: its frame, its limits, its account of changes."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polar_ray.config import LimitsConfig
from polar_ray.encoding.encode import EncodedTriple, Encoder
from polar_ray.errors import EmptyText, RowUnreadable, TripleTooLong
from polar_ray.triples import Triple

RELAXED = LimitsConfig(on_empty="score")
MARKS = st.sampled_from(
    ["<|reward|>", "[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_130]", "<s>", "</s>", "<unk>", "<|im_end|>", "[UNUSED_TOKEN_142]"]
)


@st.composite
def spoofs(draw):
    """Texts that try to smuggle control tokens: literals whole, nested in each other, or in halves."""
    text = draw(st.text(max_size=5))
    for _ in range(draw(st.integers(1, 4))):
        mark = draw(MARKS)
        place = draw(st.integers(0, len(mark)))
        text = draw(
            st.sampled_from([mark[:place] + text + mark[place:], text + mark, mark + text, text + mark[:place]])
        )
    return text


def is_framed(tokenizer, ids):
    control = [place for place, id in enumerate(ids) if id in tokenizer.control_ids]
    return (
        len(control) == 3
        and control[0] == 0
        and control[2] == len(ids) - 1
        and [ids[place] for place in control] == [tokenizer.bos_id, tokenizer.separator_id, tokenizer.score_id]
    )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.tuples(spoofs(), spoofs(), spoofs()),
    wrapper=st.sampled_from(["sft", "pretrain"]),
    most=st.sampled_from([4, 12, 4096]),
    side=st.sampled_from(["left", "right"]),
)
def test_no_text_can_put_a_control_token_into_a_segment(tokenizer, texts, wrapper, most, side):
    limits = LimitsConfig(on_empty="score", max_response_tokens=most, max_tokens=2 * most + 64, cut_side=side)
    encoded = Encoder(tokenizer, limits).encode(Triple(*texts, wrapper=wrapper))
    assert is_framed(tokenizer, encoded.ids.tolist())


@pytest.mark.parametrize(
    "output",
    [
        "<|rew<|reward|>ard|>",
        "[UNUSED_TOKEN_[UNUSED_TOKEN_130]130]",
        "[UNUSED_<s>TOKEN_130]",
        "<|re<|re<|reward|>ward|>ward|>",
    ],
)
def test_a_nested_spoof_leaves_plain_pieces_and_is_counted(tokenizer, output):
    encoded = Encoder(tokenizer, RELAXED).encode(Triple("p", "r", output))
    assert is_framed(tokenizer, encoded.ids.tolist())
    assert encoded.removed_control_tokens >= 1


def test_a_literal_that_two_fields_make_together_is_removed(tokenizer):
    encoded = Encoder(tokenizer, RELAXED).encode(Triple("[UNUSED_TOKEN_", "130] r", "130] o", wrapper="pretrain"))
    assert is_framed(tokenizer, encoded.ids.tolist())
    assert encoded.removed_control_tokens == 2


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(max_size=30), reference=st.text(max_size=30), outputs=st.tuples(st.text(), st.text()))
def test_the_shareable_part_does_not_depend_on_the_output(tokenizer, prompt, reference, outputs):
    encoder = Encoder(tokenizer, RELAXED)
    one, other = (encoder.encode(Triple(prompt, reference, output)) for output in outputs)
    common = min(one.shareable, other.shareable)
    assert np.array_equal(one.ids[:common], other.ids[:common])
    assert one.shareable <= len(one.ids) - 1


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20)), max_size=6))
def test_many_at_once_are_encoded_as_each_alone(tokenizer, rows):
    encoder = Encoder(tokenizer, RELAXED)
    triples = [Triple(*row) for row in rows]
    for together, triple in zip(encoder.encode_many(triples), triples, strict=True):
        assert isinstance(together, EncodedTriple)
        assert np.array_equal(together.ids, encoder.encode(triple).ids)


def test_ids_are_int32_in_the_vocabulary(tokenizer):
    ids = Encoder(tokenizer, RELAXED).encode(Triple("\x00 \ufffd 🧪", "é", "e\u0301")).ids
    assert ids.dtype == np.int32
    assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size


@pytest.mark.parametrize(("field", "texts"), [("prompt", ("", "r", "o")), ("output", ("p", "r", "<s></s>"))])
def test_a_field_without_text_is_an_error_unless_asked_for(tokenizer, field, texts):
    with pytest.raises(EmptyText, match=f"{field}: no text"):
        Encoder(tokenizer, LimitsConfig()).encode(Triple(*texts))
    assert len(Encoder(tokenizer, RELAXED).encode(Triple(*texts)).ids) >= 5


def test_an_overlong_field_is_named_when_cutting_is_off(tokenizer):
    limits = LimitsConfig(max_response_tokens=10, on_too_long="error")
    with pytest.raises(TripleTooLong, match=r"output: .* tokens too long"):
        Encoder(tokenizer, limits).encode(Triple("p", "r", "many words " * 50))


def test_a_prompt_without_room_is_an_error_where_upstream_would_keep_it_whole(tokenizer):
    limits = LimitsConfig(max_tokens=40, max_response_tokens=30)
    with pytest.raises(TripleTooLong, match="leave the prompt nothing"):
        Encoder(tokenizer, limits).encode(Triple("p", "words " * 50, "words " * 50))


def test_a_bad_row_leaves_its_neighbours_alone(tokenizer):
    encoder = Encoder(tokenizer, LimitsConfig())
    rows = encoder.encode_many(
        [Triple("p", "r", "o"), Triple("p", "r", "\ud800"), Triple("p", "", "o"), Triple("p", "r", "o")]
    )
    assert [type(row) for row in rows] == [EncodedTriple, RowUnreadable, EmptyText, EncodedTriple]
    assert np.array_equal(rows[0].ids, rows[3].ids)
