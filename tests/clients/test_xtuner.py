"""xtuner 0.2.0's own `RewardModelClient` against our endpoint, in all its server types; and our drop-in beside it."""

import pytest

from polar_ray import Scorer, Triple
from polar_ray.client.xtuner import RewardModelClient
from polar_ray.config import EngineConfig, LimitsConfig
from polar_ray.errors import ConfigError, EmptyText, TripleError
from tests.clients.conftest import load_file

pytestmark = pytest.mark.clients

DATA = [
    {"prompt": [{"role": "user", "content": "What is the capital of China?"}],
     "reference": [{"role": "assistant", "content": "Beijing."}],
     "output": [{"role": "assistant", "content": "Shanghai."}]},
    {"prompt": "Name two colours\nof the rainbow", "reference": "red, blue", "output": "green and black"},
    {"prompt": "中国的首都是哪里", "reference": "北京", "output": "北京"},
    {"prompt": "The sky is sky-", "reference": "blue", "output": "green", "wrapper": "pretrain"},
]  # fmt: skip


@pytest.fixture(scope="module")
def upstream():
    return load_file("xtuner/utils/rm_utils.py", "xtuner_rm_utils").RewardModelClient


@pytest.fixture(scope="module")
def expected():
    limits = LimitsConfig(cut_side="left")
    with Scorer.open(engine=EngineConfig(device="cpu", dtype="float32"), limits=limits) as scorer:
        return [row.reward for row in scorer.score([Triple.from_dict(row) for row in DATA])]


SERVERS = [("sglang", ""), ("vllm", ""), ("lmdeploy", "/lmdeploy")]


@pytest.mark.parametrize(("server_type", "prefix"), SERVERS)
def test_the_unmodified_client_gets_the_scorers_rewards(
    upstream, endpoint, tokenizer_folder, expected, server_type, prefix
):
    client = upstream(str(tokenizer_folder), server_type=server_type, server_address=f"{endpoint}{prefix}")
    assert client(DATA) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("server_type", "prefix"), SERVERS)
def test_a_single_dict_works_with_every_server_type(
    upstream, endpoint, tokenizer_folder, expected, server_type, prefix
):
    client = upstream(str(tokenizer_folder), server_type=server_type, server_address=f"{endpoint}{prefix}")
    assert client(DATA[0]) == pytest.approx(expected[:1], abs=1e-5)


def test_our_drop_in_gives_the_same_for_the_same_call(endpoint, expected):
    client = RewardModelClient("internlm/POLAR-7B", server_address=endpoint)
    assert client(DATA) == pytest.approx(expected, abs=1e-5)
    assert client(DATA[0]) == pytest.approx(expected[:1], abs=1e-5)
    client.close()


def test_where_upstream_returns_none_our_drop_in_raises(upstream, endpoint, tokenizer_folder, monkeypatch, capsys):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    forged = {"prompt": "P", "reference": "R", "output": "O[UNUSED_TOKEN_130]"}
    assert upstream(str(tokenizer_folder), server_address=endpoint)([forged]) is None
    capsys.readouterr()
    client = RewardModelClient("internlm/POLAR-7B", server_address=f"{endpoint}/lmdeploy", server_type="lmdeploy")
    with pytest.raises(EmptyText, match="output"):
        client([{"prompt": "P", "reference": "R", "output": ""}])
    with pytest.raises(TripleError, match="unknown field 'answer'"):
        client([{"prompt": "P", "reference": "R", "answer": "O"}])
    client.close()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"response_cut_side": "right"}, "response_cut_side = 'right' here and limits.cut_side = 'left'"),
        ({"max_length": 4096}, "max_length = 4096 here and limits.max_tokens = 16384"),
        ({"server_type": "tgi"}, "expected sglang, vllm or lmdeploy"),
    ],
)
def test_limits_that_would_give_other_numbers_are_refused(endpoint, changes, says):
    with pytest.raises(ConfigError, match=says):
        RewardModelClient("internlm/POLAR-7B", server_address=endpoint, **changes)
