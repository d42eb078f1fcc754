"""`engine.deterministic` of the torch engine: a sequence's bits depend on nothing but the sequence."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polar_ray import Scorer, Triple
from polar_ray.client import RewardClient
from polar_ray.config import EngineConfig
from polar_ray.engines.build import refuse_unsupported
from polar_ray.engines.torch import attention, decoder, linear
from polar_ray.engines.torch.determinism import fill_up
from polar_ray.engines.torch.engine import TorchEngine
from polar_ray.engines.torch.linear import PackedLinear, PlainLinear
from polar_ray.errors import ConfigError, EngineStartError
from polar_ray.model.locate import EMBEDDED_FOLDER
from tests.support.checkpoints import write_checkpoint
from tests.support.endpoint import running_endpoint, serve_config
from tests.support.reference import Reference
from tests.unit.engines.test_torch import draw_groups, one, prefix_trees, score
from tests.unit.model.test_polar import SHAPES, TOLERANCE

SETTINGS = {"kind": "torch", "device": "cpu", "dtype": "float32", "deterministic": True}


@pytest.fixture(autouse=True)
def threads():
    """As many as at first: they are the process's, and engines here set them."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engines(request, tmp_path_factory):
    """The same weights twice, for one thread and for two; sequences of more than 256 tokens have a base of their own"""
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny"), max_position_embeddings=256)
    return [TorchEngine.load(folder, dtype=request.param, deterministic=True, threads=threads) for threads in (1, 2)]


def bits(rewards):
    return np.asarray(rewards, dtype=np.float32).view(np.uint32).tolist()


@given(prefix_trees(), st.integers(40, 2000), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_alone_in_any_batch_in_any_order_shared_or_not_the_bits_are_the_same(engines, sequences, token_budget, chance):
    first, second = engines
    torch.set_num_threads(1)
    alone = bits([first.score(one(ids))[0] for ids in sequences])
    assert bits(score(first, sequences, share=True, token_budget=token_budget)) == alone
    torch.set_num_threads(2)
    assert bits(score(second, sequences, share=False, token_budget=token_budget)) == alone
    order = chance.sample(range(len(sequences)), len(sequences))
    shuffled = score(second, [sequences[place] for place in order], share=True, token_budget=2 * token_budget)
    assert bits(shuffled) == [alone[place] for place in order]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_sequences_and_whole_chunks(tmp_path, dtype):
    folder = write_checkpoint(tmp_path, num_hidden_layers=2)
    engine = TorchEngine.load(folder, dtype=dtype, deterministic=True)
    sequences = draw_groups([3000, 700, 512, 128, 127, 1500], group_size=2)
    alone = bits([engine.score(one(ids))[0] for ids in sequences])
    assert bits(score(engine, sequences, share=True, token_budget=16_384)) == alone
    assert bits(score(engine, sequences[::-1], share=False, token_budget=4096)[::-1]) == alone


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_the_rewards_are_the_right_ones(tmp_path, fields):
    folder = write_checkpoint(tmp_path, **fields)
    sequences = draw_groups([12, 60, 150, 400])
    expected = Reference(folder).rewards([ids.tolist() for ids in sequences]).numpy()
    engine = TorchEngine.load(folder, deterministic=True)
    assert np.abs(score(engine, sequences, share=True) - expected).max() < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_holds_with_the_kernels_of_torch_itself(tmp_path, monkeypatch, dtype):
    for module in (linear, attention):
        monkeypatch.setattr(module, "onednn_works", lambda dtype, device: False)
    sequences = draw_groups([30, 200, 400])
    folder = write_checkpoint(tmp_path)
    try:
        engine = TorchEngine.load(folder, dtype=dtype, deterministic=True, threads=1)
    except EngineStartError as error:
        pytest.skip(str(error))
    alone = bits([engine.score(one(ids))[0] for ids in sequences])
    assert bits(score(engine, sequences, share=True)) == alone
    assert bits(score(engine, sequences, share=False, token_budget=5000)) == alone


def test_without_it_company_moves_a_reward():
    """Else none of the above shows anything."""
    engine = TorchEngine.load(EMBEDDED_FOLDER)
    sequences = draw_groups([60, 150, 400, 333], group_size=4)
    alone = bits([engine.score(one(ids))[0] for ids in sequences])
    assert bits(score(engine, sequences, share=True, token_budget=4096)) != alone


def test_an_endpoint_and_a_process_with_other_threads_give_the_same_bits():
    triples = [Triple("How many?", "There are seven.", f"I count {n}, {'and ' * n}no more.") for n in range(40)]
    with Scorer.open(engine=EngineConfig(**SETTINGS, threads=1, token_budget=700)) as scorer:
        here = bits([row.reward for row in scorer.score(triples)])
    with running_endpoint(serve_config(engine=SETTINGS)) as address, RewardClient(address) as client:
        there = [bits([client.score([triple])[0].reward])[0] for triple in triples[:5]]
        there += bits([row.reward for row in client.score(triples[5:])])
    assert there == here


class Uneven(PackedLinear if linear.onednn_works(torch.float32, "cpu") else PlainLinear):
    """Products that round otherwise: in the middle of `rows`, or on `threads` threads."""

    rows = threads = None

    def __call__(self, x):
        product = super().__call__(x)
        if len(x) == self.rows:
            product[self.rows // 2] *= 1 + 1e-6
        if torch.get_num_threads() == self.threads:
            product *= 1 + 1e-6
        return product


def load_uneven(folder, monkeypatch, **changes):
    for name, value in changes.items():
        monkeypatch.setattr(Uneven, name, value)
    monkeypatch.setattr(decoder, "linear_kind", lambda dtype, device: Uneven)
    return TorchEngine.load(folder, deterministic=True, threads=2)


def test_a_machine_whose_products_depend_on_places_is_refused(tmp_path, monkeypatch):
    with pytest.raises(EngineStartError, match=r"engine\.deterministic: .* place among 512; .*engine\.threads = 1"):
        load_uneven(write_checkpoint(tmp_path), monkeypatch, rows=512)


def test_a_machine_whose_products_depend_on_threads_is_refused(tmp_path, monkeypatch):
    with pytest.raises(EngineStartError, match=r"engine\.deterministic: .* 2 threads round otherwise than one"):
        load_uneven(write_checkpoint(tmp_path), monkeypatch, threads=1)


def test_numbers_of_rows_that_round_otherwise_are_not_used(tmp_path, monkeypatch):
    engine = load_uneven(write_checkpoint(tmp_path), monkeypatch, rows=128)
    sequences = [np.arange(100, dtype=np.int32), np.arange(200, 250, dtype=np.int32)]
    assert engine.score(one(sequences[0]))[0] == score(engine, sequences, share=False)[0]


def test_rows_are_filled_up_to_whole_chunks_and_the_next_length():
    lengths = (64, 192, 512)
    assert [fill_up(n, lengths) for n in (1, 64, 65, 193, 512, 513, 1100)] == [64, 64, 192, 512, 512, 576, 1216]
    assert fill_up(1025, (512,)) == 1536


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel_size": 2}, "not with engine.tensor_parallel_size = 2"),
        ({"kind": "fake"}, "'fake' has no such mode; set engine.kind = 'torch'"),
        ({"kind": "serve"}, "'serve' has no such mode; set it where the endpoint is served"),
    ],
)
def test_where_there_is_no_such_mode_it_is_refused(changes, message):
    with pytest.raises(ConfigError, match=rf"engine\.deterministic: .*{message}"):
        refuse_unsupported(EngineConfig(**{"kind": "torch", "deterministic": True, **changes}))
