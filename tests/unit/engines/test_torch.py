"""The torch engine against the independent reference, shared and unshared."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polar_ray.bench.workload import Workload, random_groups
from polar_ray.config import LimitsConfig
from polar_ray.encoding.encode import EncodedTriple, Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.torch import attention, linear
from polar_ray.engines.torch import engine as torch_engine
from polar_ray.engines.torch.attention import BlockAttention, SdpaAttention
from polar_ray.engines.torch.engine import TorchEngine
from polar_ray.engines.torch.layout import Segment, Span
from polar_ray.errors import EngineError, EngineStartError
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.planning import Batch, plan
from polar_ray.scoring import Scorer
from tests.support.checkpoints import write_checkpoint
from tests.support.reference import Reference
from tests.unit.model.test_polar import SHAPES, TOLERANCE


def draw_groups(lengths, group_size=3, seed=0):
    """Sequences whose groups share about two thirds of `lengths`."""
    random = np.random.default_rng(seed)
    sequences = []
    for length in lengths:
        shared = random.integers(0, 512, length * 2 // 3)
        for _ in range(group_size):
            own = random.integers(0, 512, random.integers(1, length // 3 + 2))
            sequences.append(np.concatenate([shared, own]).astype(np.int32))
    return sequences


def score(engine, sequences, *, share, token_budget=1000):
    planned = plan(
        sequences, token_budget=token_budget, share_prefixes=share, max_shared_length=engine.max_shared_length
    )
    return planned.rewards(engine.score)


def one(ids):
    return Batch.unshared([ids])


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_rewards_equal_the_reference_shared_unshared_and_alone(tmp_path, fields):
    folder = write_checkpoint(tmp_path, **fields)
    sequences = draw_groups([12, 60, 150, 400])
    expected = Reference(folder).rewards([ids.tolist() for ids in sequences]).numpy()
    engine = TorchEngine.load(folder)
    assert np.abs(score(engine, sequences, share=True) - expected).max() < TOLERANCE
    assert np.abs(score(engine, sequences, share=False) - expected).max() < TOLERANCE
    for ids, reward in zip(sequences[::3], expected[::3], strict=True):
        assert abs(engine.score(one(ids))[0] - reward) < TOLERANCE


def test_a_prefix_of_prefixes_gives_the_rewards_of_whole_sequences(tmp_path):
    folder = write_checkpoint(tmp_path)
    workload = Workload("", (20, 60), (20, 300), (5, 200), group_size=3, system=50, references=2)
    sequences = random_groups(workload, 4, Checkpoint.open(folder).config.vocab_size)
    (batch,) = plan(sequences, token_budget=10_000).batches
    assert max(len(batch.path(place)) for place in range(len(batch.nodes))) == 3
    expected = Reference(folder).rewards([ids.tolist() for ids in sequences]).numpy()
    assert np.abs(TorchEngine.load(folder).score(batch) - expected[batch.rows]).max() < TOLERANCE


def test_the_static_base_of_sglang_shares_prefixes_at_any_length(tmp_path):
    folder = write_checkpoint(tmp_path, max_position_embeddings=64)
    sequences = draw_groups([60, 300])
    expected = Reference(folder, "sglang-static").rewards([ids.tolist() for ids in sequences]).numpy()
    engine = TorchEngine.load(folder, rope_base="sglang-static")
    assert engine.max_shared_length is None
    assert np.abs(score(engine, sequences, share=True) - expected).max() < TOLERANCE


def test_a_batch_that_shares_what_it_must_not_is_unshared(tmp_path):
    folder = write_checkpoint(tmp_path, max_position_embeddings=64)
    sequences = draw_groups([200])
    expected = Reference(folder).rewards([ids.tolist() for ids in sequences]).numpy()
    engine = TorchEngine.load(folder)
    assert engine.max_shared_length == 64
    (batch,) = plan(sequences, token_budget=1000).batches
    assert batch.computed_tokens < batch.tokens
    assert np.abs(engine.score(batch) - expected[batch.rows]).max() < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_thousand_tokens_are_as_good_as_forty(tmp_path, dtype):
    folder = write_checkpoint(tmp_path, num_hidden_layers=2)
    sequences = draw_groups([4096], group_size=2)
    expected = Reference(folder).rewards([ids.tolist() for ids in sequences]).numpy()
    engine = TorchEngine.load(folder, dtype=dtype)
    bound = TOLERANCE if dtype == "float32" else 0.3
    assert np.abs(score(engine, sequences, share=True, token_budget=5000) - expected).max() < bound


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.2), ("float16", 0.05)])
def test_half_precision_stays_near_and_sharing_changes_no_more_than_rounding(tmp_path, dtype, bound):
    """Rewards have a standard deviation of 2; bfloat16 has 8 bits and float16 has 11."""
    folder = write_checkpoint(tmp_path, dtype=getattr(torch, dtype), hidden_size=128)
    sequences = draw_groups([40, 200, 300])
    expected = Reference(folder).rewards([ids.tolist() for ids in sequences]).numpy()
    engine = TorchEngine.load(folder, dtype=dtype)
    shared, unshared = (score(engine, sequences, share=share) for share in (True, False))
    assert np.abs(shared - expected).max() < bound
    assert np.abs(unshared - expected).max() < bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_onednn_the_rewards_are_the_same(tmp_path, monkeypatch, dtype):
    folder = write_checkpoint(tmp_path)
    sequences = draw_groups([30, 200])
    with_onednn = score(TorchEngine.load(folder, dtype=dtype), sequences, share=True)
    for module in (linear, attention):
        monkeypatch.setattr(module, "onednn_works", lambda dtype, device: False)
    without = score(TorchEngine.load(folder, dtype=dtype), sequences, share=True)
    assert np.abs(with_onednn - without).max() < (TOLERANCE if dtype == "float32" else 0.2)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return TorchEngine.load(write_checkpoint(tmp_path_factory.mktemp("tiny")))


@st.composite
def prefix_trees(draw):
    """Sequences grown from each other at random places, so that they share prefixes in every way there is."""
    seed = draw(st.integers(0, 2**16))
    random = np.random.default_rng(seed)
    sequences = [random.integers(0, 512, draw(st.integers(1, 120)))]
    for _ in range(draw(st.integers(0, 6))):
        parent = sequences[draw(st.integers(0, len(sequences) - 1))]
        kept = parent[: draw(st.integers(0, len(parent)))]
        sequences.append(np.concatenate([kept, random.integers(0, 512, draw(st.integers(1, 80)))]))
    return [ids.astype(np.int32) for ids in sequences]


@given(prefix_trees(), st.integers(40, 400))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sharing_never_changes_a_reward(engine, sequences, token_budget):
    shared = score(engine, sequences, share=True, token_budget=token_budget)
    unshared = score(engine, sequences, share=False, token_budget=token_budget)
    assert np.abs(shared - unshared).max() < TOLERANCE


@pytest.mark.parametrize("scale", [0.1, 30.0, 300.0], ids=["flat", "peaked", "out of range"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_holds_for_scores_of_any_size(scale, dtype):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 300, 3, 16, generator=generator) * scale
    keys, values = torch.randn(2, 2, 300, 16, generator=generator)
    first, second, one, rest = Span(0, 80), Span(80, 140), Span(140, 141), Span(141, 300)
    segments = [
        Segment(first, first),
        Segment(second, second, (first,)),
        Segment(one, one, (Span(0, 140),)),
        Segment(rest, rest, (Span(0, 60), Span(100, 140))),
    ]
    found = {}
    for attend in (BlockAttention(dtype, 16, 3), SdpaAttention(16)):
        scaled = (queries.to(dtype).double() * attend.score_scale).float()
        found[type(attend)] = attend.over(segments)(*(part.to(dtype) for part in (scaled, keys, values))).float()
    assert found[BlockAttention].isfinite().all()
    # Scores rounded to bfloat16 before the exponential are off by up to 2^-9 of their size.
    bound = 1e-3 if dtype == torch.float32 else 0.15
    if scale < 1 or dtype == torch.float32:
        assert (found[BlockAttention] - found[SdpaAttention]).abs().max() < bound


def test_the_same_batch_gives_the_same_bits(engine):
    (batch,) = plan(draw_groups([200, 100]), token_budget=4000).batches
    assert engine.score(batch).tobytes() == engine.score(batch).tobytes()


@pytest.mark.parametrize("bad", [-1, 512, 2**31 - 1])
def test_an_id_outside_the_vocabulary_is_named(engine, bad):
    with pytest.raises(EngineError, match=rf"token id {bad}: outside this model's vocabulary of 512"):
        engine.score(one(np.array([1, bad, 3], dtype=np.int32)))


def test_a_failure_inside_a_batch_is_an_engine_error(tmp_path, monkeypatch):
    engine = TorchEngine.load(write_checkpoint(tmp_path))

    def fail(packed):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nand a traceback")

    monkeypatch.setattr(engine._decoder, "rewards", fail)
    with pytest.raises(
        EngineError, match=r"1 sequences, 3 tokens, failed: CUDA out of memory\. Tried to allocate 2 GiB\."
    ):
        engine.score(one(np.array([1, 2, 3], dtype=np.int32)))


def test_a_closed_engine_says_so(tmp_path):
    engine = TorchEngine.load(write_checkpoint(tmp_path))
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.score(one(np.array([1], dtype=np.int32)))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"dtype": "int8"}, "engine.dtype = 'int8'"), ({"device": "tpu"}, "engine.device = 'tpu'")],
    ids=["dtype", "device"],
)
def test_what_no_machine_has_is_refused_at_the_start(tmp_path, arguments, named):
    with pytest.raises(EngineStartError, match=named):
        TorchEngine.load(write_checkpoint(tmp_path), **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(EngineStartError, match=r"no CUDA device here; set engine\.device = 'cpu'"):
        TorchEngine.load(write_checkpoint(tmp_path), device="cuda")


def test_too_little_memory_at_load_is_a_start_error(tmp_path, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("polar_ray.engines.torch.decoder._read_layer", fail)
    with pytest.raises(EngineStartError, match=r"does not load as float32 on cpu: CUDA out of memory\. If memory"):
        TorchEngine.load(write_checkpoint(tmp_path))


def test_onednn_that_computes_wrongly_is_left_alone(monkeypatch):
    right = linear.onednn_product
    monkeypatch.setattr(linear, "onednn_product", lambda *arguments: right(*arguments) * 1.01)
    linear.onednn_works.cache_clear()
    try:
        assert linear.linear_kind(torch.float32, torch.device("cpu")) is linear.PlainLinear
    finally:
        linear.onednn_works.cache_clear()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_memory_that_runs_out_halves_the_budget_once_and_costs_no_row(engine, monkeypatch, error):
    sequences = draw_groups([200] * 8)
    expected = score(engine, sequences, share=True)
    rewards, calls, said = engine._decoder.rewards, [], []

    def with_little_memory(packed):
        calls.append(len(packed.ids_T))
        if calls[-1] > 900:
            raise error
        return rewards(packed)

    monkeypatch.setattr(engine._decoder, "rewards", with_little_memory)
    monkeypatch.setattr(engine, "_token_budget", 1500)
    monkeypatch.setattr(torch_engine.logger, "warning", lambda *message: said.append(message))
    scorer = Scorer(Encoder(PolarTokenizer(EMBEDDED_FOLDER), LimitsConfig()), engine)
    outcomes = scorer.compute([EncodedTriple(ids, 0, 0) for ids in sequences])
    assert np.abs([outcome.reward for outcome in outcomes] - expected).max() < TOLERANCE
    assert engine.token_budget <= 750
    assert sum(tokens > 900 for tokens in calls) == 1
    assert len(said) == 1
