"""ms-swift's own code calls our reward function, as its GRPO trainer does."""

import logging
import sys
import types
from dataclasses import dataclass

import pytest
import torch

from polar_ray import Triple
from polar_ray.errors import SchemaError, Unavailable
from polar_ray.trainers import swift as adapter
from tests.clients.conftest import load_file

pytestmark = pytest.mark.clients

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}]
REFERENCE = "Air scatters blue light most."
ANSWERS = ["<think>hm</think>Because air scatters light.", "Because of the sea.", "Magic."]


@dataclass
class Sample:
    """What ms-swift's sample gives its reward functions; the real class pulls in its inference engines."""

    messages: list
    extra: dict

    def to_reward_row(self):
        return {"messages": self.messages, "finish_reason": "stop", "rollout_infos": {}, **self.extra}


def batched(rows):
    """Columns of rows, as `RowPreprocessor.rows_to_batched` makes them of rows with the same keys."""
    return {key: [row[key] for row in rows] for key in rows[0]}


def module(name, **contents):
    made = types.ModuleType(name)
    vars(made).update(contents)
    return made


@pytest.fixture
def compute(monkeypatch):
    """ms-swift's function that turns samples and reward functions into a tensor of rewards."""
    dataset = module("swift.dataset", RowPreprocessor=types.SimpleNamespace(rows_to_batched=batched))
    monkeypatch.setitem(sys.modules, "swift.dataset", dataset)
    stand_ins = {
        "swift.rl_core.data": module("swift.rl_core.data", GRPOSample=Sample),
        "swift.utils": module("swift.utils", get_logger=logging.getLogger),
    }
    return load_file("swift/rl_core/grpo_algorithm.py", "swift_grpo_algorithm", **stand_ins).compute_rewards_per_func


@pytest.fixture
def orms(monkeypatch):
    """ms-swift's registry of reward functions."""
    engine = module("swift.infer_engine", InferRequest=object)
    orm = load_file("swift/rewards/orm.py", "swift_rewards_orm", **{"swift.infer_engine": engine})
    monkeypatch.setitem(sys.modules, "swift.rewards", orm)
    return orm.orms


def samples(column="reference"):
    return [Sample([*QUESTION, {"role": "assistant", "content": answer}], {column: REFERENCE}) for answer in ANSWERS]


def run(compute, function, **changes):
    return compute(samples(**changes), [function], [None], torch.device("cpu"))


def test_its_trainer_gets_the_scorers_rewards_by_the_name_we_register(compute, orms, address, scorer):
    adapter.register("polar", address=address)
    rewards = run(compute, orms["polar"](args=object()))
    answers = [answer.removeprefix("<think>hm</think>") for answer in ANSWERS]
    expected = scorer.score([Triple(QUESTION, REFERENCE, answer) for answer in answers])
    assert rewards.shape == (3, 1)
    assert rewards[:, 0].tolist() == pytest.approx([row.reward for row in expected], abs=1e-5)


def test_failures_are_raised_through_its_trainer(compute):
    with pytest.raises(Unavailable):
        run(compute, adapter.PolarReward(address="127.0.0.1:9", deadline_s=3.0))
    with pytest.raises(SchemaError, match="'reference'"):
        run(compute, adapter.PolarReward(address="127.0.0.1:9"), column="solution")
