"""Our ids against those of upstream's client and tokenizer, recorded; and against its rules, written down again."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polar_ray.config import LimitsConfig
from polar_ray.encoding.encode import Encoder
from polar_ray.triples import PreferencePair, Triple

CASES = json.loads((Path(__file__).parents[2] / "goldens" / "encoding" / "upstream.json").read_text())["cases"]
PLAIN = [case for case in CASES if not case["interior_control"]]
SMUGGLED = [case for case in CASES if case["interior_control"]]


def encoder_for(tokenizer, case):
    limits = LimitsConfig(
        max_tokens=case["max_tokens"],
        max_response_tokens=case["max_response_tokens"],
        cut_side=case["cut_side"],
        on_empty="score",
    )
    return Encoder(tokenizer, limits)


def encode(tokenizer, case):
    triple = Triple(case["prompt"], case["reference"], case["output"], wrapper=case["wrapper"])
    return encoder_for(tokenizer, case).encode(triple)


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case["name"])
def test_ids_are_upstreams(polar_tokenizer, case):
    assert encode(polar_tokenizer, case).ids.tolist() == case["ids"]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case["name"])
def test_training_reads_the_ids_that_scoring_reads(polar_tokenizer, case):
    encoder = encoder_for(polar_tokenizer, case)
    texts = {name: case[name] for name in ("prompt", "reference")}
    pair = PreferencePair(**texts, chosen=case["output"], rejected=case["output"], wrapper=case["wrapper"])
    ((chosen, rejected),) = encoder.encode_pairs([pair])
    assert chosen.ids.tolist() == rejected.ids.tolist() == case["ids"]


@pytest.mark.parametrize("case", SMUGGLED, ids=lambda case: case["name"])
def test_a_control_token_that_upstream_lets_through_stays_out(polar_tokenizer, case):
    ids = encode(polar_tokenizer, case).ids.tolist()
    control = polar_tokenizer.control_ids
    assert sum(id in control for id in case["ids"]) > 3
    assert [id for id in ids if id in control] == [
        polar_tokenizer.bos_id,
        polar_tokenizer.separator_id,
        polar_tokenizer.score_id,
    ]


def test_the_examples_of_the_specification_are_all_here():
    names = [case["name"] for case in CASES if case["name"].startswith("spec-1.3")]
    assert len(names) == 9
    capital = next(case for case in CASES if "Shanghai." in str(case["output"]))
    assert capital["ids"][:6] == [1, 3993, 505, 410, 6872, 446]


def upstream_text(tokenizer, text):
    """Upstream's encode-decode round trip, by its rules: delete specials in one pass, then close up spaces."""
    kept = []
    rest = text
    specials = sorted((tokenizer.piece(id) for id in tokenizer.special_ids), key=len, reverse=True)
    slots = [f"[UNUSED_TOKEN_{n}]" for n in (0, *range(141, 147))]
    while rest:
        literal = next((literal for literal in [*specials, *slots] if rest.startswith(literal)), None)
        if literal is None:
            kept.append(rest[0])
        rest = rest[len(literal or " ") :]
    joined = "".join(kept).replace("\u2581", " ")
    for closed in (".", "?", "!", ","):
        joined = joined.replace(f" {closed}", closed)
    joined = joined.replace(" ' ", "'")
    for closed in ("n't", "'m", "'s", "'ve", "'re"):
        joined = joined.replace(f" {closed}", closed)
    return joined


FRAGMENTS = st.sampled_from(
    ["word", "word", " ", " ", "  ", "\n", " .", " ,", " ' ", " n't", " 's", "什么", "？", "\u2581", "é", "🧪", "<s>",
     "</s>", "<unk>", "<|im_start|>", "<|reward|>", "[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_143]", "<|", "|>", "[", "1234"]
)  # fmt: skip
TEXTS = st.lists(FRAGMENTS, max_size=12).map("".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_an_uncut_text_is_sanitised_by_upstreams_rules(tokenizer, text):
    assert Encoder(tokenizer, LimitsConfig()).sanitise(text) == upstream_text(tokenizer, text)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.tuples(TEXTS, TEXTS, TEXTS),
    side=st.sampled_from(["left", "right"]),
    most=st.integers(2, 30),
    max_tokens=st.integers(70, 200),
    wrapper=st.sampled_from(["sft", "pretrain"]),
)
def test_cuts_and_budgets_follow_upstreams_arithmetic(tokenizer, texts, side, most, max_tokens, wrapper):
    limits = LimitsConfig(max_tokens=max_tokens, max_response_tokens=most, cut_side=side, on_empty="score")
    encoded = Encoder(tokenizer, limits).encode(Triple(*texts, wrapper=wrapper))
    lengths = [len(tokenizer.encode_special(text)) for text in texts]
    kept = [min(length, most) for length in lengths[1:]]
    budget = (max_tokens - 4 - sum(kept)) // 2
    assert encoded.reference_cut_tokens == lengths[1] - kept[0]
    assert encoded.output_cut_tokens == lengths[2] - kept[1]
    assert encoded.prompt_cut_tokens == max(0, lengths[0] - budget)
