"""The pairs that the small checkpoint is trained on are what their names say."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import make_pairs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_pairs import HELD_OUT, LONGEST_TEXT, MOST_PAIRS_OF_A_GROUP, OF_POLICIES, STAGES, Group, pairs_of
from sources import Sources, held_out
from synthetic import CUT_TOLERANCE, KINDS, MARKS, count, cut_grade, similar, solution
from typer.testing import CliRunner
from words import edit, number, perturb

TEXT = "The quick brown fox jumps over the lazy dog, and 12 more foxes follow it into the garden behind the house."
HAN = "北京是中国的首都，上海是中国最大的城市，长江是中国最长的河流，黄河是第二长的河流。"
QUESTIONS = 60
POLICIES = 9


def piece(rng: Random, zh: bool) -> str:
    text = HAN if zh else TEXT
    start = rng.randrange(len(text) // 2)
    return text[start : start + 40].strip()


def write(file: Path, rows: list[dict[str, object]]) -> None:
    metadata = {"provenance": json.dumps({"repo": f"made/{file.stem}", "licence": "MIT"})}
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(metadata), file)


def pairs_file(file: Path, ids: list[str], **extra: object) -> None:
    write(
        file,
        [
            {
                "group_id": id,
                "prompt": f"question {id}",
                "reference": f"reference {id}",
                "chosen": f"right {id}",
                "rejected": f"wrong {id}",
                **extra,
            }
            for id in ids
        ],
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the schemas that sources.py reads, in which every text names its question."""
    folder = tmp_path_factory.mktemp("data")
    maths, exams, prompts = ([f"{kind}-{at}" for at in range(QUESTIONS)] for kind in ("maths", "exam", "prompt"))
    answered = [
        {
            "group_id": id,
            "prompt": f"question {id}",
            "reference": f"steps of {id}\nA: 12",
            "output": f"output {place} of {id}",
            "label_correct": place < 4,
        }
        for id in maths
        for place in range(8)
    ]
    write(folder / "gsm8k_multi_policy.parquet", answered[::2])
    write(folder / "gsm8k_triples.parquet", answered[1::2])
    write(
        folder / "gsm8k_qa.parquet",
        [{"group_id": id, "prompt": f"question {id}", "reference": f"2 + 10 of {id}\nA: 1,200"} for id in maths],
    )
    pairs_file(folder / "gsm8k_pref.parquet", maths)
    pairs_file(folder / "zh_pref.parquet", exams)
    write(
        folder / "gaokao_zh_triples.parquet",
        [
            {
                "group_id": id,
                "prompt": f"question {id}",
                "reference": f"reference {id}",
                "output": f"{HAN}第{place}个 {id}",
                "label_correct": place == 0 if at % 2 else None,
                "human_score": None if at % 2 else float(place),
            }
            for at, id in enumerate(exams)
            for place in range(3)
        ],
    )
    outputs = [
        {
            "prompt_id": id,
            "prompt": f"question {id}",
            "policy": f"policy-{policy}",
            "family": f"family-{policy // 2}",
            "output": f"{TEXT} {f'Style {policy}! ' * policy}Sample {sample} of policy {policy} for {id}",
            "ended": bool(policy % 2),
        }
        for id in prompts
        for policy in range(POLICIES)
        for sample in range(2)
    ]
    write(folder / "multi_policy.parquet", [{"row": row, **output} for row, output in enumerate(outputs)])
    write(
        folder / "polar_pairs.parquet",
        [
            {
                "prompt_id": id,
                "reference_row": 2 * POLICIES * at,
                "chosen_row": 2 * POLICIES * at + 1,
                "rejected_row": 2 * POLICIES * at + 5,
            }
            for at, id in enumerate(prompts)
        ],
    )
    return folder


