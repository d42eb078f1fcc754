"""Many callers and one engine: all answered right, sharing what they share, nobody starved by anybody's size."""

import asyncio
import io

import pyarrow as pa
import pytest

from polar_ray.triples import TEXT_FIELDS
from polar_ray.wire import ARROW_MEDIA_TYPE
from tests.serve.conftest import groups

pytestmark = pytest.mark.ray

PACE = 2e-5
"""Seconds per token: about 50 000 tokens a second, a small GPU."""

BUDGET = 2048
"""Tokens of one engine call."""


def test_two_hundred_callers_of_single_rows_share_their_groups(deploy, truth):
    endpoint = deploy(seconds_per_token=PACE)
    triples = groups(10, 20, words=20)
    warm = endpoint.metrics()

    async def main():
        async with endpoint.client() as client:
            return await asyncio.gather(*(endpoint.ask(client, [triple]) for triple in triples))

    replies = asyncio.run(main())
    assert [reply.rewards[0].reward for reply in replies] == truth(triples)
    tokens = sum(reply.usage.tokens for reply in replies)
    computed = sum(reply.usage.computed_tokens for reply in replies)
    assert computed < tokens
    told = endpoint.metrics()
    assert told["polar_ray_rows_total{ok}"] - warm["polar_ray_rows_total{ok}"] == len(triples)
    assert told["polar_ray_tokens_total"] - warm["polar_ray_tokens_total"] == tokens
    assert told["polar_ray_computed_tokens_total"] - warm["polar_ray_computed_tokens_total"] == computed
    assert told["polar_ray_pending_tokens"] == 0


def test_totals_of_all_replicas_add_up_whichever_is_asked(deploy, truth):
    endpoint = deploy(replicas=3)
    triples = groups(60, 2)

    async def main():
        async with endpoint.client() as client:
            parts = [triples[first : first + 4] for first in range(0, len(triples), 4)]
            return await asyncio.gather(*(endpoint.score(client, part) for part in parts))

    assert [reward for part in asyncio.run(main()) for reward in part] == truth(triples)
    endpoint.wait_for(lambda: endpoint.metrics()["polar_ray_rows_total{ok}"] == len(triples))
    assert {endpoint.metrics()["polar_ray_rows_total{ok}"] for _ in range(6)} == {len(triples)}


@pytest.mark.parametrize("form", ["json", "arrow"])
def test_ten_thousand_rows_come_back_in_order_while_small_callers_are_answered(deploy, truth, form):
    endpoint = deploy(seconds_per_token=5e-5, engine=fake_engine(BUDGET))
    triples = groups(1250, 8, words=2)
    small = groups(1, 1, about="pears")
    engine_calls = "polar_ray_batch_tokens_count"

    async def main():
        async with endpoint.client() as client:
            whole = asyncio.create_task(ask_for_all(endpoint, client, triples, form))
            await asyncio.sleep(0.1)
            await until_queued(endpoint)
            waited = []
            for _ in range(5):
                before = (await asyncio.to_thread(endpoint.metrics))[engine_calls]
                assert await endpoint.score(client, small) == truth(small)
                waited.append((await asyncio.to_thread(endpoint.metrics))[engine_calls] - before)
            assert not whole.done()
            return await whole, waited

    rewards, waited = asyncio.run(main())
    assert rewards == truth(triples)
    total = endpoint.metrics()[engine_calls]
    assert max(waited) < total / 4, (waited, total)


def test_a_backfill_does_not_starve_a_trainer(deploy, truth):
    """The backfill would take most of a minute, so that none of it is done by the time that a slow machine asks."""
    endpoint = deploy(seconds_per_token=20 * PACE, engine=fake_engine(BUDGET))
    backfill, wanted = groups(300, 8, about="backfill"), groups(12, 8, about="trainer", words=10)

    async def main():
        async with endpoint.client() as client:
            bulk = [
                asyncio.create_task(endpoint.score(client, backfill[first : first + 600], priority="bulk"))
                for first in range(0, len(backfill), 600)
            ]
            await until_queued(endpoint, "bulk")
            rewards = await asyncio.gather(
                *(endpoint.score(client, wanted[first : first + 8]) for first in range(0, 96, 8))
            )
            still_waiting = [not task.done() for task in bulk]
            for task in bulk:
                task.cancel()
            return rewards, still_waiting

    rewards, still_waiting = asyncio.run(main())
    assert [reward for part in rewards for reward in part] == truth(wanted)
    assert all(still_waiting), "the backfill was done first"


async def until_queued(endpoint, priority="interactive") -> None:
    pending = f"polar_ray_pending_tokens{{{priority}}}"
    await asyncio.to_thread(endpoint.wait_for, lambda: endpoint.metrics()[pending] > BUDGET)


async def ask_for_all(endpoint, client, triples, form) -> list[float]:
    if form == "json":
        return await endpoint.score(client, triples)
    table = pa.table({name: [getattr(triple, name) for triple in triples] for name in TEXT_FIELDS})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    reply = await client.post("/v1/rewards", content=sink.getvalue(), headers={"content-type": ARROW_MEDIA_TYPE})
    answer = pa.ipc.open_stream(reply.raise_for_status().content).read_all()
    assert answer["index"].to_pylist() == list(range(len(triples)))
    return answer["reward"].to_pylist()


def fake_engine(token_budget: int) -> dict:
    return {"kind": "fake", "device": "cpu", "dtype": "float32", "token_budget": token_budget}
