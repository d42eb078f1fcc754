"""The order of outputs, the agreement with a person, and what a terminal is shown."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from rich.cells import cell_len
from typer.testing import CliRunner

from polar_ray.cli.rank import rank, spearman
from polar_ray.errors import ConfigError, InputError, SchemaError

COLUMNS = ("prompt", "reference", "output", "reward", "reward_status", "person_rank")
APP = typer.Typer()
APP.command()(rank)


@pytest.fixture
def write(tmp_path):
    def write(rows, columns=COLUMNS, name="part.parquet"):
        """Rows, shorter ones filled up with nulls, as a scored file."""
        filled = [[*row, *[None] * (len(columns) - len(row))] for row in rows]
        table = pa.table(dict(zip(columns, map(list, zip(*filled, strict=True)), strict=True)))
        pq.write_table(table, tmp_path / name)
        return str(tmp_path / name)

    return write


@pytest.fixture
def run(monkeypatch):
    def run(*arguments, width=100):
        """What is printed, notes included."""
        monkeypatch.setenv("COLUMNS", str(width))
        result = CliRunner().invoke(APP, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return run


@pytest.fixture
def ranked(run):
    def ranked(*arguments):
        return [json.loads(line) for line in run(*arguments, "--json").splitlines() if line.startswith("{")]

    return ranked


def test_outputs_are_ordered_by_reward_ties_share_a_rank_and_failures_come_last(write, ranked):
    path = write(
        [
            ("p", "r", "low", -2.0, "ok"),
            ("p", "r", "failed", None, "triple_too_long"),
            ("p", "r", "tied", -1.0, "ok"),
            ("p", "r", "tied too", -1.0, "ok"),
            ("p", "r", "best", 0.5, "ok"),
        ],
        COLUMNS[:5],
    )
    (group,) = ranked(path)
    assert [(row["rank"], row["output"], row["status"]) for row in group["rows"]] == [
        (1, "best", "ok"),
        (2, "tied", "ok"),
        (2, "tied too", "ok"),
        (4, "low", "ok"),
        (None, "failed", "triple_too_long"),
    ]


def test_a_group_is_a_prompt_with_its_reference_wherever_its_rows_lie(write, ranked, tmp_path):
    write([("p", "r", "a", 1.0), ("p", "other", "b", 1.0)], name="1.parquet")
    write([("p", "r", "c", 2.0)], name="2.parquet")
    assert [
        (group["prompt"], group["reference"], [row["output"] for row in group["rows"]]) for group in ranked(tmp_path)
    ] == [
        ("p", "r", ["c", "a"]),
        ("p", "other", ["b"]),
    ]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
        ([1, 2, 2, 3], [1, 2, 3, 4], np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1]),
        ([1, 1, 1], [1, 2, 3], None),
        ([1], [1], None),
        ([], [], None),
    ],
    ids=["same", "reversed", "one swap", "ties", "no order", "one", "none"],
)
def test_spearman(one, other, expected):
    assert spearman(one, other) == (None if expected is None else pytest.approx(expected))


def test_agreement_with_a_person_is_positive_when_rank_1_has_the_highest_reward(write, run, ranked):
    path = write(
        [
            ("agreed", "r", "a", 3.0, "ok", 1),
            ("agreed", "r", "b", 2.0, "ok", 2),
            ("agreed", "r", "not ranked", 9.0, "ok", None),
            ("reversed", "r", "a", 3.0, "ok", 2),
            ("reversed", "r", "b", 2.0, "ok", 1),
            ("one", "r", "a", 3.0, "ok", 1),
        ]
    )
    assert [group["spearman"] for group in ranked(path)] == [pytest.approx(1), pytest.approx(-1), None]
    printed = run(path)
    assert "person" in printed
    assert "mean Spearman 0.000 over 2 prompts" in printed


def test_the_mean_counts_prompts_that_are_not_shown(write, run):
    path = write([(f"prompt {i}", "r", o, float(-o), "ok", o) for i in range(5) for o in range(3)])
    printed = run(path, "--max-groups", 2)
    assert "prompt 1" in printed
    assert "prompt 2" not in printed
    assert "mean Spearman 1.000 over 5 prompts" in printed
    assert "3 of 5 prompts are not shown" in printed
    assert "not shown" not in run(path, "--max-groups", 0)


def test_top_limits_the_outputs_and_says_so(write, run):
    printed = run(write([("p", "r", f"output {i}", float(i)) for i in range(7)]), "--top", 2)
    assert "output 6" in printed
    assert "output 4" not in printed
    assert "5 more not shown" in printed


def test_bars_go_from_the_lowest_to_the_highest_of_the_prompt(write, run):
    printed = run(write([("p", "r", "high", 5.0), ("p", "r", "middle", 0.0), ("p", "r", "low", -5.0)]))
    bars = {
        line.split()[-1]: line.split()[1] for line in printed.splitlines() if line.split()[:1] in (["1"], ["2"], ["3"])
    }
    assert bars == {"high": "█" * 10, "middle": "█" * 5, "low": "▏"}


@pytest.mark.parametrize("width", [50, 80, 120])
def test_every_line_fits_the_terminal_and_texts_take_one(write, run, width):
    text = "many\nlines\tand 很多汉字 " * 50
    printed = run(
        write([(text, text, text, -12.345, "ok", 1), (text, text, text, None, "triple_too_long", 2)]), width=width
    )
    assert max(map(cell_len, printed.splitlines())) <= width
    assert len([line for line in printed.splitlines() if line.startswith(("many", "reference", "   1", "   –"))]) == 4
    assert "…" in printed


def test_texts_cannot_steer_the_terminal_or_be_taken_for_markup(write, run):
    printed = run(write([("\x1b[2J[bold]p", "\u202er", "[red]o\x07", 1.0)]))
    assert "[bold]p" in printed
    assert "[red]o" in printed
    assert not {"\x1b", "\x07", "\u202e"} & set(printed)


@pytest.mark.parametrize("as_json", [False, True], ids=["lists", "JSON text"])
def test_messages_are_joined(write, ranked, as_json):
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    path = write([(json.dumps(messages) if as_json else messages, "r", "o", 1.0, "ok")], COLUMNS[:5])
    (group,) = ranked(path)
    assert group["prompt"] == "one\ntwo"


def test_columns_can_have_other_names_and_only_they_are_read(write, ranked):
    path = write([("p", "r", "o", 1.0, "ok", 3)], ("question", "gold", "answer", "polar", "polar_status", "human"))
    (group,) = ranked(
        path,
        *("--prompt-column", "question", "--reference-column", "gold", "--output-column", "answer"),
        *("--reward-column", "polar", "--rank-column", "human"),
    )
    assert group["rows"] == [{"rank": 1, "reward": 1.0, "status": "ok", "output": "o", "person_rank": 3}]


def test_a_file_without_statuses_still_tells_rows_without_a_reward(write, ranked):
    path = write([("p", "r", "o", 1.0), ("p", "r", "nan", float("nan")), ("p", "r", "null", None)], COLUMNS[:4])
    (group,) = ranked(path)
    assert [row["status"] for row in group["rows"]] == ["ok", "no reward", "no reward"]


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"scored": "/no/such/folder"}, InputError, "no such file"),
        ({"reward_column": "points"}, SchemaError, "'points' for the reward.*--reward-column"),
        ({"rank_column": "human"}, SchemaError, "'human' for the rank.*--rank-column"),
        ({"rank_column": "output"}, SchemaError, "must hold numbers"),
        ({"prompt_column": "output"}, ConfigError, "'output' is named for two things"),
    ],
    ids=["no path", "no reward", "no ranks", "ranks are text", "one column twice"],
)
def test_what_is_missing_is_named(write, arguments, error, said):
    path = write([("p", "r", "o", 1.0, "ok")], COLUMNS[:5])
    with pytest.raises(error, match=said):
        rank(**{"scored": path, **arguments})


def test_other_files_and_empty_ones_are_refused(write, tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="not Parquet"):
        rank(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        rank(str(tmp_path / "b.parquet"))
    schema = pa.schema([(name, pa.float32() if name == "reward" else pa.string()) for name in COLUMNS[:5]])
    pq.write_table(schema.empty_table(), tmp_path / "c.parquet")
    with pytest.raises(InputError, match="nothing to rank"):
        rank(str(tmp_path / "c.parquet"))
