"""The parity gate: each way in which engines give other numbers is refused by name, and rounding is not."""

import numpy as np
import pytest

from polar_ray.config import EngineConfig
from polar_ray.engines import parity
from polar_ray.engines.build import build_engine
from polar_ray.engines.parity import check_parity, judge, panel
from polar_ray.engines.torch.engine import TorchEngine
from polar_ray.errors import ConfigError, EngineError, EngineStartError
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.planning import Batch


class Wrong:
    """The torch engine with one of the mistakes that other engines make."""

    def __init__(self, change_ids=None, change_rewards=None, **settings):
        self.engine = TorchEngine.load(EMBEDDED_FOLDER, **settings)
        self.change_ids = change_ids
        self.change_rewards = change_rewards
        self.token_budget, self.max_shared_length = 4096, None
        self.is_closed = False

    def score(self, batch):
        if self.change_ids is not None:
            changed = [self.change_ids(ids) for ids in batch.sequences()]
            batch = Batch.unshared(changed)
        rewards = self.engine.score(batch)
        return rewards if self.change_rewards is None else self.change_rewards(rewards).astype(np.float32)

    def close(self):
        self.engine.close()
        self.is_closed = True


def sigmoid(rewards):
    return 1 / (1 + np.exp(-rewards))


def double_first(ids):
    return np.concatenate([ids[:1], ids])


FLOAT32 = EngineConfig(device="cpu", dtype="float32", token_budget=4096)
BFLOAT16 = FLOAT32.model_copy(update={"dtype": "bfloat16"})


@pytest.mark.parametrize("config", [FLOAT32, BFLOAT16], ids=lambda config: config.dtype)
def test_rounding_passes(config):
    deviation = check_parity(TorchEngine.load(EMBEDDED_FOLDER, dtype=config.dtype), config, EMBEDDED_FOLDER)
    assert 0 < deviation.rms < parity.ROUNDING[config.dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"change_rewards": sigmoid}, r"sigmoids of the right ones.*use_activation = false"),
        ({"change_rewards": np.ones_like}, "softmax over one label"),
        ({"rope_base": "sglang-static"}, r"engine\.rope_base = 'sglang-static'.*rope_scaling"),
        ({"change_ids": lambda ids: ids[:-1]}, "read one token early"),
        ({"change_ids": lambda ids: ids[1:]}, "without their first token"),
        ({"change_ids": double_first}, "first token doubled"),
        ({"change_rewards": np.zeros_like}, "all the same"),
        ({"change_rewards": lambda rewards: rewards[::-1]}, "No known trap explains it"),
        ({"change_rewards": lambda rewards: rewards * np.nan}, "not finite"),
    ],
    ids=["sigmoid", "softmax", "rope", "end token", "no bos", "two bos", "zeros", "order", "nan"],
)
def test_a_trap_is_refused_by_name(wrong, words, dtype):
    config = FLOAT32.model_copy(update={"dtype": dtype})
    with pytest.raises(EngineStartError, match=words) as caught:
        check_parity(Wrong(dtype=dtype, **wrong), config, EMBEDDED_FOLDER)
    assert len(caught.value.details["expected"]) == len(caught.value.details["found"]) == len(panel(EMBEDDED_FOLDER))


def test_a_deviation_that_is_meant_is_let_through():
    wrong = Wrong(change_rewards=lambda rewards: rewards + np.linspace(-0.5, 0.5, len(rewards)))
    with pytest.raises(EngineStartError, match=r"engine\.parity_tolerance accepts"):
        check_parity(wrong, FLOAT32, EMBEDDED_FOLDER)
    allowed = FLOAT32.model_copy(update={"parity_tolerance": 0.2})
    assert judge(wrong, allowed, EMBEDDED_FOLDER).is_right


def test_an_engine_that_is_refused_is_closed(monkeypatch):
    wrong = Wrong(change_rewards=sigmoid)
    monkeypatch.setattr("polar_ray.engines.torch.engine.TorchEngine.load", lambda *_, **__: wrong)
    with pytest.raises(EngineStartError):
        build_engine(FLOAT32, EMBEDDED_FOLDER)
    assert wrong.is_closed


def test_the_reference_is_computed_once_for_the_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = TorchEngine.load(EMBEDDED_FOLDER)
    check_parity(engine, FLOAT32, EMBEDDED_FOLDER)
    monkeypatch.setattr(parity, "_compute", lambda *_, **__: pytest.fail("computed again"))
    check_parity(engine, FLOAT32, EMBEDDED_FOLDER)


class Short(Wrong):
    """Refuses longer sequences than it is set up for, as other engines do."""

    def score(self, batch):
        if any(len(ids) > 100 for ids in batch.sequences()):
            raise EngineError("a sequence of more than 100 tokens")
        return super().score(batch)


def test_an_engine_for_short_sequences_is_asked_for_no_longer_ones():
    with pytest.raises(EngineError, match="more than 100 tokens"):
        judge(Short(), FLOAT32, EMBEDDED_FOLDER)
    short = EngineConfig(kind="vllm", device="cpu", dtype="float32", max_tokens=100)
    assert judge(Short(), short, EMBEDDED_FOLDER).is_right
    assert not judge(Short(change_rewards=sigmoid), short, EMBEDDED_FOLDER).is_right


def test_an_engine_that_no_triple_of_the_panel_fits_is_refused():
    tiny = EngineConfig(kind="vllm", device="cpu", dtype="float32", max_tokens=20)
    with pytest.raises(ConfigError, match=r"engine\.max_tokens = 20: shorter than every triple .* set \d+ or more"):
        judge(Short(), tiny, EMBEDDED_FOLDER)
