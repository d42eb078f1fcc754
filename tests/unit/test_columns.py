"""Columns of every kind become triples, a row that cannot says why on itself alone, and outcomes become columns."""

import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_ray.columns import (
    DETECTION_ROWS,
    REWARD_TYPES,
    check_schema,
    detect_message_json,
    parse_rows,
    read_column,
    read_triples,
    reward_columns,
)
from polar_ray.config import ColumnsConfig
from polar_ray.errors import RowUnreadable, TripleError
from polar_ray.triples import Scored, Triple

COLUMNS = ColumnsConfig()
CONVERSATION = [{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "你好"}]
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
TEXTS = ["plain", "", "日本語 🙂", "line\nbreak\x00", None]


def table_of(prompt, **others):
    """A table whose prompts are given and whose other fields are plain."""
    rest = pa.array(["text"] * len(prompt))
    return pa.table({"prompt": prompt, "reference": rest, "output": rest, **others})


def invalid_strings():
    """Strings of which the second is not UTF-8."""
    return pa.array([b"ok", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
def test_text_is_read_from_every_type_that_holds_text(kind):
    values = pa.array([None if text is None else text.encode() for text in TEXTS], pa.binary())
    column = values.cast(pa.string()).dictionary_encode().cast(kind) if "dict" in str(kind) else values.cast(kind)
    table = table_of(column)
    check_schema(table.schema, COLUMNS, "here")
    assert read_column(table, "prompt", 5) == TEXTS


def test_text_that_is_marked_as_json_is_text():
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps(CONVERSATION), None, "plain"]))
    table = table_of(column)
    check_schema(table.schema, COLUMNS, "here")
    assert read_column(table, "prompt", 3) == [json.dumps(CONVERSATION), None, "plain"]


@pytest.mark.parametrize("kind", [MESSAGES, pa.large_list(MESSAGES.value_type), pa.list_(MESSAGES.value_type, 2)])
def test_conversations_are_read_from_every_list_of_messages(kind):
    table = table_of(pa.array([CONVERSATION, None], kind))
    check_schema(table.schema, COLUMNS, "here")
    first, second = read_triples(table, COLUMNS, frozenset())
    assert first == Triple(CONVERSATION, "text", "text")
    assert "prompt: expected a string or a list of messages, found null" in str(second)


def test_a_column_without_any_value_passes_and_its_rows_say_so():
    table = table_of(pa.nulls(2))
    check_schema(table.schema, COLUMNS, "here")
    assert [type(row) for row in read_triples(table, COLUMNS, frozenset())] == [TripleError] * 2


def test_columns_go_by_the_names_they_were_given():
    columns = ColumnsConfig(prompt="q", reference="r", output="a", wrapper="kind")
    table = pa.table({"a": ["answer"], "q": ["question"], "kind": ["pretrain"], "r": ["truth"], "prompt": [None]})
    assert read_triples(table, columns, frozenset()) == [Triple("question", "truth", "answer", wrapper="pretrain")]


def test_rows_are_read_across_the_chunks_of_a_column():
    prompt = pa.chunked_array([["a"], [], ["b", None], invalid_strings()], pa.string())
    found = read_triples(table_of(prompt, n=range(6)), COLUMNS, frozenset())
    assert [row.prompt if isinstance(row, Triple) else type(row) for row in found] == [
        "a", "b", TripleError, "ok", RowUnreadable, "fine",
    ]  # fmt: skip


def test_a_slice_of_a_table_reads_as_itself():
    table = table_of(pa.array([CONVERSATION, None, CONVERSATION[:1]], MESSAGES)).slice(2)
    assert read_triples(table, COLUMNS, frozenset()) == [Triple(CONVERSATION[:1], "text", "text")]


@pytest.mark.parametrize(
    "column",
    [
        invalid_strings(),
        invalid_strings().cast(pa.binary()),
        invalid_strings().cast(pa.binary()).cast(pa.large_binary()).view(pa.large_string()),
        invalid_strings().cast(pa.binary()).cast(pa.binary_view()).view(pa.string_view()),
        pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), invalid_strings()),
        pa.ListArray.from_arrays([0, 1, 2, 3], pa.StructArray.from_arrays([invalid_strings()], ["content"])),
        pa.ListArray.from_arrays(
            [0, 1, 2, 3], pa.StructArray.from_arrays([invalid_strings(), pa.array(["a"] * 3)], ["role", "content"])
        ),
    ],
    ids=["string", "binary", "large string", "view", "dictionary", "content", "role"],
)
def test_bytes_that_are_no_text_fail_their_row_and_no_other(column):
    first, second, third = read_triples(table_of(column), COLUMNS, frozenset())
    assert isinstance(first, Triple)
    assert isinstance(third, Triple)
    assert second.code == RowUnreadable.code
    assert "prompt" in str(second)
    assert "UTF-8" in str(second)


