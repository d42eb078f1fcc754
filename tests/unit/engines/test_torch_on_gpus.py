"""What the torch engine does on GPUs only, on a CPU: one call for all segments, and compiled steps."""

import numpy as np
import pytest
import torch

from polar_ray.engines.torch import decoder, elementwise, varlen
from polar_ray.engines.torch.attention import SdpaAttention, attention_for
from polar_ray.engines.torch.elementwise import (
    CompiledSteps,
    EagerSteps,
    compiled_fp8_rows_if_they_work,
    compiled_if_it_works,
    largest_difference,
)
from polar_ray.engines.torch.engine import TorchEngine
from polar_ray.engines.torch.layout import pack
from polar_ray.engines.torch.quantized import fp8_rows
from polar_ray.engines.torch.varlen import Edges, VarlenAttention, exact, largest_error, varlen_works
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.planning import plan
from tests.support.checkpoints import write_checkpoint
from tests.unit.engines.test_torch import draw_groups, score
from tests.unit.model.test_polar import TOLERANCE

CPU = torch.device("cpu")


@pytest.fixture
def untried():
    varlen_works.cache_clear()
    yield
    varlen_works.cache_clear()


@pytest.fixture
def said(monkeypatch):
    """Warnings of both modules."""
    lines = []
    for module in (elementwise, varlen):
        monkeypatch.setattr(module.logger, "warning", lambda message, *values: lines.append(message % values))
    return lines


def tries(*, share):
    """Batches of every kind of segment: tries three deep, sequences of one token, and nothing in common."""
    random = np.random.default_rng(0)
    stem = random.integers(0, 512, 90)
    branches = [np.concatenate([stem, random.integers(0, 512, n)]) for n in (40, 70)]
    sequences = [np.concatenate([branch, random.integers(0, 512, n)]) for branch in branches for n in (1, 30, 55)]
    sequences += [stem[:1], random.integers(0, 512, 130), np.concatenate([stem, [5]])]
    sequences = [ids.astype(np.int32) for ids in sequences]
    return pack(plan(sequences, token_budget=10_000, share_prefixes=share).batches[0])


