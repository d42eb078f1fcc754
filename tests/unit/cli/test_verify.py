"""`polar-ray verify` as people run it, on the real engine and the card that ships with the small checkpoint."""

import json

import pytest

from polar_ray.cli.main import main


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["verify", *arguments])
    return ended.value.code or 0, capsys.readouterr().out


def test_the_small_checkpoint_gives_what_its_card_says(capsys):
    code, out = run(capsys, "--json")
    assert code == 0
    found = json.loads(out)
    (engine,) = found["engines"]
    assert found["is_right"]
    assert engine["panel"]["rms_over_spread"] < 1e-4
    assert engine["agreement"]["rows"] == len(found["published"]) == 6
    assert engine["agreement"]["largest"] < 1e-3


def test_engines_stand_beside_each_other(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out = run(capsys, "--engine", "torch", "--engine", "fake")
    assert code == 0
    assert "right  off by up to" in out
    assert "has no weights of its own" in out
    assert "20.4603" in out
    assert "torch: " in out
    assert "rank correlation 1.0000" in out


def test_another_rotary_base_is_far_from_the_card_and_right_by_itself(capsys):
    code, out = run(capsys, "--rope-base", "sglang-static", "--json")
    (engine,) = json.loads(out)["engines"]
    assert code == 0
    assert engine["rope_base"] == "sglang-static"
    assert engine["agreement"]["largest"] > 0.01


def test_an_engine_that_is_not_right_ends_with_1(capsys, monkeypatch):
    from polar_ray.engines.torch.engine import TorchEngine

    score = TorchEngine.score
    monkeypatch.setattr(TorchEngine, "score", lambda self, batch: score(self, batch) * 0.5)
    monkeypatch.setenv("COLUMNS", "120")
    code, out = run(capsys)
    assert code == 1
    assert "WRONG" in out


def test_goldens_stand_in_for_the_card(capsys, tmp_path):
    file = tmp_path / "goldens.json"
    file.write_text(json.dumps([{"prompt": "1 + 1?", "reference": "2", "output": "2", "reward": 4.0, "engine": "x"}]))
    _, out = run(capsys, "--goldens", str(file), "--json")
    found = json.loads(out)
    assert [row["engine"] for row in found["published"]] == ["x"]
    assert found["engines"][0]["agreement"]["spearman"] is None