@pytest.mark.parametrize(
    "dates",
    [
        pa.array([1, 1 << 60], pa.timestamp("s")),
        pa.array([1, 1 << 62], pa.duration("s")),
        pa.array([1, 1 << 30], pa.date32()),
    ],
    ids=["timestamp", "duration", "date"],
)
def test_a_date_in_a_message_that_python_cannot_hold_fails_its_row_and_no_other(dates):
    messages = pa.StructArray.from_arrays([pa.array(["a", "b"]), dates], ["content", "at"])
    first, second = read_triples(table_of(pa.ListArray.from_arrays([0, 1, 2], messages)), COLUMNS, frozenset())
    assert first.prompt[0]["content"] == "a"
    assert second.code == RowUnreadable.code
    assert "prompt: a message cannot be read" in str(second)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "user"}, r"prompt\[0\]: expected a message whose content is a string, found no content"),
        ({"role": "user", "content": None}, r"prompt\[0\]: .* found no content"),
        ({"content": 3}, r"prompt\[0\]: .* found content of type int"),
        ({"content": [{"type": "text", "text": "hi"}]}, r"prompt\[0\]: .* found content of type list"),
        ("user: hi", r"prompt\[0\]: expected a message with role and content, found str"),
    ],
)
def test_a_message_that_is_none_fails_its_row_with_its_place(message, says):
    rows = [{"prompt": [CONVERSATION[0]], "reference": "r", "output": "o"}] * 3
    rows[1] = {**rows[1], "prompt": [message]}
    first, second, third = parse_rows(rows, frozenset())
    assert first == third == Triple([CONVERSATION[0]], "r", "o")
    with pytest.raises(TripleError, match=says):
        raise second


@pytest.mark.parametrize("value", [3, 1.5, True, {"content": "x"}, b"bytes"])
def test_a_value_that_is_no_text_fails_its_row_with_its_type(value):
    (row,) = parse_rows([{"prompt": "p", "reference": value, "output": "o"}], frozenset())
    assert f"reference: expected a string or a list of messages, found {type(value).__name__}" in str(row)


def test_an_error_that_stands_for_a_row_or_a_value_stays():
    broken = RowUnreadable("this line is not JSON")
    assert parse_rows([broken, {"prompt": broken, "reference": "r", "output": "o"}], frozenset()) == [broken, broken]


@pytest.mark.parametrize(
    ("column", "wrappers"),
    [
        (pa.array(["sft", "pretrain", None]), ["sft", "pretrain", "sft"]),
        (pa.array(["sft", "SFT", "pretrain"]), ["sft", None, "pretrain"]),
        (pa.array(["sft", "", "chat"]), ["sft", None, None]),
        (pa.array(["sft", "pretrain", "sft"]).dictionary_encode(), ["sft", "pretrain", "sft"]),
        (pa.array([0, 1, None]), [None, None, "sft"]),
        (pa.nulls(3), ["sft"] * 3),
        (pa.array([["sft"], None, []]), [None, "sft", None]),
    ],
    ids=["texts", "wrong case", "unknown", "dictionary", "integers", "nulls", "lists"],
)
def test_a_wrong_wrapper_fails_its_row_and_a_null_is_sft(column, wrappers):
    found = read_triples(table_of(pa.array(["p"] * 3), wrapper=column), COLUMNS, frozenset())
    assert [row.wrapper if isinstance(row, Triple) else None for row in found] == wrappers
    refusals = [str(row) for row in found if not isinstance(row, Triple)]
    assert all("wrapper: expected one of ('sft', 'pretrain')" in refusal for refusal in refusals)


def as_json(*conversations):
    """A column of conversations as JSON text; of strings and nulls as they are."""
    return pa.array([item if item is None or isinstance(item, str) else json.dumps(item) for item in conversations])


@pytest.mark.parametrize(
    ("column", "is_json"),
    [
        (as_json(CONVERSATION, CONVERSATION), True),
        (as_json(None, CONVERSATION, None), True),
        (as_json(CONVERSATION).dictionary_encode(), True),
        (as_json("  \n" + json.dumps(CONVERSATION)), True),
        (as_json(CONVERSATION, []), True),
        (as_json(CONVERSATION, [{"role": "assistant", "tool_calls": []}]), True),
        (as_json(CONVERSATION, [{"role": "assistant", "content": None}]), True),
        (as_json(CONVERSATION, "plain"), False),
        (as_json(CONVERSATION, ""), False),
        (as_json(CONVERSATION, "[1, 2]"), False),
        (as_json([], []), False),
        (as_json([{"name": "x"}]), False),
        (as_json({"role": "user", "content": "x"}), False),
        (as_json("[" * 100_000), False),
        (as_json("[" + "9" * 10_000 + "]"), False),
        (as_json(CONVERSATION, "[citation needed]"), False),
        (as_json(None, None), False),
        (as_json(), False),
        (pa.array([CONVERSATION], MESSAGES), False),
        (pa.nulls(2), False),
    ],
)
def test_strings_are_json_when_every_first_row_is_a_list_of_messages(column, is_json):
    assert detect_message_json(table_of(column), COLUMNS) == ({"prompt"} if is_json else set())


