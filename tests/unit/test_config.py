"""Settings: where values come from, and what a wrong one is told."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from polar_ray import config
from polar_ray.config import EngineConfig, ScoreConfig, ServeConfig, TrainConfig, config_from_arguments, load_config
from polar_ray.errors import ConfigError

JOBS = sorted((Path(__file__).parents[2] / "jobs").rglob("*.toml"))


def test_later_sources_win(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text('unit_rows = 10\nmodel = "a"\n[limits]\nmax_tokens = 100\ncut_side = "left"\n')
    settings = load_config(ScoreConfig, file, ["limits.max_tokens=200", "unit_rows=20"], unit_rows=30, model=None)
    assert settings.unit_rows == 30
    assert settings.limits.max_tokens == 200
    assert settings.limits.cut_side == "left"
    assert settings.model == "a"


def test_flags_reach_into_sections():
    assert load_config(ScoreConfig, engine__dtype="bfloat16").engine.dtype == "bfloat16"


def test_values_of_assignments_are_toml_where_they_can_be():
    settings = load_config(
        ScoreConfig, None, ["engine.share_prefixes=false", "model=internlm/POLAR-7B", 'columns.prompt="1"']
    )
    assert settings.engine.share_prefixes is False
    assert settings.model == "internlm/POLAR-7B"
    assert settings.columns.prompt == "1"


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("limits.max_token=3", "unknown setting 'limits.max_token'; known here: max_tokens"),
        ("limits.max_tokens=zero", "limits.max_tokens = 'zero'"),
        ("limits.cut_side=middle", "limits.cut_side = 'middle'.*'right' or 'left'"),
        ("engine.kind=sglang2", "engine.kind = 'sglang2'"),
        ("max_failed_fraction=2", "max_failed_fraction = 2"),
        ("actors=4:2", "MIN <= MAX, found '4:2'"),
        ("actors=many", "expected auto, a number or MIN:MAX, found 'many'"),
        ("columns.output=prompt", "column 'prompt' is named for two things"),
        ("columns.prompt=reward_status", "column 'reward_status' is named for two things"),
        ("nothing", "expected section.key=value"),
        ("model.name=3", "'model' is a value, not a section"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_the_remedy(assignment, says, tmp_path):
    file = tmp_path / "job.toml"
    file.write_text('model = "embedded"\n')
    with pytest.raises(ConfigError, match=says):
        load_config(ScoreConfig, file, [assignment])


def test_a_file_that_is_not_there_or_not_toml(tmp_path):
    with pytest.raises(ConfigError, match="give an existing TOML file"):
        load_config(ScoreConfig, tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(ScoreConfig, tmp_path / "bad.toml")


def test_actors_are_a_number_or_a_range():
    assert ScoreConfig(actors=3).actor_range == (3, 3)
    assert ScoreConfig(actors="2:8").actor_range == (2, 8)
    assert ScoreConfig().actor_range is None


def test_settings_cannot_be_changed_and_round_trip_through_json():
    settings = load_config(ScoreConfig, None, ["engine.token_budget=128"])
    with pytest.raises(ValueError, match="frozen"):
        settings.unit_rows = 1
    assert ScoreConfig.model_validate_json(settings.model_dump_json()) == settings


def test_every_setting_explains_itself():
    for kind in vars(config).values():
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for name, field in kind.model_fields.items():
                is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
                assert is_section or field.description, f"{kind.__name__}.{name} has no docstring"


@pytest.mark.parametrize("file", JOBS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_the_settings_that_ship_are_valid(file):
    assert load_config({"score": ScoreConfig, "serve": ServeConfig, "train": TrainConfig}[file.parent.name], file)


@pytest.mark.parametrize(("size", "rate"), [("1_8b", 1e-5), ("7b", 2e-5)])
def test_polars_own_hyper_parameters_ship(size, rate):
    """xtuner's configs of the POLAR repository, `POLAR_*_full_varlenattn_custom_dataset.py`."""
    found = load_config(TrainConfig, Path(__file__).parents[2] / "jobs" / "train" / f"polar_{size}.toml")
    optimizer = found.optimizer
    assert (optimizer.kind, optimizer.learning_rate, optimizer.weight_decay) == ("adamw", rate, 0)
    assert (optimizer.beta1, optimizer.beta2, optimizer.clip_norm) == (0.9, 0.95, 1.0)
    assert (optimizer.warmup_fraction, optimizer.final_fraction) == (0.03, 0.1)
    assert (found.epochs, found.max_packed_tokens, found.packs_per_step) == (1, 32768, 2 * found.workers)
    assert (found.limits.max_tokens, found.limits.max_response_tokens) == (16384, 4096)
    assert (found.loss.kind, found.loss.penalty, found.limits.cut_side) == ("ranking", "none", "right")


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        (["workers=3"], "packs_per_step: 16 packs cannot be shared evenly among 3 workers"),
        (["lora.rank=8", "optimizer.kind=muon"], r"optimizer\.kind: muon is for whole matrices"),
        (["parallel=fsdp", "optimizer.kind=muon"], r"optimizer\.kind: muon needs whole matrices"),
        (["parallel=fsdp", "precision=float16"], "precision: fsdp"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_starts(assignments, says):
    with pytest.raises(ConfigError, match=says):
        load_config(TrainConfig, None, assignments)


def test_replicas_are_a_number_or_a_range():
    assert ServeConfig(replicas=3).replica_range == (3, 3)
    assert ServeConfig(replicas="0:8").replica_range == (0, 8)
    for wrong in ("0", "4:2", "many", -1, "auto"):
        with pytest.raises(ConfigError, match="replicas: expected"):
            load_config(ServeConfig, replicas=wrong)


def test_arguments_of_serve_run_may_be_dotted_and_those_of_a_config_file_nested():
    dotted = config_from_arguments(
        ServeConfig, {"model": "embedded", "engine.kind": "fake", "replicas": "2", "queue.batch_wait_s": "0.01"}
    )
    nested = config_from_arguments(
        ServeConfig, {"engine": {"kind": "fake"}, "replicas": 2, "queue": {"batch_wait_s": 0.01}}
    )
    assert dotted == nested
    with pytest.raises(ConfigError, match=r"unknown setting 'engine\.knid'; known here: kind"):
        config_from_arguments(ServeConfig, {"engine.knid": "fake"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens_per_s": 0}, "tokens_per_s: expected a positive number, found 0"),
        ({"tokens_per_s": "fast"}, "tokens_per_s: expected a positive number, found 'fast'"),
        ({"tokens_per_s": 1e5, "speed": 1}, "arguments.speed: engine.kind = fake has tokens_per_s and no other"),
    ],
)
def test_the_fake_engine_stands_in_for_a_speed_and_nothing_else(arguments, message):
    assert EngineConfig(kind="fake", arguments={"tokens_per_s": 1e5}).arguments == {"tokens_per_s": 1e5}
    with pytest.raises(ValueError, match=message):
        EngineConfig(kind="fake", arguments=arguments)
