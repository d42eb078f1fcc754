"""AReaL's own reward wrapper, with its process pool, its retries and its way of turning a timeout into 0."""

import asyncio
import logging
import pickle
import types

import pytest

from polar_ray import Triple
from polar_ray.client.aio import LATE_REPLY_S
from polar_ray.errors import SchemaError, Unavailable
from polar_ray.trainers.areal import AsyncPolarReward, PolarReward, areward_fn, reward_fn
from polar_ray.trainers.endpoint import Endpoint
from tests.clients.conftest import load_file
from tests.support.scripted_server import error_answer, good, scripted_server

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # AReaL forks its pool
]

QUESTION, REFERENCE, ANSWER = "Why is the sky blue?", "Air scatters blue light most.", "Because air scatters light."
MESSAGES = [{"role": "user", "content": QUESTION}]
DECODED = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def wrapper_class():
    """AReaL's wrapper, less its coloured logging."""
    utils = types.ModuleType("areal.utils")
    utils.logging = logging
    wrapper = load_file("areal/api/reward_api.py", "areal_reward_api", **{"areal.utils": utils}).AsyncRewardWrapper
    yield wrapper
    wrapper._atexit_shutdown_all()


def call(wrapped, answer=f"<think>hm</think>{ANSWER}<|im_end|>", **row):
    return asyncio.run(wrapped(DECODED, answer, [1, 2], [3, 4], **row))


def test_its_process_pool_gets_the_scorers_reward(wrapper_class, address, scorer):
    reward = PolarReward(Endpoint(address))
    (expected,) = scorer.score([Triple(QUESTION, REFERENCE, ANSWER)])
    with_messages = call(wrapper_class(reward, max_workers=1), messages=MESSAGES, reference=REFERENCE)
    without = call(wrapper_class(reward, max_workers=1), reference=REFERENCE)
    assert [with_messages, without] == pytest.approx([expected.reward] * 2, abs=1e-5)


def test_a_deadline_that_passes_raises_where_areal_would_take_zero(wrapper_class):
    with scripted_server(error_answer(504, "deadline_exceeded")) as script:
        reward = PolarReward(Endpoint(script.address))
        with pytest.raises(Unavailable, match="no reward in time") as found:
            call(wrapper_class(reward, max_workers=1, max_retries=0), reference=REFERENCE)
    assert not isinstance(found.value, TimeoutError)


def test_the_ready_made_function_gives_up_before_areals_clock_does(wrapper_class):
    assert reward_fn.endpoint.deadline_s + LATE_REPLY_S < wrapper_class(reward_fn, max_workers=1).timeout_seconds


def test_an_endpoint_that_is_gone_raises(wrapper_class):
    reward = PolarReward(Endpoint("127.0.0.1:9", deadline_s=3.0))
    with pytest.raises(Unavailable, match="nobody answers"):
        call(wrapper_class(reward, max_workers=1, max_retries=1), reference=REFERENCE)


def test_the_event_loops_function_gathers_rollouts_into_a_request():
    with scripted_server(good) as script:
        reward = AsyncPolarReward(Endpoint(script.address, coalesce_s=0.3))

        async def run():
            return await asyncio.gather(*(reward("p", str(n), [], [], reference="r") for n in range(8)))

        assert asyncio.run(run()) == [float(n) for n in range(8)]
        assert len(script.bodies) == 1


def test_the_ready_made_functions_ask_the_environments_endpoint(endpoint_in_environment):
    assert reward_fn("p", "c", [], [], reference="r") == pytest.approx(
        asyncio.run(areward_fn("p", "c", [], [], reference="r")), abs=1e-5
    )
    assert pickle.loads(pickle.dumps(reward_fn)) == reward_fn


def test_a_missing_reference_is_named():
    with pytest.raises(SchemaError, match="'answer'"):
        PolarReward(Endpoint("127.0.0.1:9"), reference_column="answer")("p", "c", [], [], reference="r")
