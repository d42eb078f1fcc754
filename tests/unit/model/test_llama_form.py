"""The form for other engines: transformers' own sequence classifier gives the checkpoint's rewards from it."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaForSequenceClassification

from polar_ray.engines.parity import panel
from polar_ray.errors import ConfigError
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.model.llama import llama_form, refuse_longer
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.model.reference import reference_rewards


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "polar_ray"


@pytest.mark.parametrize("rope_base", ["hf", "sglang-static"])
def test_rewards_are_the_checkpoints(rope_base):
    form = llama_form(EMBEDDED_FOLDER, rope_base)
    model, loading = LlamaForSequenceClassification.from_pretrained(form, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    sequences = panel(EMBEDDED_FOLDER)
    with torch.inference_mode():
        found = [float(model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, 0]) for ids in sequences]
    expected = reference_rewards(Checkpoint.open(EMBEDDED_FOLDER), sequences, rope_base=rope_base)
    assert np.abs(np.array(found) - expected).max() < 1e-3


def test_it_is_written_once(cache):
    form = llama_form(EMBEDDED_FOLDER)
    before = (form / "config.json").stat().st_mtime_ns
    assert llama_form(EMBEDDED_FOLDER) == form
    assert (form / "config.json").stat().st_mtime_ns == before
    assert llama_form(EMBEDDED_FOLDER, "sglang-static") != form


def test_nothing_half_written_is_taken(cache, monkeypatch):
    import polar_ray.model.llama as module

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        llama_form(EMBEDDED_FOLDER)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    assert (llama_form(EMBEDDED_FOLDER) / "config.json").exists()
    assert not [left for left in (cache / "llama").iterdir() if left.name.startswith(".") and left.is_dir()]


def test_no_code_and_no_scaling_are_left_in_its_config():
    values = json.loads((llama_form(EMBEDDED_FOLDER) / "config.json").read_text())
    assert values["architectures"] == ["LlamaForSequenceClassification"]
    assert "auto_map" not in values
    assert "rope_scaling" not in values
    assert values["rope_theta"] == 1000000.0


def test_longer_sequences_than_it_serves_are_refused():
    config = Checkpoint.open(EMBEDDED_FOLDER).config
    refuse_longer(config, 32768, "vllm")
    with pytest.raises(ConfigError, match=r"limits\.max_tokens = 32769: engine 'vllm'"):
        refuse_longer(config, 32769, "vllm")
