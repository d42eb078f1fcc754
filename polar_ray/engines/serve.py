"""A running endpoint as an engine: its GPUs, our ids, in bulk, so that a trainer's calls go first."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from polar_ray.client import RewardClient
from polar_ray.config import EngineConfig
from polar_ray.errors import (
    EngineError,
    EngineProtocolError,
    EngineUnavailable,
    NonFiniteReward,
    ServingError,
)
from polar_ray.planning import Batch, Rewards
from polar_ray.triples import Scored, TokenIds
from polar_ray.wire import ModelReply

DEADLINE_S = 900.0
"""For one batch: long enough for a fleet to be redeployed or scaled up under the job."""

DEFAULT_TOKEN_BUDGET = 262144
"""Enough requests in a batch to keep `max_in_flight` of them under way."""

CONNECT_S = 30.0
"""To learn what the endpoint serves, before anything is scored."""


class ServeEngine:
    """Keeps the promises of `Engine`; that the same batch gives the same bits again as far as the endpoint does.

    The receipt that it was connected with holds for all replies: an endpoint that is redeployed with another model
    ends the job with `ReceiptMismatch`, and one that refuses what it is sent (`Unauthorized`, `RequestTooLarge`, ...)
    with that refusal. Without an answer within `DEADLINE_S`, or with one that is no reply of polar_ray (somebody else's
    page), a batch is `EngineUnavailable`. None of these is put down to a row.
    """

    def __init__(self, client: RewardClient, *, token_budget: int) -> None:
        self._client: RewardClient | None = client
        self._token_budget = token_budget

    @classmethod
    def connect(
        cls, address: str | None, *, max_in_flight: int, token_budget: int, expect_receipt: str | None = None
    ) -> ServeEngine:
        """`expect_receipt` is the one that every reply must have; None takes the endpoint's as it is now.

        Raises `EngineUnavailable` when nobody answers, `Unauthorized` when a token is missing."""
        client = RewardClient(
            address,
            deadline_s=DEADLINE_S,
            priority="bulk",
            max_in_flight=max_in_flight,
            expect_receipt=expect_receipt or ask_model(address).receipt_id,
        )
        return cls(client, token_budget=token_budget)

    @property
    def token_budget(self) -> int:
        return self._token_budget

    @property
    def max_shared_length(self) -> int | None:
        return None

    def score(self, batch: Batch) -> Rewards:
        if self._client is None:
            raise EngineError("the connection to the endpoint is closed; open it again")
        sequences = [TokenIds(ids.tolist()) for ids in batch.sequences()]
        try:
            scored = self._client.score_ids(sequences)
        except EngineProtocolError as error:
            raise EngineUnavailable(f"the endpoint does not answer as one: {error}") from None
        except ServingError as error:
            if not error.retryable:
                raise
            raise EngineUnavailable(f"the endpoint does not answer: {error}") from None
        return np.array([_reward(row) for row in scored], dtype=np.float32)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


def start(_: Path, engine: EngineConfig) -> ServeEngine:
    """The connection that `engine`, resolved, names. Raises as `ServeEngine.connect`."""
    return ServeEngine.connect(
        engine.address,
        max_in_flight=engine.max_in_flight,
        token_budget=engine.token_budget or DEFAULT_TOKEN_BUDGET,
        expect_receipt=engine.expect_receipt,
    )


def engine_version(engine: EngineConfig) -> str:
    return describe_endpoint(engine.address)["engine_version"]


def ask_model(address: str | None) -> ModelReply:
    """What the endpoint serves. Raises `EngineUnavailable` when nobody answers within `CONNECT_S`."""
    with RewardClient(address, deadline_s=CONNECT_S) as client:
        try:
            return client.model()
        except ServingError as error:
            if error.retryable:
                raise EngineUnavailable(str(error)) from None
            raise


def describe_endpoint(address: str | None) -> dict[str, str]:
    """What of a receipt is the endpoint's."""
    receipt = ask_model(address).receipt
    names = ("weights_digest", "engine", "engine_version", "dtype", "device", "rope_base")
    return {name: str(receipt[name]) for name in names}


def _reward(row: Scored) -> float:
    if row.reward is not None:
        return row.reward
    if row.status == NonFiniteReward.code:
        return math.nan
    raise EngineError(f"the endpoint says {row.status}: {row.detail}")
