"""One suite for every engine: the promises of `polar_ray.engines.base.Engine`."""

import pytest

from polar_ray.config import EngineConfig
from polar_ray.engines.fake import FakeEngine
from polar_ray.engines.ranks import RanksEngine
from polar_ray.engines.serve import ServeEngine
from polar_ray.engines.torch.engine import TorchEngine
from polar_ray.model.locate import EMBEDDED_FOLDER
from tests.support.endpoint import running_endpoint, serve_config
from tests.support.engine_contract import *  # noqa: F403 - the suite
from tests.support.engine_contract import Claims

CLAIMS = {
    "fake": Claims(0.0),
    "torch": Claims(1e-4),
    "torch-bfloat16": Claims(0.3),
    "torch-deterministic": Claims(0.0),
    "torch-2-ranks": Claims(1e-4),
    "serve": Claims(1e-4, any_sequence=False),
}


@pytest.fixture(scope="module", params=CLAIMS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def claims(name):
    return CLAIMS[name]


@pytest.fixture(scope="module")
def connect(name):
    """Makes an engine of the kind; one that asks an endpoint gets a real one, over the torch engine."""
    if name == "fake":
        yield FakeEngine
    elif name == "serve":
        with running_endpoint(serve_config(engine={"kind": "torch", "device": "cpu", "dtype": "float32"})) as address:
            yield lambda: ServeEngine.connect(address, max_in_flight=2, token_budget=10_000)
    elif name == "torch-2-ranks":
        config = EngineConfig(device="cpu", dtype="float32", tensor_parallel_size=2)
        yield lambda: RanksEngine.start(EMBEDDED_FOLDER, config)
    else:
        dtype = "bfloat16" if name.endswith("bfloat16") else "float32"
        yield lambda: TorchEngine.load(EMBEDDED_FOLDER, dtype=dtype, deterministic=name.endswith("deterministic"))