def test_each_field_is_judged_by_itself():
    table = pa.table({"prompt": as_json(CONVERSATION), "reference": pa.array(["[x]"]), "output": as_json(CONVERSATION)})
    assert detect_message_json(table, COLUMNS) == {"prompt", "output"}


def test_bytes_that_are_no_text_do_not_decide_what_a_column_is():
    strings = pa.array([json.dumps(CONVERSATION).encode(), b"\xff", None], pa.binary())
    assert detect_message_json(table_of(strings), COLUMNS) == {"prompt"}


def test_the_settings_may_decide_what_a_column_is():
    for setting, found in [("always", {"prompt", "reference", "output"}), ("never", set())]:
        assert detect_message_json(table_of(as_json(CONVERSATION)), ColumnsConfig(message_json=setting)) == found


def test_only_the_first_rows_decide():
    texts = as_json(*[CONVERSATION] * DETECTION_ROWS, "plain")
    assert detect_message_json(table_of(texts), COLUMNS) == {"prompt"}
    texts = as_json(*[CONVERSATION] * (DETECTION_ROWS - 1), "plain")
    assert detect_message_json(table_of(texts), COLUMNS) == set()


def test_in_a_column_of_json_a_row_that_is_none_is_a_bad_row():
    column = as_json(CONVERSATION, "plain", [{"role": "user"}], None, [], '[{"content": "\\ud800"}]', CONVERSATION[:1])
    found = read_triples(table_of(column), COLUMNS, frozenset({"prompt"}))
    assert found[0].prompt == CONVERSATION
    assert "holds JSON lists of messages, but this row's text is not one" in str(found[1])
    assert "prompt[0]: expected a message whose content is a string, found no content" in str(found[2])
    assert "found null" in str(found[3])
    assert found[4].prompt == []  # no text: the encoder says so, as it does of an empty list in Arrow
    assert found[5].prompt[0]["content"] == "\ud800"  # the encoder refuses it, with its place
    assert found[6].prompt == CONVERSATION[:1]


def test_in_a_column_of_text_json_is_text():
    (row,) = read_triples(table_of(as_json(CONVERSATION)), COLUMNS, frozenset())
    assert row.prompt == json.dumps(CONVERSATION)


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(), st.binary(max_size=8)), max_size=12))
def test_every_row_gets_its_own_text_or_its_own_error(values):
    raw = [value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value for value in values]
    column = pa.array(raw, pa.binary()).view(pa.string())
    for table in (table_of(column), table_of(column.cast(pa.binary()))):
        found = read_triples(table, COLUMNS, frozenset())
        assert len(found) == len(raw)
        for given_bytes, row in zip(raw, found, strict=True):
            if isinstance(row, Triple):
                assert row.prompt == given_bytes.decode()
            else:
                assert given_bytes is None or given_bytes.decode(errors="replace").encode() != given_bytes


OUTCOMES = [
    Scored(-1.5, tokens=12, cut_tokens=3, id="a"),
    Scored(None, "row_unreadable", "byte 3 is not UTF-8"),
]


@pytest.mark.parametrize("rows", [0, 1, 2], ids=["none", "without failures", "with failures"])
def test_reward_columns_have_one_schema_whatever_is_in_them(rows):
    columns = reward_columns(OUTCOMES[:rows], COLUMNS)
    assert [name for name, _ in columns] == [
        "reward", "reward_status", "reward_detail", "reward_tokens", "reward_cut_tokens",
    ]  # fmt: skip
    assert tuple(column.type for _, column in columns) == REWARD_TYPES


def test_reward_columns_hold_what_came_of_each_row():
    table = pa.table(dict(reward_columns(OUTCOMES, ColumnsConfig(reward="polar"))))
    assert table.to_pylist() == [
        {"polar": -1.5, "polar_status": "ok", "polar_detail": None, "polar_tokens": 12, "polar_cut_tokens": 3},
        {
            "polar": None,
            "polar_status": "row_unreadable",
            "polar_detail": "byte 3 is not UTF-8",
            "polar_tokens": 0,
            "polar_cut_tokens": 0,
        },
    ]