def make(data: Path, output: Path, stage: str, *options: str) -> list[dict[str, object]]:
    arguments = ["--data", str(data), "--stage", stage, "--output", str(output), *options]
    app = make_pairs.typer.Typer()
    app.command()(make_pairs.main)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return pq.read_table(output).to_pylist()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_its_groups_and_sources(data: Path, tmp_path: Path, stage: str) -> None:
    rows = make(data, tmp_path / "pairs.parquet", stage, "--groups", "300")
    assert {row["group"] for row in rows} == set(range(300))
    assert max(Counter(row["group"] for row in rows).values()) <= MOST_PAIRS_OF_A_GROUP
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert all(str(row[field]).strip() for row in rows for field in ("prompt", "reference", "chosen", "rejected"))
    wanted = set(STAGES[stage].kinds) | set(STAGES[stage].sources) - {"synthetic"}
    assert {row["source"] for row in rows} == wanted
    wrappers = {(row["source"], row["wrapper"]) for row in rows}
    assert {"sft", "pretrain"} == {wrapper for source, wrapper in wrappers if source in KINDS}
    assert all(wrapper == "pretrain" for source, wrapper in wrappers if source in OF_POLICIES)
    assert all(wrapper == "sft" for source, wrapper in wrappers if source in {"qa", "gsm8k", "chinese"})


def test_the_same_arguments_give_the_same_bytes(data: Path, tmp_path: Path) -> None:
    for name, seed in (("one", "7"), ("two", "7"), ("three", "8")):
        make(data, tmp_path / name, "everything", "--groups", "80", "--seed", seed)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "one").read_bytes() != (tmp_path / "three").read_bytes()


def test_held_out_questions_are_in_no_stage(data: Path, tmp_path: Path) -> None:
    kept = make(data, tmp_path / "held_out.parquet", HELD_OUT)
    assert {row["source"] for row in kept} == {"gsm8k", "chinese", "same-policy"}
    ids = {str(row["prompt"]).removeprefix("question ") for row in kept}
    assert all(held_out(id) for id in ids)
    assert len({row["group"] for row in kept}) == len(ids)
    assert {row["wrapper"] for row in kept if row["source"] == "same-policy"} == {"pretrain"}
    trained = make(data, tmp_path / "everything.parquet", "everything", "--groups", "1500")
    prompts = {str(row["prompt"]) for row in trained if row["source"] not in KINDS}
    assert len(prompts) > 2 * QUESTIONS
    assert not prompts & {f"question {id}" for id in ids}
    sources = Sources(data)
    texts = [*sources._english_texts, *sources._chinese_texts]
    assert texts
    assert not any(held_out(text.rsplit(" ", 1)[1]) for text in texts)


def test_the_split_stays_what_it_is() -> None:
    ids = [f"gsm8k-test-{at:04}" for at in range(40)]
    assert [id[-2:] for id in ids if held_out(id)] == ["00", "17", "18", "19", "24"]


def test_the_file_says_where_its_texts_come_from(data: Path, tmp_path: Path) -> None:
    make(data, tmp_path / "pairs.parquet", "answers", "--groups", "200", "--seed", "3")
    provenance = json.loads(pq.read_schema(tmp_path / "pairs.parquet").metadata[b"provenance"])
    assert provenance["command"] == "python jobs/train/make_pairs.py --stage answers --groups 200 --seed 3"
    assert provenance["sources"]["gsm8k_qa.parquet"] == {"repo": "made/gsm8k_qa", "licence": "MIT"}
    assert "zh_pref.parquet" not in provenance["sources"]


def test_an_unknown_stage_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(make_pairs.typer.BadParameter, match="expected copy, answers, likeness, everything or held-out"):
        make_pairs.main(data, "all", tmp_path / "pairs.parquet")


def group(*outputs: tuple[str, float], reference: str = "r") -> Group:
    return Group("p", reference, outputs, "test", "sft")


def test_pairs_are_of_different_grades() -> None:
    pairs = pairs_of(Random(0), group(("a", 2), ("b", 1), ("c", 1), ("a", 2)))
    assert sorted(pairs) == [("a", "b"), ("a", "c")]


def test_a_text_under_two_grades_is_left_out() -> None:
    assert pairs_of(Random(0), group(("a", 2), ("a", 1), ("b", 1), ("c", 0))) == [("b", "c")]


def test_a_group_has_few_pairs() -> None:
    pairs = pairs_of(Random(0), group(*((str(grade), grade) for grade in range(9))))
    assert len(pairs) == len(set(pairs)) == MOST_PAIRS_OF_A_GROUP


def test_a_group_with_a_long_or_an_empty_text_is_passed_over() -> None:
    long = "x" * (LONGEST_TEXT + 1)
    assert pairs_of(Random(0), group(("a", 1), ("b", 0), (long, 0))) == []
    assert pairs_of(Random(0), group(("a", 1), ("b", 0), reference=long)) == []
    assert pairs_of(Random(0), group(("a", 1), ("b", 0), reference=" ")) == []
    assert pairs_of(Random(0), group(("a", 1), (" ", 0), ("b", 0))) == [("a", "b")]


