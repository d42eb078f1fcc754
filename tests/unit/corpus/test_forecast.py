"""What a job will take, held to what one takes."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from polar_ray.cli.main import app
from polar_ray.config import EngineConfig, LimitsConfig, ScoreConfig
from polar_ray.corpus.forecast import PEAK_FLOPS, forecast, makespan
from polar_ray.corpus.inputs import examine, list_inputs
from polar_ray.encoding.encode import Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.fake import FakeEngine
from polar_ray.errors import ConfigError
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.model.cost import causal_pairs, flops, flops_of_batches
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.planning import Batch, Node
from polar_ray.scoring import Scorer
from polar_ray.triples import Triple

UNIT_ROWS = 32
CONFIG = ScoreConfig(unit_rows=UNIT_ROWS, engine=EngineConfig(token_budget=2000))
SHAPE = Checkpoint.open(EMBEDDED_FOLDER).config


def make_rows(n_groups, *, seed=0):
    """Groups of one to twelve outputs whose lengths grow along the corpus; some rows of no use, some twice."""
    random = np.random.default_rng(seed)
    rows = []
    for group in range(n_groups):
        prompt = f"Count to {group}." + " Go on." * int(random.integers(1, 4 + group // 4))
        for n in range(int(random.integers(1, 13))):
            output = "one two three " * int(random.integers(1, 9)) if random.random() > 0.1 else "one"
            rows.append({"prompt": prompt, "reference": "one two", "output": output if n % 7 else output + str(n)})
    rows[5]["output"] = ""
    return rows


@pytest.fixture(scope="module")
def rows():
    return make_rows(120)


@pytest.fixture(scope="module")
def corpus(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    middle = len(rows) // 2
    for name, part in (("a", rows[:middle]), ("b", rows[middle:])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"{name}.parquet", row_group_size=UNIT_ROWS)
    return folder


@pytest.fixture(scope="module")
def taken(rows):
    """(usage, rows) of a job over the corpus, unit by unit."""
    middle = len(rows) // 2
    scorer = Scorer(Encoder(PolarTokenizer(EMBEDDED_FOLDER), LimitsConfig()), FakeEngine(token_budget=2000))
    scored = []
    for part in (rows[:middle], rows[middle:]):
        for start in range(0, len(part), UNIT_ROWS):
            triples = [
                Triple(row["prompt"], row["reference"], row["output"]) for row in part[start : start + UNIT_ROWS]
            ]
            scored += scorer.score(triples)
    return scorer.usage, scored


def test_read_whole_a_forecast_is_what_the_job_takes(corpus, rows, taken):
    usage, scored = taken
    found = forecast(corpus, CONFIG, units=1000)
    assert (found.rows, found.sampled_rows, found.files) == (len(rows), len(rows), 2)
    assert (
        found.units
        == found.sampled_units
        == sum(-(-n // UNIT_ROWS) for n in (len(rows) // 2, len(rows) - len(rows) // 2))
    )
    assert (found.tokens.total, found.tokens.error) == (usage.tokens, 0)
    assert (found.computed_tokens.total, found.duplicates) == (usage.computed_tokens, usage.duplicates)
    assert found.statuses == {"triple_empty": 1}
    assert found.length_quantiles["1"] == max(row.tokens for row in scored)
    assert found.gpu_hours == pytest.approx(found.flops.total / (989e12 * 0.4 * 3600))
    assert found.encoding_cpu_hours > 0


def test_of_some_units_the_error_says_how_far_off_it_may_be(corpus, taken):
    usage, _ = taken
    inside = 0
    for seed in range(20):
        found = forecast(corpus, CONFIG, units=8, seed=seed)
        assert found.sampled_units == 8
        assert found.tokens.error > 0
        inside += abs(found.tokens.total - usage.tokens) <= found.tokens.error
    assert inside >= 15
    assert forecast(corpus, CONFIG, units=1).tokens.error is None


def test_sharing_limits_and_cuts_are_those_of_the_settings(corpus, taken):
    usage, _ = taken
    unshared = CONFIG.model_copy(update={"engine": EngineConfig(share_prefixes=False)})
    found = forecast(corpus, unshared, units=1000)
    assert found.tokens.total == usage.tokens
    assert usage.computed_tokens < found.computed_tokens.total < found.tokens.total  # identical rows are computed once
    limited = CONFIG.model_copy(update={"limits": LimitsConfig(max_response_tokens=8)})
    assert forecast(corpus, limited, units=1000).cut_rows > 100


def test_a_model_without_its_weights_will_do(corpus, tmp_path):
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_FOLDER / name, tmp_path)
    bare = forecast(corpus, CONFIG.model_copy(update={"model": str(tmp_path)}))
    assert bare.flops == forecast(corpus, CONFIG).flops


def test_operations_are_counted_from_the_shape():
    """By hand, of one sequence of 3 tokens and of two that share 2 of them."""
    hidden, inner, layers, kv = SHAPE.hidden_size, SHAPE.intermediate_size, SHAPE.num_hidden_layers, 10 * 32
    per_token = 2 * (2 * hidden * kv + 2 * hidden * hidden + 3 * hidden * inner)
    assert flops(SHAPE, 3, causal_pairs(3)) == layers * (3 * per_token + 4 * 6 * hidden)
    ids = np.arange(3, dtype=np.int32)
    shared = Batch((Node(ids[:2]), Node(ids[2:], 0, 0), Node(ids[:1], 0, 1)))
    pairs = 3 + (2 + 1) * 2
    last = 2 * (4 * 2 * hidden * kv + 2 * (2 * hidden * hidden + 3 * hidden * inner))
    assert flops_of_batches(SHAPE, [shared]) == (layers - 1) * (4 * per_token + 4 * pairs * hidden) + last


def test_the_time_is_that_of_the_largest_units_first(corpus):
    found = forecast(corpus, CONFIG, units=1000)
    sizes = [
        part.size
        for contents in examine(list_inputs([str(corpus)]), CONFIG.columns, UNIT_ROWS)
        for part in contents.slices
    ]
    assert found.hours(1) == pytest.approx(found.gpu_hours)
    assert found.hours(len(sizes)) == found.hours(10 * len(sizes))
    assert found.hours(len(sizes)) == pytest.approx(found.gpu_hours * max(sizes) / sum(sizes))
    two = CONFIG.model_copy(update={"engine": EngineConfig(tensor_parallel_size=2, token_budget=2000)})
    with pytest.raises(ConfigError, match="gpus = 1: an engine has 2"):
        forecast(corpus, two).hours(1)


def test_the_last_is_ready_when_each_has_taken_the_next_piece():
    assert makespan([3, 2, 2, 1], 2) == 4
    assert makespan([1, 2, 2, 3], 2) == 5
    assert makespan([4, 1], 9) == 4


def test_the_engine_here_is_measured(corpus, taken):
    usage, _ = taken
    found = forecast(corpus, CONFIG, gpu="here", units=1000)
    assert (found.gpu, found.mfu, found.gpus_per_engine) == ("here", None, 1)
    assert found.gpu_hours == pytest.approx(found.flops.total / found.flops_per_s / 3600)
    assert 1e8 < found.flops_per_s < 1e14
    assert found.computed_tokens.total == usage.computed_tokens


def test_one_batch_is_too_little_to_measure_by(tmp_path):
    row = {"prompt": "1 + 1?", "reference": "2", "output": "2"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="measures more than one batch"):
        forecast(tmp_path, CONFIG, gpu="here")


@pytest.mark.parametrize(
    ("changes", "message"), [({"gpu": "tpu"}, "known are a100, .* and here"), ({"mfu": 40}, "above 0 and at")]
)
def test_what_is_not_known_is_refused(corpus, changes, message):
    with pytest.raises(ConfigError, match=message):
        forecast(corpus, CONFIG, **changes)


def test_the_command_says_it_for_people_and_for_machines(corpus):
    command = ["plan", str(corpus), "--set", f"unit_rows={UNIT_ROWS}", "--gpus", "4", "--gpu", "a100", "--price", "2"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert "GPU-hours" in done.output
    assert "saved by sharing" in done.output
    machine = json.loads(CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False).stdout)
    assert machine["gpu"] == "a100"
    assert machine["gpu_hours"] == pytest.approx(machine["flops"]["total"] / (PEAK_FLOPS["a100"] * 0.4 * 3600))
    assert list(machine["hours_by_gpus"]) == ["4"]


def test_the_command_measures_the_engine_here(corpus):
    command = ["plan", str(corpus), "--set", f"unit_rows={UNIT_ROWS}", "--gpu", "here", "--gpus", "2"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert "engine-hours" in done.output
    assert "that it has reached here" in " ".join(done.output.split())
