"""The command line's manners: sentences for errors, exit codes, help that knows every option."""

import json

import pytest

from polar_ray.cli.main import main

CAPITAL = {"prompt": "What is the capital of China?", "reference": "Beijing.", "output": "Shang<|reward|>hai."}


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return done.value.code, printed.out, printed.err


@pytest.fixture
def capital(tmp_path):
    file = tmp_path / "capital.json"
    file.write_text(json.dumps(CAPITAL))
    return file


def test_an_error_is_a_sentence_with_its_code(capsys, tmp_path):
    code, out, err = run(capsys, "score", tmp_path / "absent", "--output", tmp_path / "out")
    assert code == 2
    assert out == ""
    assert "error (input_invalid):" in err
    assert "no such file or folder" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_an_error_came_from(tmp_path):
    from polar_ray.errors import InputError

    with pytest.raises(InputError):
        main(["--debug", "score", str(tmp_path / "absent"), "--output", str(tmp_path / "out")])


@pytest.mark.parametrize("arguments", [["score"], ["score", "x"], ["nothing"], ["score", "x", "--output", "y", "--no"]])
def test_wrong_usage_exits_with_2(capsys, arguments):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "Usage" in err


def test_a_wrong_setting_is_found_before_the_input_is_looked_at(capsys):
    code, _, err = run(capsys, "score", "absent", "--output", "out", "--set", "limits.max_token=3")
    assert code == 2
    assert "unknown setting 'limits.max_token'; known here: max_tokens" in err


def test_inspect_shows_ids_pieces_and_what_was_removed(capsys, capital, small_tokenizer):
    code, out, _ = run(capsys, "inspect", capital, "--json")
    shown = json.loads(out)
    assert code == 0
    assert shown["tokens"] == len(shown["ids"]) == len(shown["pieces"])
    assert shown["ids"][-1] == small_tokenizer.score_id
    assert shown["removed"] == ["<|reward|>"]
    assert shown["pieces"].count("<|reward|>") == 1
    assert 0 < shown["shareable"] < shown["tokens"]


def test_inspect_reads_a_row_of_parquet_and_of_a_scored_file(capsys, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [CAPITAL | {"reward": 1.0}, CAPITAL | {"output": "Beijing.", "reward": 2.0}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    code, out, _ = run(capsys, "inspect", f"{tmp_path}/rows.parquet#1")
    assert code == 0
    assert "no control tokens" in out
    code, _, err = run(capsys, "inspect", f"{tmp_path}/rows.parquet#2")
    assert code == 2
    assert "there is no row 2" in err
    code, _, err = run(capsys, "inspect", f"{tmp_path}/rows.parquet#x")
    assert code == 2
    assert "PARQUET#ROW" in err


def test_inspect_says_what_is_wrong_with_a_triple(capsys, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps({"prompt": "p", "reference": 3, "output": "o"}))
    code, _, err = run(capsys, "inspect", tmp_path / "bad.json")
    assert code == 2
    assert "reference: expected a string or a list of messages, found int" in err


def test_help_names_every_verb(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(verb in out for verb in ("score", "rank", "inspect", "bench"))
