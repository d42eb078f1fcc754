"""One connection per process: loops and threads at once, loops that die, forks, and what is sent for them all."""

import asyncio
import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from polar_ray.errors import ConfigError, EngineError, Overloaded, TripleError
from polar_ray.trainers import connection
from polar_ray.trainers.endpoint import Endpoint
from tests.support.scripted_server import error_answer, good, n_rows, rewards_reply, scripted_server

CALLERS, LOOPS = 50, 4

SURELY_S = 0.6
"""Within which a busy machine gets round to all callers of a test."""


@pytest.fixture(autouse=True)
def _no_connection_is_left():
    yield
    connection.close_connections()


def fields(number, prompt="p"):
    return prompt, "r", str(number)


async def ask(endpoint, numbers, prompt="p"):
    rows = await asyncio.gather(*(endpoint.ascore([fields(number, prompt)]) for number in numbers))
    return [row.reward for (row,) in rows]


def test_callers_in_several_loops_share_requests_and_get_their_own_rewards():
    with scripted_server(good) as script:
        endpoint = Endpoint(script.address, coalesce_s=SURELY_S)
        together = threading.Barrier(LOOPS)

        def loop_of_callers(number):
            together.wait()
            return asyncio.run(ask(endpoint, range(number * CALLERS, (number + 1) * CALLERS)))

        with ThreadPoolExecutor(LOOPS) as threads:
            found = list(threads.map(loop_of_callers, range(LOOPS)))
        (body,) = script.bodies
    assert [reward for part in found for reward in part] == [float(n) for n in range(LOOPS * CALLERS)]
    assert sorted(map(int, body["outputs"])) == list(range(LOOPS * CALLERS))


def test_groups_that_arrive_interleaved_travel_as_groups():
    with scripted_server(good) as script:
        endpoint = Endpoint(script.address, coalesce_s=SURELY_S)

        async def interleaved():
            return await asyncio.gather(
                *(endpoint.ascore([fields(number, f"prompt {number % 3}")]) for number in range(12))
            )

        asyncio.run(interleaved())
        (body,) = script.bodies
    assert [row["prompt"] for row in body["triples"]] == [f"prompt {n}" for n in range(3) for _ in range(4)]


def test_a_loop_that_ends_takes_no_connection_with_it():
    with scripted_server(good) as script:
        endpoint = Endpoint(script.address)
        assert [asyncio.run(ask(endpoint, [n])) for n in range(3)] == [[0.0], [1.0], [2.0]]
        assert [row.reward for row in endpoint.score([fields(3)])] == [3.0]
        assert len(script.connections) == 1


def test_a_row_that_fails_fails_its_caller_alone():
    with scripted_server(rewards_reply([1.0, None, 3.0])) as script:

        async def run():
            endpoint = Endpoint(script.address, coalesce_s=SURELY_S)
            return await asyncio.gather(*(endpoint.ascore([fields(n)]) for n in range(3)), return_exceptions=True)

        first, failed, third = asyncio.run(run())
    assert (first[0].reward, third[0].reward) == (1.0, 3.0)
    assert type(failed) is EngineError


def test_a_triple_that_is_none_fails_its_caller_before_anything_is_sent():
    with scripted_server(good) as script:

        async def run():
            endpoint = Endpoint(script.address)
            calls = (endpoint.ascore([fields(1)]), endpoint.ascore([("p", None, "2")]))
            return await asyncio.gather(*calls, return_exceptions=True)

        fine, failed = asyncio.run(run())
        assert script.bodies[0]["triples"][0]["output"] == "1"
    assert fine[0].reward == 1.0
    assert isinstance(failed, TripleError)
    assert "reference" in str(failed)


def test_a_request_that_fails_as_a_whole_raises_in_threads_and_in_loops():
    with scripted_server(error_answer(429, "overloaded", Retry_After="60")) as script:
        endpoint = Endpoint(script.address, deadline_s=1)
        with pytest.raises(Overloaded, match="said the server"):
            endpoint.score([fields(1)])
        with pytest.raises(Overloaded):
            asyncio.run(ask(endpoint, [1]))


def test_a_cancelled_caller_leaves_the_others_their_rewards():
    with scripted_server(good) as script:

        async def run():
            endpoint = Endpoint(script.address)
            asked = [asyncio.create_task(endpoint.ascore([fields(n)])) for n in range(3)]
            await asyncio.sleep(0)
            asked[1].cancel()
            return await asyncio.gather(*asked, return_exceptions=True)

        first, left, third = asyncio.run(run())
    assert (first[0].reward, third[0].reward) == (0.0, 2.0)
    assert isinstance(left, asyncio.CancelledError)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_asks_over_a_connection_of_its_own():
    with scripted_server(good) as script:
        endpoint = Endpoint(script.address)
        endpoint.score([fields(1)])
        found = multiprocessing.get_context("fork").SimpleQueue()
        child = multiprocessing.get_context("fork").Process(
            target=lambda: found.put(endpoint.score([fields(2)])[0].reward)
        )
        child.start()
        child.join(20)
        assert child.exitcode == 0
        assert found.get() == 2.0
        assert len(script.connections) == 2