@pytest.mark.parametrize("max_keys", [varlen.MAX_KEYS, 200, 1], ids=["one call", "several", "one each"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("by_token", [True, False], ids=["by token", "by head"])
def test_one_call_for_all_segments_gives_what_a_call_for_each_gives(monkeypatch, max_keys, share, by_token):
    monkeypatch.setattr(varlen, "MAX_KEYS", max_keys)
    packed = tries(share=share)
    n_tokens = len(packed.ids_T)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        drawn = torch.randn(2, *shape, generator=generator)
        return drawn.transpose(0, 1).contiguous().transpose(0, 1) if by_token else drawn

    keys, values = draw(n_tokens, 16), draw(n_tokens, 16)
    for segments, n_queries in ((packed.every_token, n_tokens), (packed.last_tokens, len(packed.last_S))):
        queries = draw(n_queries, 3, 16)
        found = VarlenAttention(CPU, 16, exact).over(segments)(queries, keys, values)
        expected = SdpaAttention(16).over(segments)(queries, keys, values)
        assert found.shape == (n_queries, 2 * 3 * 16)
        assert (found - expected).abs().max() < 1e-5


def test_sharing_is_three_levels_deep_in_these_tests():
    assert max(len(segment.prefix) for segment in tries(share=True).every_token) >= 2
    assert {1} < {len(segment.own) for segment in tries(share=True).every_token}


def test_what_lies_in_one_piece_is_not_copied():
    unshared = VarlenAttention(CPU, 16, exact).over(tries(share=False).every_token)
    assert [type(call.places) for call in unshared.keywords["calls"]] == [slice]
    shared = VarlenAttention(CPU, 16, exact).over(tries(share=True).every_token)
    assert [type(call.places) for call in shared.keywords["calls"]] == [torch.Tensor]


@pytest.mark.parametrize("kept_bits", [torch.bfloat16, torch.float16], ids=str)
def test_a_right_kernel_passes_its_trial(kept_bits):
    def rounding(queries, keys, values, *rest):
        return exact(*(part.to(kept_bits) for part in (queries, keys, values)), *rest)

    assert largest_error(kept_bits, CPU, 64, 2, rounding) < varlen.TOLERANCES[kept_bits]


def wrong_alignment(queries, keys, values, edges):
    """Each segment's first query meets its first key alone."""
    lengths = (edges.queries.diff(), edges.keys.diff())
    mixed = torch.empty_like(queries)
    for start, first, n_queries, n_keys in zip(
        edges.queries.tolist(), edges.keys.tolist(), *(each.tolist() for each in lengths), strict=False
    ):
        kept = min(n_queries, n_keys)
        whole = torch.tensor([0, kept])
        rows, places = slice(start, start + n_queries), slice(first, first + kept)
        mixed[rows] = exact(queries[rows], keys[places], values[places], Edges(whole, whole, kept, kept))
    return mixed


def wrong_heads(queries, keys, values, *rest):
    """Query heads that take key-value heads in turn instead of in blocks."""
    n_heads = queries.shape[1]
    order = torch.arange(n_heads).view(-1, keys.shape[1]).T.flatten()
    mixed = torch.empty_like(queries)
    mixed[:, order] = exact(queries[:, order], keys, values, *rest)
    return mixed


def wrong_scale(queries, *rest):
    return exact(queries * queries.shape[-1] ** -0.5, *rest)


def not_numbers(queries, *rest):
    return torch.full_like(queries, torch.nan)


@pytest.mark.parametrize("kernel", [wrong_alignment, wrong_heads, wrong_scale, not_numbers])
def test_a_wrong_kernel_fails_its_trial(kernel):
    assert not largest_error(torch.bfloat16, CPU, 64, 2, kernel) < varlen.TOLERANCES[torch.bfloat16]


def test_a_kernel_that_is_wrong_or_missing_is_left_alone_and_named(monkeypatch, untried, said):
    cuda = torch.device("cuda")
    for error in (0.3, torch.nan):
        monkeypatch.setattr(varlen, "largest_error", lambda *arguments, error=error: error)
        varlen_works.cache_clear()
        assert not varlen_works(torch.bfloat16, cuda, 128, 2)

    def missing(*arguments):
        raise NotImplementedError("no such operator on this device\nand a traceback")

    monkeypatch.setattr(varlen, "largest_error", missing)
    varlen_works.cache_clear()
    assert not varlen_works(torch.bfloat16, cuda, 128, 2)
    assert [line.partition("slower: ")[2] for line in said] == [
        "it is off by 0.3",
        "it is off by nan",
        "no such operator on this device",
    ]


def test_a_kernel_that_passes_is_taken_on_gpus_in_half_precision_alone(monkeypatch, untried, said):
    monkeypatch.setattr(varlen, "largest_error", lambda *arguments: 1e-3)
    cuda = torch.device("cuda")
    assert isinstance(attention_for(torch.bfloat16, cuda, 128, 2), VarlenAttention)
    assert isinstance(attention_for(torch.float32, cuda, 128, 2), SdpaAttention)
    assert not varlen_works(torch.bfloat16, CPU, 128, 2)
    assert not said


def test_the_kernel_of_torch_is_not_there_on_a_cpu():
    with pytest.raises(RuntimeError, match="_flash_attention_forward"):
        largest_error(torch.bfloat16, CPU, 64, 2, varlen.flash)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own use
def test_compiled_steps_give_what_torch_s_kernels_give(tmp_path):
    config = Checkpoint.open(write_checkpoint(tmp_path)).config
    eager = EagerSteps(torch.bfloat16, config.rms_norm_eps, 512)
    assert isinstance(compiled_if_it_works(eager, config, torch.bfloat16, CPU), CompiledSteps)
    rows_of = compiled_fp8_rows_if_they_work(config, torch.bfloat16, CPU)
    assert rows_of is not fp8_rows
    rows, scales = rows_of(torch.zeros(3, config.hidden_size, dtype=torch.bfloat16))
    assert (rows.dtype, rows.shape, scales.dtype, scales.shape) == (
        torch.float8_e4m3fn,
        (3, config.hidden_size),
        torch.float32,
        (3, 1),
    )
    assert (rows.float() * scales == 0).all()


def test_steps_differ_by_rounding_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(elementwise, "_compile", lambda function, width: function)
    config = Checkpoint.open(write_checkpoint(tmp_path)).config
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)):
        eager, compiled = EagerSteps(dtype, config.rms_norm_eps, 512), CompiledSteps(dtype, config.rms_norm_eps)
        assert largest_difference(compiled, eager, config, dtype, CPU) < bound


