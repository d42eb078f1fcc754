"""The real API in this process: over ASGI, or under uvicorn on a free loopback port."""

import asyncio
import threading
from contextlib import asynccontextmanager, contextmanager

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from polar_ray.config import ServeConfig
from polar_ray.encoding.encode import Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.fake import FakeEngine
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.receipts import build_receipt
from polar_ray.scoring import Scorer
from polar_ray.serving.api import build_api
from polar_ray.serving.service import Model, RewardService

START_S = 30


def serve_config(**changes) -> ServeConfig:
    """The fake engine over the embedded tokenizer, unless `changes` say otherwise."""
    return ServeConfig.model_validate({"engine": {"kind": "fake", "device": "cpu", "dtype": "float32"}, **changes})


def model_of(engine, config: ServeConfig) -> Model:
    """A model over `engine`, an `Engine` object of the test's own."""
    tokenizer = PolarTokenizer(EMBEDDED_FOLDER)
    receipt = build_receipt(EMBEDDED_FOLDER, tokenizer, config.engine, config.limits)
    return Model("embedded", receipt, False, Scorer(Encoder(tokenizer, config.limits), engine))


def fake_model(config: ServeConfig, seconds_per_token: float = 0.0) -> Model:
    """The fake engine, at a pace."""
    budget = config.engine.token_budget or 4096
    return model_of(FakeEngine(token_budget=budget, seconds_per_token=seconds_per_token), config)


@asynccontextmanager
async def api_client(config: ServeConfig | None = None, model: Model | None = None):
    """(httpx client that talks to the API in this process, its service)."""
    config = config or serve_config()
    service = RewardService(model or Model.load(config), config)
    transport = httpx.ASGITransport(build_api(service), raise_app_exceptions=True)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as client:
            yield client, service
    finally:
        await service.close()


@contextmanager
def running_endpoint(config: ServeConfig | None = None, model: Model | None = None, prefix: str = "", **options):
    """Address (`127.0.0.1:PORT`) of the API under uvicorn, in a thread of its own; its routes stand below `prefix`.

    `options` are uvicorn's.
    """
    config = config or serve_config()
    started: threading.Event = threading.Event()
    found: dict = {}

    async def serve() -> None:
        service = RewardService(model or Model.load(config), config)
        api = build_api(service)
        api = Starlette(routes=[Mount(prefix, api)]) if prefix else api
        settings = uvicorn.Config(api, host="127.0.0.1", port=0, log_level="error", lifespan="off", **options)
        server = found["server"] = uvicorn.Server(settings)
        running = asyncio.create_task(server.serve())
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        found["port"] = server.servers[0].sockets[0].getsockname()[1]
        started.set()
        await running
        await service.close()

    def run() -> None:
        try:
            asyncio.run(serve())
        finally:
            started.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(START_S), "the endpoint did not start"
    assert "port" in found, "the endpoint failed to start"
    try:
        yield f"127.0.0.1:{found['port']}"
    finally:
        found["server"].should_exit = True
        thread.join(START_S)