def test_the_address_is_read_from_the_environment_when_it_is_needed(monkeypatch):
    monkeypatch.delenv("POLAR_RAY_ADDRESS", raising=False)
    endpoint = Endpoint()
    with pytest.raises(ConfigError, match="POLAR_RAY_ADDRESS"):
        endpoint.score([fields(1)])
    with scripted_server(good) as script:
        monkeypatch.setenv("POLAR_RAY_ADDRESS", script.address)
        monkeypatch.setenv("POLAR_RAY_TOKEN", "secret")
        assert endpoint.score([fields(1)])[0].reward == 1.0
        assert script.headers[0]["authorization"] == "Bearer secret"


ADDRESSES = [
    "127.0.0.1:1",
    "https://host.example/polar",
    "x:secret@127.0.0.1:1",
    "https://x:secret@host.example/polar",
    "x:se/cr@secret://secret\n@127.0.0.1:1",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_token_is_not_shown(address):
    shown = repr(Endpoint(address, token="secret", deadline_s=9))
    assert "secret" not in shown
    assert "se/" not in shown
    assert shown.startswith("Endpoint(address='")
    assert "deadline_s=9" in shown
    assert ("127.0.0.1:1" if "127" in address else "https://host.example/polar") in shown


def test_the_environments_endpoint_is_shown_as_none():
    assert repr(Endpoint()).startswith("Endpoint(address=None, deadline_s=")


MANY = 256


def test_a_callers_few_rows_do_not_wait_for_anothers_many():
    def slow_for_many(body):
        if n_rows(body) >= MANY:
            time.sleep(2)
        return good(body)

    with scripted_server(slow_for_many) as script:

        async def run():
            endpoint = Endpoint(script.address)
            many = asyncio.create_task(endpoint.ascore([fields(number) for number in range(MANY)]))
            await asyncio.sleep(0)
            few = await endpoint.ascore([fields(7)])
            assert not many.done()
            return few, await many

        few, many = asyncio.run(run())
    assert [row.reward for row in few] == [7.0]
    assert [row.reward for row in many] == [float(number) for number in range(MANY)]


@pytest.mark.parametrize("nothing", [None, "", [], [{"role": "user", "content": ""}]], ids=str)
def test_an_empty_prompt_or_reference_is_no_sample_of_any_trainer(nothing):
    endpoint = Endpoint("127.0.0.1:1")
    for row in ((nothing, "r", "o"), ("p", nothing, "o")):
        with pytest.raises(TripleError, match="empty or null"):
            endpoint.score([row])


def test_a_templated_prompt_and_its_output_are_sent_without_markup():
    with scripted_server(rewards_reply([1.0])) as script:
        prompt = "<|user|>\n2+2?<|end|>\n<|assistant|>\n"
        Endpoint(script.address).score([(prompt, "r", "two and two</think> 4<|end|><|endoftext|>")])
        (body,) = script.bodies
    assert (body["triples"][0]["prompt"], body["triples"][0]["output"]) == ("2+2?", "4")


def test_an_unknown_setting_is_named():
    with pytest.raises(ConfigError, match="adress"):
        Endpoint.of({"adress": "127.0.0.1:1"})


def test_settings_reach_the_endpoint():
    with scripted_server(good) as script:
        Endpoint(script.address, priority="bulk", expect_receipt="r1", deadline_s=9).score([fields(1)])
        (body,) = script.bodies
    assert (body["priority"], body["expect_receipt"]) == ("bulk", "r1")
    assert 0 < body["deadline_s"] <= 9


@pytest.mark.parametrize(("keep", "sent"), [(False, "4"), (True, "<think>2+2</think> 4")], ids=["without", "with"])
def test_thinking_is_scored_only_when_asked_for(keep, sent):
    with scripted_server(rewards_reply([1.0])) as script:
        text = "<think>2+2</think> 4"
        Endpoint(script.address, keep_thinking=keep).score([("p", "r", text)])
        messages = [{"role": "assistant", "content": text}]
        Endpoint(script.address, keep_thinking=keep).score([("p", "r", messages)])
        outputs = [body["triples"][0]["output"] for body in script.bodies]
    assert outputs == [sent, [{"role": "assistant", "content": sent}]]