def test_steps_that_do_not_compile_or_differ_are_left_alone_and_named(tmp_path, monkeypatch, said):
    config = Checkpoint.open(write_checkpoint(tmp_path)).config
    eager = EagerSteps(torch.float32, config.rms_norm_eps, 512)

    def fail(function, width):
        raise RuntimeError("Cannot find a working triton installation\nand advice")

    monkeypatch.setattr(elementwise, "_compile", fail)
    assert compiled_if_it_works(eager, config, torch.float32, CPU) is eager
    monkeypatch.setattr(elementwise, "_compile", lambda function, width: function)
    monkeypatch.setattr(elementwise, "_silu_times", lambda gate, up: gate * up)
    assert compiled_if_it_works(eager, config, torch.float32, CPU) is eager
    assert "slower: Cannot find a working triton installation" in said[0]
    assert "slower: they differ by" in said[1]


def cut_off(x):
    """Float8 rows of what is next to zero, not of what is nearest."""
    rows, scales = fp8_rows(x)
    lower = torch.where(rows.float().abs() * scales > x.float().abs(), 15 / 16, 1.0)
    return (rows.float() * lower).to(rows.dtype), scales


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: (fp8_rows(x)[0], fp8_rows(x)[1] * 1.05),
        lambda x: (fp8_rows(x)[0].roll(1, 0), fp8_rows(x)[1]),
        lambda x: (fp8_rows(x)[0], fp8_rows(x)[1].amax().expand(len(x), 1)),
        cut_off,
    ],
    ids=["scales", "rows", "one scale", "cut off"],
)
def test_a_rounding_that_is_wrong_is_left_alone_and_named(wrong, tmp_path, monkeypatch, said):
    config = Checkpoint.open(write_checkpoint(tmp_path)).config
    monkeypatch.setattr(elementwise, "_compile", lambda function, width: fp8_rows)
    assert compiled_fp8_rows_if_they_work(config, torch.bfloat16, CPU) is not fp8_rows
    assert not said
    monkeypatch.setattr(elementwise, "_compile", lambda function, width: wrong)
    assert compiled_fp8_rows_if_they_work(config, torch.bfloat16, CPU) is fp8_rows
    assert "fp8 is not compiled, which makes it slower: they differ by" in said[0]


def test_a_model_of_both_gives_the_rewards_of_neither(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path)
    sequences = draw_groups([12, 60, 150, 400])
    expected = score(TorchEngine.load(folder), sequences, share=True)
    head_dim = Checkpoint.open(folder).config.head_dim
    monkeypatch.setattr(decoder, "attention_for", lambda *arguments: VarlenAttention(CPU, head_dim, exact))
    engine = TorchEngine.load(folder)
    monkeypatch.setattr(elementwise, "_compile", lambda function, width: function)
    monkeypatch.setattr(engine._decoder, "_steps", CompiledSteps(torch.float32, 1e-5))
    for share in (True, False):
        assert np.abs(score(engine, sequences, share=share) - expected).max() < TOLERANCE
