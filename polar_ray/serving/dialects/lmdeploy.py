"""LMDeploy's `/pooling`, whose reply has another shape than vLLM's of the same path: hence the prefix.

Clients build `http://{server_address}/pooling`; give them `HOST:PORT/lmdeploy` as the address.
"""

from __future__ import annotations

import time

from polar_ray.serving.dialects import vllm
from polar_ray.serving.dialects.base import Answer, Dialect, Json


def write(body: dict[str, Json], answer: Answer) -> Json:
    """Each row's `data` is a plain number."""
    return {
        "object": "list",
        "created": int(time.time()),
        "model": answer.model,
        "data": [{"index": index, "object": "pooling", "data": reward} for index, reward in enumerate(answer.rewards)],
        "usage": {"prompt_tokens": answer.tokens, "total_tokens": answer.tokens, "completion_tokens": 0},
    }


DIALECTS = (
    Dialect("lmdeploy", ("/lmdeploy/pooling",), "LMDeploy's /pooling: raw rewards", vllm.read, write, vllm.EXAMPLE),
)
