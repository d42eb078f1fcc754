"""Loading a tokenizer: what it must declare, and how a folder that is none is refused."""

import json
import shutil

import pytest

from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.errors import CheckpointError
from polar_ray.model.locate import EMBEDDED_FOLDER


@pytest.fixture
def folder(tmp_path):
    for name in ("tokenizer.model", "tokenizer_config.json", "config.json"):
        shutil.copy(EMBEDDED_FOLDER / name, tmp_path / name)
    return tmp_path


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_polars_ids_come_from_its_files(polar_tokenizer):
    assert (polar_tokenizer.bos_id, polar_tokenizer.separator_id, polar_tokenizer.score_id) == (1, 92397, 92527)
    assert polar_tokenizer.piece(92397) == "<|reward|>"
    assert polar_tokenizer.vocab_size == 92544


def test_a_nul_keeps_its_piece(polar_tokenizer):
    assert polar_tokenizer.encode(["\x00"]) == [[354]]


def test_the_digest_is_of_what_determines_ids(folder, small_tokenizer):
    assert PolarTokenizer(folder).digest == small_tokenizer.digest
    edit(folder / "config.json", reward_token_id=134, torch_dtype="float32")
    assert PolarTokenizer(folder).digest != small_tokenizer.digest


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json", "config.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"no {name}"):
        PolarTokenizer(folder)


def test_a_broken_model_is_refused(folder):
    (folder / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="SentencePiece cannot read it"):
        PolarTokenizer(folder)


def test_a_tokenizer_without_the_separator_is_not_polars(folder):
    edit(folder / "tokenizer_config.json", added_tokens_decoder={})
    with pytest.raises(CheckpointError, match=r"declares no <\|reward\|>"):
        PolarTokenizer(folder)


def test_an_internlm2_reward_model_is_told_apart(folder, small_tokenizer):
    edit(folder / "config.json", reward_token_id=small_tokenizer.separator_id)
    with pytest.raises(CheckpointError, match="as in InternLM2-reward"):
        PolarTokenizer(folder)


def test_a_score_token_beyond_the_vocabulary_is_refused(folder):
    edit(folder / "config.json", reward_token_id=92527)
    with pytest.raises(CheckpointError, match="control token 92527 lies outside"):
        PolarTokenizer(folder)
