"""What `polar-ray evaluate` prints, writes and refuses."""

import json
import re

import pytest

from polar_ray.cli.main import main
from polar_ray.config import EvaluateConfig
from polar_ray.evaluation.result import Evaluation
from tests.support.comparisons import pair, triple

FAKE = ("--engine", "fake", "--set", "resamples=200")


@pytest.fixture
def run(capsys, monkeypatch):
    def run(*arguments, width=110):
        """(exit code, stdout, stderr)."""
        monkeypatch.setenv("COLUMNS", str(width))
        try:
            main(["evaluate", *map(str, arguments)])
            code = 0
        except SystemExit as done:
            code = done.code
        printed = capsys.readouterr()
        return code or 0, printed.out.replace("\u202f", " "), printed.err

    return run


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


PAIRS = [pair(number, source="ab"[number % 2]) for number in range(20)]


@pytest.mark.parametrize("width", [80, 110])
def test_the_table_has_the_model_first_and_the_baselines_beneath(run, write, width):
    code, out, err = run(write(PAIRS), *FAKE, width=width)
    assert code == 0
    lines = out.splitlines()
    assert re.split(r"\s{1,}", lines[0].strip())[:3] == ["pairs", "accuracy", "95"]
    names = ["model", "longer wins", "closer length wins", "TF-IDF to reference"]
    assert [line.startswith(name) for line, name in zip(lines[1:5], names, strict=True)] == [True] * 4
    assert re.match(r"model +20 +\d+\.\d % +\d+\.\d–\d+\.\d +0 +", lines[1])
    assert all(re.search(r"[+−]\d+\.\d \[[+−]\d+\.\d, [+−]\d+\.\d\]", line) for line in lines[2:5])
    assert "20 pairs from 20 rows" in out
    assert "hashes of the token ids" in err


def test_a_narrow_terminal_cuts_no_figure(run, write):
    rows = [triple(n % 10, f"{n}", n % 3 == 0) for n in range(60)]
    narrow, wide = (run(write(rows), *FAKE, width=width)[1] for width in (60, 160))
    assert "…" not in narrow
    assert re.findall(r"\d\.\d{3}", narrow) == re.findall(r"\d\.\d{3}", wide) != []


def test_by_gives_each_value_a_block(run, write):
    code, out, _ = run(write(PAIRS), *FAKE, "--by", "source")
    assert code == 0
    assert out.index("source = a") < out.index("source = b")
    assert len(re.findall(r"^model +10 ", out, re.MULTILINE)) == 2
    assert len(re.findall(r"^TF-IDF", out, re.MULTILINE)) == 3


def test_json_is_one_object_with_everything(run, write):
    code, out, _ = run(write(PAIRS), *FAKE, "--json", "--by", "source")
    assert code == 0
    found = Evaluation.model_validate_json(out)
    assert found.settings.by == ("source",)
    assert found.settings.resamples == 200
    assert [block.value for block in found.by] == ["a", "b"]
    assert len(found.receipt_id) == 64


def test_output_has_three_files_and_what_is_printed_names_the_page(run, write, tmp_path):
    folder = tmp_path / "out" / "deep"
    code, out, _ = run(write(PAIRS), *FAKE, "--output", folder)
    assert code == 0
    assert f"report {folder}/report.html" in out
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation.json", "report.html", "rewards.parquet"]


def test_triples_show_auc_and_best_of_n(run, write):
    rows = [triple(n // 4, f"{n}", n % 4 == 0, is_right=n % 4 == 0) for n in range(40)]
    code, out, _ = run(write(rows), *FAKE, "--label-column", "is_right")
    assert code == 0
    assert "AUC" in out.splitlines()[0]
    assert re.search(r"best of +2 +4\b", out)
    assert re.search(r"picked at random +25\.0 % +25\.0 %", out)
    assert re.search(r"picked by label +50\.0 % +100 %", out)
    assert "over 10 groups" in " ".join(out.split())


def test_columns_can_be_named_by_flags_and_by_set(run, write):
    renamed = [{"q": r["prompt"], "gold": r["reference"], "good": r["chosen"], "bad": r["rejected"]} for r in PAIRS]
    flags = (
        "--prompt-column",
        "q",
        "--reference-column",
        "gold",
        "--chosen-column",
        "good",
        "--rejected-column",
        "bad",
    )
    assignments = ("columns.prompt=q", "columns.reference=gold", "columns.chosen=good", "columns.rejected=bad")
    path = write(renamed)
    one = run(path, *FAKE, *flags)
    assert one == run(path, *FAKE, *(part for text in assignments for part in ("--set", text)))
    assert one[0] == 0


def test_unscored_pairs_are_said(run, write):
    code, out, _ = run(write([*PAIRS, pair(99, chosen="")]), *FAKE)
    assert code == 0
    assert "1 pairs could not be scored and are in no figure; outputs: 1 triple_empty." in out


@pytest.mark.parametrize(
    ("rows", "arguments", "code", "said"),
    [
        ([{"prompt": "p", "chosen": "c", "rejected": "x"}], (), 2, "error (schema_invalid)"),
        ([{"prompt": "p", "chosen": "c", "rejected": "x"}], (), 2, "--reference-column ground_truth"),
        (PAIRS, ("--layout", "pears"), 2, "layout = 'pears'"),
        (PAIRS, ("--set", "column.label=x"), 2, "unknown setting 'column'"),
        (PAIRS, ("--set", "best_of=[0]"), 2, "greater than or equal to 1"),
        (PAIRS, ("--set", "resamples=5"), 2, "resamples = 5"),
        (PAIRS, ("--model", "/no/such/model"), 2, "error (checkpoint_invalid)"),
        ([pair(0, prompt="")], (), 1, "error (too_many_failures)"),
    ],
    ids=["no reference", "its remedy", "layout", "section", "best of", "resamples", "model", "nothing scored"],
)
def test_errors_are_sentences_with_exit_codes(run, write, rows, arguments, code, said):
    found, out, err = run(write(rows), *FAKE, *arguments)
    assert (found, out) == (code, "")
    assert said in err
    assert "Traceback" not in err


def test_settings_may_come_from_a_file(run, write, tmp_path):
    file = tmp_path / "evaluate.toml"
    file.write_text('by = ["source"]\nresamples = 150\n[engine]\nkind = "fake"\n')
    code, out, _ = run(write(PAIRS), "--config", file, "--json")
    assert code == 0
    assert Evaluation.model_validate_json(out).settings.resamples == 150


def test_a_log_has_lines_instead_of_a_bar(run, write):
    _, _, err = run(write(PAIRS), *FAKE)
    assert err.splitlines()[:3] == ["reading the input", "loading the model", "measuring"]


def test_help_teaches_with_examples(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "polar-ray evaluate pairs.parquet" in out
    assert "baselines that understand nothing" in " ".join(out.split())


def test_every_setting_has_its_default(run, write):
    _, out, _ = run(write(PAIRS), "--engine", "fake", "--json")
    found = Evaluation.model_validate_json(out).settings
    assert (found.resamples, found.seed) == (EvaluateConfig().resamples, EvaluateConfig().seed) == (2000, 0)
