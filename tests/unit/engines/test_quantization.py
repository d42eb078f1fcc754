"""`engine.quantization` of the torch engine: what is rounded, what it costs, where it is refused."""

import numpy as np
import pytest
import torch

from polar_ray.bench.workload import SHAPES, write_random_checkpoint
from polar_ray.config import EngineConfig
from polar_ray.engines.build import build_engine, refuse_unsupported, resolve_engine
from polar_ray.engines.parity import check_parity, panel, score_all
from polar_ray.engines.torch import quantized
from polar_ray.engines.torch.engine import TorchEngine
from polar_ray.engines.torch.quantized import Fp8Linear, Int8Linear
from polar_ray.errors import ConfigError, EngineStartError
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.model.reference import reference_rewards
from tests.support.checkpoints import write_checkpoint

ERROR = {Int8Linear: 0.03, Fp8Linear: 0.05}
"""Root mean square over the product's standard deviation, for normal weights and activations: steps of 1/64 to 1/127 of
a row's largest, and of 1/16 of each value."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint(folder, SHAPES["tiny"])
    return folder


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ERROR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_right_to_their_rounding(kind, dtype):
    x, weight = normal(70, 96).to(dtype), normal(48, 96, seed=1).to(dtype)
    expected, product = x.double() @ weight.double().T, kind(weight)(x)
    assert product.dtype == (torch.float32 if kind is Int8Linear else dtype)
    assert (product.double() - expected).square().mean().sqrt() < ERROR[kind] * expected.std()


@pytest.mark.parametrize("kind", ERROR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_rounded_once_give_what_each_product_gives(kind, dtype):
    x = normal(70, 96).to(dtype)
    gate, up = (kind(normal(48, 96, seed=seed).to(dtype)) for seed in (1, 2))
    first, second = gate.both(up, x)
    assert torch.equal(first, gate(x))
    assert torch.equal(second, up(x))
    expected = torch.nn.functional.silu(first.float()) * second.float()
    torch.testing.assert_close(gate.gated(up, x).float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ERROR)
def test_every_row_has_its_own_scale(kind):
    x, weight = normal(33, 64), normal(40, 64, seed=1)
    alone = kind(weight)(x)
    x[7] *= 2**13
    weight[3] /= 2**13
    beside = kind(weight)(x)
    beside[7] /= 2**13
    beside[:, 3] *= 2**13
    torch.testing.assert_close(beside, alone)


@pytest.mark.parametrize("kind", ERROR)
def test_rows_of_zeros_are_zero_and_broken_rows_stay_broken(kind):
    x, weight = normal(4, 64), normal(8, 64, seed=1)
    x[0], x[1, 5], x[2, 5] = 0, torch.inf, torch.nan
    weight[2] = 0
    found = kind(weight)(x)
    assert (found[0] == 0).all()
    assert not torch.isfinite(found[1:3, 3:]).any()
    assert torch.isfinite(found[3]).all()
    assert found[3, 2] == 0


def test_no_sum_of_int8_products_overflows():
    x, weight = torch.full((5, 64), 3.0), torch.full((6, 64), -2.0)
    assert Int8Linear(weight)(x).unique().tolist() == pytest.approx([-6 * 64])


def test_a_machine_that_adds_int8_products_up_wrongly_is_refused(monkeypatch):
    right = quantized._int8_product
    monkeypatch.setattr(quantized, "_int8_product", lambda *arguments: right(*arguments) + 1)
    quantized._int8_largest.cache_clear()
    try:
        with pytest.raises(EngineStartError, match=r"int8 products are wrong; leave engine\.quantization out"):
            TorchEngine.load(EMBEDDED_FOLDER, quantization="int8")
    finally:
        quantized._int8_largest.cache_clear()


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_rewards_are_near_float32(folder, quantization):
    ids = panel(folder)
    expected = reference_rewards(Checkpoint.open(folder), ids)
    engine = TorchEngine.load(folder, quantization=quantization)
    shared, unshared = (score_all(engine, ids, share_prefixes=share) for share in (True, False))
    for found in (shared, unshared):
        assert 0.001 < np.sqrt(np.mean((found - expected) ** 2)) / expected.std() < 0.2
    np.testing.assert_allclose(shared, unshared, atol=0.1)


def test_an_engine_starts_where_int8_is_near_enough(folder):
    settings = resolve_engine(EngineConfig(quantization="int8"), folder, has_gpu=False, max_tokens=1024)
    engine = build_engine(settings, folder)
    assert check_parity(engine, settings, folder).rms > 0.001
    engine.close()


def test_weights_that_int8_is_too_coarse_for_are_refused():
    settings = resolve_engine(EngineConfig(quantization="int8"), EMBEDDED_FOLDER, has_gpu=False, max_tokens=1024)
    with pytest.raises(EngineStartError, match=r"where 0\.25 is allowed"):
        build_engine(settings, EMBEDDED_FOLDER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "vllm"}, r"for engine\.kind = 'torch'; give vllm its own by engine\.arguments"),
        ({"kind": "serve"}, "'serve' computes nothing here"),
        ({"deterministic": True}, r"not with engine\.deterministic"),
        ({"tensor_parallel_size": 2}, r"not with engine\.tensor_parallel_size = 2"),
    ],
)
def test_what_no_machine_makes_possible_is_refused(changes, message):
    with pytest.raises(ConfigError, match=rf"engine\.quantization = 'int8': .*{message}"):
        refuse_unsupported(EngineConfig(**{"quantization": "int8", **changes}))


@pytest.mark.parametrize(("quantization", "has_gpu", "instead"), [("int8", True, "fp8"), ("fp8", False, "int8")])
def test_each_is_for_one_kind_of_device(tmp_path, quantization, has_gpu, instead):
    folder = write_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=rf"engine\.quantization = '{quantization}': .*it is '{instead}'"):
        resolve_engine(EngineConfig(quantization=quantization), folder, has_gpu=has_gpu, max_tokens=1024)
