"""A receipt changes with everything that determines a reward, and with nothing else."""

import json
import os
import shutil

import pytest

from polar_ray.config import EngineConfig, LimitsConfig
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.build import resolve_engine
from polar_ray.errors import ConfigError
from polar_ray.model.locate import EMBEDDED_FOLDER, is_untrained, locate_model
from polar_ray.receipts import Receipt, build_receipt
from polar_ray.stages import watched
from tests.support.lmdeploy_server import write_interpreter

CPU = EngineConfig(device="cpu", dtype="float32")


def receipt(folder=EMBEDDED_FOLDER, engine=CPU, limits=None):
    return build_receipt(folder, PolarTokenizer(folder), engine, limits or LimitsConfig())


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("dtype", {"engine": CPU.model_copy(update={"dtype": "bfloat16"})}),
        ("rope_base", {"engine": CPU.model_copy(update={"rope_base": "sglang-static"})}),
        ("cut_side", {"limits": LimitsConfig(cut_side="left")}),
        ("max_tokens", {"limits": LimitsConfig(max_tokens=100)}),
        ("engine_version", {"engine": CPU.model_copy(update={"deterministic": True})}),
        ("engine_version", {"engine": CPU.model_copy(update={"quantization": "int8"})}),
        ("on_empty", {"limits": LimitsConfig(on_empty="score")}),
    ],
)
def test_what_determines_a_reward_changes_the_receipt(field, other):
    ours, theirs = receipt(), receipt(**other)
    assert ours.receipt_id != theirs.receipt_id
    assert list(ours.differences(theirs)) == [field]


@pytest.mark.parametrize("change", [{"token_budget": 7}, {"share_prefixes": False}, {"threads": 1}])
def test_what_does_not_leaves_it_alone(change):
    assert receipt(engine=CPU.model_copy(update=change)) == receipt()


def test_weights_and_tokenizer_are_in_it(tmp_path):
    folder = shutil.copytree(EMBEDDED_FOLDER, tmp_path / "copy")
    assert receipt(folder) == receipt()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"reward_token_id": 200}))
    assert list(receipt(folder).differences(receipt())) == ["tokenizer_digest"]


@pytest.mark.parametrize(
    "change", [{"rope_theta": 5e7}, {"rms_norm_eps": 1e-6}, {"rope_scaling": None}, {"max_position_embeddings": 64}]
)
def test_the_same_tensors_computed_otherwise_are_another_model(tmp_path, change):
    folder = shutil.copytree(EMBEDDED_FOLDER, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert list(receipt(folder).differences(receipt())) == ["weights_digest"]


def test_weights_are_hashed_once_a_node_until_a_file_is_another(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = shutil.copytree(EMBEDDED_FOLDER, tmp_path / "copy")
    weights, stages = folder / "model.safetensors", []
    before = weights.stat()
    with watched(stages.append):
        first, second = receipt(folder), receipt(folder)
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        third = receipt(folder)
    assert first == second == receipt()
    assert list(third.differences(first)) == ["weights_digest"]
    assert stages.count("hashing the weights, once a node") == 2


def test_a_receipt_survives_json():
    ours = receipt()
    assert Receipt.model_validate_json(ours.model_dump_json()).receipt_id == ours.receipt_id


@pytest.mark.parametrize(
    ("has_gpu", "expected"), [(True, ("cuda", "bfloat16", 32768)), (False, ("cpu", "float32", 4096))]
)
def test_auto_means_the_checkpoints_dtype_on_a_gpu_and_float32_on_a_cpu(has_gpu, expected):
    engine = resolve_engine(EngineConfig(), EMBEDDED_FOLDER, has_gpu=has_gpu)
    assert (engine.device, engine.dtype, engine.token_budget) == expected


def test_an_engines_own_arguments_are_in_it(tmp_path):
    python = write_interpreter(tmp_path)
    theirs = [
        receipt(engine=EngineConfig(kind="lmdeploy", python=python, device="cuda", arguments=arguments))
        for arguments in ({}, {"log_level": "INFO", "cache_max_entry_count": 0.5})
    ]
    assert list(theirs[0].differences(theirs[1])) == ["engine_version"]
    assert theirs[1].engine_version == "lmdeploy 0.18.0, torch 2.12.1, cache_max_entry_count=0.5, log_level=INFO"


def test_what_no_engine_can_do_is_refused():
    with pytest.raises(ConfigError, match="tensor_parallel_size = 2"):
        resolve_engine(EngineConfig(kind="fake", tensor_parallel_size=2), EMBEDDED_FOLDER, has_gpu=True)
    with pytest.raises(ConfigError, match=r"_size = 3.*num_key_value_heads = 10; take one of 1, 2, 5, 10"):
        resolve_engine(EngineConfig(tensor_parallel_size=3), EMBEDDED_FOLDER, has_gpu=True)
    with pytest.raises(ConfigError, match="no float16 matrix units"):
        resolve_engine(EngineConfig(dtype="float16"), EMBEDDED_FOLDER, has_gpu=False)


def test_the_embedded_model_says_what_it_is():
    assert locate_model("embedded") == EMBEDDED_FOLDER
    assert not is_untrained(EMBEDDED_FOLDER)
