"""One model over several processes: the same rewards, and no rank dies, hangs, fails or is left behind unnoticed."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from polar_ray.config import EngineConfig
from polar_ray.engines.channel import batch_message, read_batch
from polar_ray.engines.ranks import RanksEngine
from polar_ray.engines.torch.engine import TorchEngine
from polar_ray.engines.torch.shard import Shard, refuse_uneven
from polar_ray.errors import CheckpointError, ConfigError, EngineError, ProcessCrashed
from polar_ray.model.architecture import split_wqkv, tensor_shapes
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.planning import Batch, plan
from polar_ray.serving.service import RewardService
from tests.support.checkpoints import write_checkpoint
from tests.support.endpoint import model_of, serve_config
from tests.support.ranks import are_gone, ranks_below
from tests.unit.engines.test_torch import draw_groups, one, score

PROJECT = Path(__file__).parents[3]
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}
"""Rewards have a standard deviation of 2; ranks add up in another order, of products that are rounded once more."""


def start(folder=EMBEDDED_FOLDER, *, ranks=2, dtype="float32", **options):
    """An engine of ranks, and its processes."""
    config = EngineConfig(device="cpu", dtype=dtype, tensor_parallel_size=ranks, threads=2)
    before = ranks_below(os.getpid())
    engine = RanksEngine.start(folder, config, **options)
    return engine, [process for process in ranks_below(os.getpid()) if process not in before]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Four key-value heads of two queries each; rope whose base depends on the length beyond 300."""
    fields = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 300}
    return write_checkpoint(tmp_path_factory.mktemp("ranks"), **fields)


@pytest.fixture(scope="module")
def pair():
    engine, processes = start()
    yield engine, processes
    engine.close()


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_parts_of_all_ranks_are_the_whole(checkpoint, ranks):
    opened = Checkpoint.open(checkpoint)
    shards = [Shard(rank, ranks) for rank in range(ranks)]
    config = shards[0].config(opened.config)
    for name, shape in tensor_shapes(opened.config).items():
        whole = opened.read(name, torch.float32)
        places = [shard.part(name, shape) for shard in shards]
        parts = [opened.read(name, torch.float32, part=place) for place in places]
        if not places[0]:
            assert all(part.equal(whole) for part in parts)
            continue
        assert torch.cat(parts, len(places[0]) - 1).equal(whole)
        if name.endswith("wqkv.weight"):
            split = zip(*(split_wqkv(part, config) for part in parts), strict=True)
            for found, expected in zip(split, split_wqkv(whole, opened.config), strict=True):
                assert torch.cat(found).equal(expected)


def test_ranks_that_do_not_divide_the_model_are_refused_with_those_that_would(checkpoint):
    config = Checkpoint.open(checkpoint).config
    refuse_uneven(config, 4)
    with pytest.raises(ConfigError, match=r"size = 8: .* num_key_value_heads = 4; take one of 1, 2, 4$"):
        refuse_uneven(config, 8)
    with pytest.raises(ConfigError, match=r"size = 4: .* intermediate_size = 90; take one of 1, 2$"):
        refuse_uneven(config.model_copy(update={"intermediate_size": 90}), 4)


def test_a_batch_arrives_as_it_was_sent():
    (batch,) = plan(draw_groups([12, 60]), token_budget=1000).batches
    arrived = read_batch(batch_message(batch))
    sent, found = ([(node.ids.tolist(), node.parent) for node in each.nodes] for each in (batch, arrived))
    assert sent == found
    assert arrived.rows.tolist() == list(range(len(batch)))


@pytest.mark.parametrize(("ranks", "dtype"), [(4, "float32"), (2, "bfloat16")])
def test_rewards_equal_those_of_one_process_shared_and_unshared(checkpoint, ranks, dtype):
    sequences = draw_groups([12, 60, 150, 700])
    expected = score(TorchEngine.load(checkpoint, dtype=dtype), sequences, share=True, token_budget=1500)
    engine, _ = start(checkpoint, ranks=ranks, dtype=dtype)
    try:
        assert engine.max_shared_length == 300
        for share in (True, False):
            found = score(engine, sequences, share=share, token_budget=1500)
            assert np.abs(found - expected).max() < TOLERANCE[dtype]
    finally:
        engine.close()
    assert np.ptp(expected) > 1


def test_a_batch_that_all_ranks_refuse_alike_leaves_them_in_step(pair):
    engine, _ = pair
    ids = np.arange(9, dtype=np.int32)
    before = engine.score(one(ids))
    with pytest.raises(EngineError, match="token id 4096: outside this model's vocabulary") as refused:
        engine.score(one(np.array([1, 4096], dtype=np.int32)))
    assert type(refused.value) is EngineError
    assert refused.value.details == {"token_id": 4096}
    assert engine.score(one(ids)) == before
    assert engine.is_running()


def test_a_replica_whose_rank_has_ended_is_unhealthy_before_anybody_asks(pair):
    engine, processes = pair

    async def check():
        service = RewardService(model_of(engine, serve_config()), serve_config())
        service.check_health()
        processes[0].kill()
        deadline = time.monotonic() + 10
        while engine.is_running() and time.monotonic() < deadline:  # its main thread is gone before the others are
            await asyncio.sleep(0.02)
        with pytest.raises(EngineError, match="has ended"):
            service.check_health()
        await service.close()

    asyncio.run(check())
    assert are_gone(processes, 1)


def test_memory_that_lacks_on_one_rank_alone_ends_all_of_them():
    engine, processes = start()
    limit = processes[1].memory_info().vms + (8 << 20)
    processes[1].rlimit(psutil.RLIMIT_AS, (limit, limit))
    with pytest.raises(ProcessCrashed, match=r"does not answer|failed on a batch|ended"):
        engine.score(one(np.zeros(30_000, dtype=np.int32)))
    assert are_gone(processes, 1)


@pytest.mark.parametrize("number", [signal.SIGKILL, None], ids=["killed", "hanging"])
def test_a_rank_that_is_lost_in_a_batch_ends_the_engine_at_once(number):
    engine, processes = start(collective_timeout_s=2)
    processes[1].suspend()
    if number is not None:
        threading.Timer(0.5, processes[1].send_signal, [number]).start()
    began = time.monotonic()
    with pytest.raises(ProcessCrashed, match="rank 1 of 2 was ended by SIGKILL" if number else "does not answer"):
        engine.score(one(np.arange(9, dtype=np.int32)))
    assert time.monotonic() - began < (4 if number else 15)
    assert are_gone(processes, 1)
    assert not engine.is_running()
    with pytest.raises(ProcessCrashed):
        engine.score(Batch(()))
    engine.close()


def test_a_checkpoint_that_does_not_load_is_said_in_its_own_words(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"safetensors"):
        start(folder)
    assert not [process for process in ranks_below(os.getpid()) if str(folder) in process.cmdline()]


def test_ranks_outlive_the_thread_that_started_them_and_not_the_process():
    command = [sys.executable, "-m", "tests.support.lonely_ranks"]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().startswith(b"[")
        processes = ranks_below(parent.pid)
        assert len(processes) == 2
        processes[1].suspend()  # one that could not end by itself
        parent.kill()
    assert are_gone(processes)