def final_answer_of(text: str) -> str:
    """What follows the last mark, without the full stop after it."""
    marks = sorted({mark for both in MARKS for mark in both}, key=len, reverse=True)
    places = [(text.rfind(mark) + len(mark)) for mark in marks if mark in text]
    return text[max(places, default=0) :].strip(" .。")


@pytest.mark.parametrize("kind", ["tiny", "final_answer"])
def test_the_better_output_has_the_answer_of_the_reference(kind: str) -> None:
    rng = Random(0)
    for _ in range(3000):
        _, reference, outputs = KINDS[kind](rng, piece)
        answer = final_answer_of(reference)
        for text, grade in outputs:
            assert (final_answer_of(text) == answer) == (grade == 1), (reference, text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_gives_pairs(kind: str) -> None:
    rng = Random(1)
    pairs = 0
    for _ in range(200):
        prompt, reference, outputs = KINDS[kind](rng, piece)
        found = pairs_of(rng, Group(prompt, reference, outputs, kind, "sft"))
        assert all(chosen != rejected for chosen, rejected in found)
        pairs += len(found)
    assert pairs > 400


def test_letters_are_counted() -> None:
    rng = Random(0)
    for _ in range(500):
        prompt, reference, outputs = count(rng, piece)
        quoted = [part for part in prompt.replace("“", "'").replace("”", "'").split("'") if part.isascii()]
        word = max((part for part in quoted if part.isalpha()), key=len)
        letter = next(part for part in quoted if len(part) == 1 and part.isalpha())
        number_of = str(word.count(letter))
        assert number_of != "0"
        assert f"{number_of} '{letter}'" in reference or f"{number_of}个字母“{letter}”" in reference
        shorts = {grade: text for text, grade in outputs if grade in (4, 1)}
        assert number_of in shorts[4]
        assert number_of not in shorts[1]


def test_the_solution_with_the_right_answer_is_better() -> None:
    rng = Random(0)
    for answer in ("12", "1,200", "75"):
        for _ in range(200):
            _, _, outputs = solution(rng, piece, [("p", f"3 + 4 = 7 apples.\nA: {answer}")])
            for text, grade in outputs:
                if "A: " in text:
                    assert (text.rsplit("A: ", 1)[1].strip(" .") == answer) == (grade >= 3)


def test_a_cut_stands_among_the_edits_that_keep_as_much() -> None:
    shares = (0.03, 0.25, 0.6)
    assert cut_grade(0.7, shares) == 4  # beside the edit of a quarter
    assert cut_grade(0.4, shares) == 3
    assert cut_grade(0.75 - 1.5 * CUT_TOLERANCE, shares) == 3.5
    assert cut_grade(0.2, shares) == 2.5
    assert cut_grade(0.2, (0.03, 0.08, 0.15)) == 2.5


def test_similar_never_grades_the_reference_twice() -> None:
    rng = Random(0)
    for _ in range(500):
        _, reference, outputs = similar(rng, lambda rng, zh: " ".join(rng.sample("abcdefgh", 4)))
        assert [grade for text, grade in outputs if text == reference and grade > 0] == [6]


@pytest.mark.parametrize("make_number", [number, lambda rng: f"{rng.randint(1, 99)},000", lambda rng: "5"])
def test_a_perturbed_number_is_another_number(make_number: Callable[[Random], str]) -> None:
    def value(text: str) -> float:
        return float(text.replace("$", "").replace(",", ""))

    rng = Random(0)
    for _ in range(5000):
        text = make_number(rng)
        other = perturb(rng, text)
        assert value(other) != value(text)
        assert not other.endswith((".", ","))


def test_perturb_never_returns_its_input() -> None:
    rng = Random(0)
    for text in ("", "x", "1/2", "7 apples", "50%", "0"):
        assert all(perturb(rng, text) != text for _ in range(200))


def test_an_edit_changes_about_its_share() -> None:
    rng = Random(0)
    text = "word " * 1000
    assert edit(rng, text, 0, "other ") == text
    assert 0.15 < 1 - edit(rng, text, 0.25, "other ").count("word") / 1000 < 0.25
    assert edit(rng, HAN, 0.5, "龙") != HAN
