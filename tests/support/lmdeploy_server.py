"""LMDeploy's `serve api_server` as far as polar_ray speaks to it, for machines without a GPU.

Written after lmdeploy 0.18.0: what its protocol takes (`PoolingRequest`) and answers (`PoolingResponse`), and where
it fails (a sequence of one token, one that is too long). Rewards are the real ones of the weights it is given.

    python -m tests.support.lmdeploy_server -m lmdeploy serve api_server FOLDER [FLAG...]
"""

import argparse
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel

from polar_ray.config import EngineConfig
from polar_ray.encoding.encode import Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines import guard, lmdeploy
from polar_ray.engines.build import resolve_engine
from polar_ray.engines.torch.engine import TorchEngine
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.planning import Batch
from polar_ray.scoring import Scorer

ROOT = Path(__file__).parents[2]
MAX_TOKENS = 1000


def write_interpreter(folder: Path) -> str:
    """What `engine.python` names: an interpreter that has lmdeploy 0.18.0, as far as anybody can tell."""
    script = folder / "python"
    script.write_text(
        '#!/bin/sh\nif [ "$1" = "-c" ]; then echo "lmdeploy 0.18.0, torch 2.12.1"; exit 0; fi\n'
        f'cd {shlex.quote(str(ROOT))} && exec {sys.executable} -m tests.support.lmdeploy_server "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


def settings(**changes) -> EngineConfig:
    """As on a machine that has a GPU."""
    config = EngineConfig(kind="lmdeploy", **changes)
    return resolve_engine(config, EMBEDDED_FOLDER, has_gpu=True, max_tokens=MAX_TOKENS)


def start_engine(python: str) -> lmdeploy.LmdeployEngine:
    """With a server of its own."""
    return lmdeploy.start(EMBEDDED_FOLDER, settings(python=python))


def open_scorer(python: str, config) -> Scorer:
    return Scorer(Encoder(PolarTokenizer(EMBEDDED_FOLDER), config.limits), start_engine(python))


def servers_below(pid: int) -> list[psutil.Process]:
    """Servers of this module that process `pid`, or one that it has started, has for its own; without their guards."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            words = process.cmdline()
            if "tests.support.lmdeploy_server" in words and guard.__file__ not in words:
                found.append(process)
    return found


class PoolingRequest(BaseModel):
    model: str | None = None
    input: list[int] | list[list[int]] | str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


def parse(words: list[str]) -> argparse.Namespace:
    """The flags that lmdeploy knows, of those that polar_ray sets; another one is an error there too."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("model_path")
    parser.add_argument("--server-name", default="0.0.0.0")
    parser.add_argument("--server-port", type=int, default=23333)
    parser.add_argument("--backend", choices=["pytorch", "turbomind"], default="turbomind")
    parser.add_argument("--model-name")
    parser.add_argument("--dtype", choices=["auto", "float16", "bfloat16"], default="auto")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--session-len", type=int)
    parser.add_argument("--max-prefill-token-num", type=int, default=8192)
    parser.add_argument("--disable-fastapi-docs", action="store_true")
    parser.add_argument("--log-level", default="WARNING")
    return parser.parse_args(words)


def build(arguments: argparse.Namespace) -> FastAPI:
    assert arguments.backend == "pytorch", "TurboMind has no reward models"
    engine = TorchEngine.load(Path(arguments.model_path), dtype="float32")
    app = FastAPI()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "healthy"}

    @app.get("/v1/models")
    def models() -> dict[str, object]:
        return {"object": "list", "data": [{"id": arguments.model_name or arguments.model_path, "object": "model"}]}

    @app.post("/pooling")
    def pooling(request: PoolingRequest, raw: Request) -> dict[str, object]:
        if raw.headers.get("content-type", "").split(";")[0] != "application/json":
            raise HTTPException(400, "Unsupported Media Type: Only 'application/json' is allowed")
        if not request.input:
            raise HTTPException(400, "Input list cannot be empty.")
        assert isinstance(request.input[0], list), "text would have to be split by a tokenizer"
        scores = [score(ids) for ids in request.input]
        data = [{"index": index, "object": "pooling", "data": value} for index, value in enumerate(scores)]
        n_tokens = sum(map(len, request.input))
        return {
            "id": "pool-1",
            "object": "list",
            "created": int(time.time()),
            "model": request.model or arguments.model_name,
            "data": data,
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens, "completion_tokens": 0},
        }

    def score(ids: list[int]) -> float:
        if len(ids) > arguments.session_len:
            raise TypeError("'NoneType' object is not subscriptable")
        tokens = np.array(ids, dtype=np.int32)
        reward = engine.score(Batch.unshared([tokens]))[0]
        logits = torch.full((len(ids), 1), float(reward), dtype=torch.float64)
        return logits.squeeze()[-1].item()

    return app


if __name__ == "__main__":
    assert sys.argv[1:5] == ["-m", "lmdeploy", "serve", "api_server"]
    found = parse(sys.argv[5:])
    uvicorn.run(build(found), host=found.server_name, port=found.server_port, log_level="warning")
