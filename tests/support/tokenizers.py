"""Tokenizer folders for tests: the one that ships, and POLAR's own where its SentencePiece model is at hand."""

import json
import shutil
from pathlib import Path

import pytest

INTERNLM2_MODEL = Path(__file__).parents[3] / "shared" / "tokenizer" / "internlm2.model"
"""InternLM2's SentencePiece model (Apache-2.0, InternLM/InternEvo). It lies beside the project, not in it."""

POLAR_SPECIAL_TOKENS = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    92397: "<|reward|>",
    92538: "<|plugin|>",
    92539: "<|interpreter|>",
    92540: "<|action_end|>",
    92541: "<|action_start|>",
    92542: "<|im_end|>",
    92543: "<|im_start|>",
}


def make_polar_tokenizer_folder(folder: Path) -> Path:
    """The tokenizer files of POLAR-7B. Skips the test where the SentencePiece model is absent."""
    if not INTERNLM2_MODEL.is_file():
        pytest.skip("InternLM2's tokenizer.model is not beside this checkout (../shared/tokenizer/internlm2.model)")
    shutil.copy(INTERNLM2_MODEL, folder / "tokenizer.model")
    declared = {str(id): {"content": token, "special": True} for id, token in POLAR_SPECIAL_TOKENS.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": declared}))
    (folder / "config.json").write_text(json.dumps({"reward_token_id": 92527}))
    return folder
