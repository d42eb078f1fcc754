"""How many actors a job asks for, and what each of them takes: arithmetic, no cluster."""

import pytest

from polar_ray.config import ScoreConfig
from polar_ray.corpus import job
from polar_ray.corpus.run import Pool, plan_pool
from polar_ray.errors import ConfigError

CPU = {"device": "cpu"}
GPU = {"device": "cuda"}


@pytest.mark.parametrize(
    ("settings", "nodes", "units", "expected"),
    [
        ({"engine": CPU}, [{"CPU": 2}], 50, Pool(1, 1, cpus=2, gpus=0)),
        ({"engine": CPU}, [{"CPU": 64}], 50, Pool(8, 8, cpus=8, gpus=0)),
        ({"engine": CPU, "actors": 3}, [{"CPU": 12}], 50, Pool(3, 3, cpus=4, gpus=0)),
        ({"engine": CPU, "actors": 4}, [{"CPU": 2}], 50, Pool(4, 4, cpus=0.5, gpus=0)),
        ({"engine": CPU, "actors": "1:4"}, [{"CPU": 8}], 50, Pool(1, 4, cpus=2, gpus=0)),
        ({"engine": CPU, "actors": 4}, [{"CPU": 8}], 2, Pool(2, 2, cpus=4, gpus=0)),
        ({"engine": {**CPU, "threads": 3}}, [{"CPU": 12}], 50, Pool(4, 4, cpus=3, gpus=0)),
        ({"engine": CPU}, [{"CPU": 4}] * 3, 50, Pool(3, 3, cpus=4, gpus=0)),
        ({"engine": CPU}, [{"CPU": 0}, {"CPU": 1}, {"CPU": 1}], 50, Pool(2, 2, cpus=1, gpus=0)),
        ({"engine": CPU, "actors": 6}, [{"CPU": 4}] * 3, 50, Pool(6, 6, cpus=2, gpus=0)),
        ({"engine": GPU}, [{"CPU": 8}, {"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 4}], 50, Pool(8, 8, cpus=1, gpus=1)),
        ({"engine": GPU}, [{"CPU": 32, "GPU": 8}], 50, Pool(8, 8, cpus=1, gpus=1)),
        ({"engine": GPU, "actors": "2:16"}, [{"CPU": 8, "GPU": 1}], 50, Pool(2, 16, cpus=1, gpus=1)),
        ({"engine": GPU}, [{"CPU": 4}], 50, Pool(1, 1, cpus=1, gpus=1)),
        ({"engine": {**GPU, "tensor_parallel_size": 2}}, [{"CPU": 8, "GPU": 8}], 50, Pool(4, 4, cpus=1, gpus=2)),
    ],
)
def test_the_pool_fits_the_cluster_and_the_settings(settings, nodes, units, expected):
    assert plan_pool(ScoreConfig.model_validate(settings), units, nodes) == expected


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "engine.device and actors and engine.threads:"),
        ({"actors": 8}, "engine.device and engine.threads:"),
        ({"actors": 8, "engine": CPU}, "engine.threads:"),
        ({"engine": GPU}, "actors:"),
        ({"actors": 8, "engine": GPU}, None),
        ({"actors": "2:8", "engine": {**CPU, "threads": 4}}, None),
        ({"engine": {"kind": "serve", "address": "gpu-box:8000"}}, None),
    ],
)
def test_what_is_left_open_is_not_guessed_on_a_cluster_without_workers(monkeypatch, settings, named):
    monkeypatch.setattr(job, "has_workers", lambda: False)
    config = ScoreConfig.model_validate(settings)
    if named is None:
        job._refuse_to_guess(config)
        return
    with pytest.raises(ConfigError) as refused:
        job._refuse_to_guess(config)
    assert str(refused.value).startswith(named)
    monkeypatch.setattr(job, "has_workers", lambda: True)
    job._refuse_to_guess(config)
