"""What produced a reward: everything that determines the number, and one id for all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field

from polar_ray.config import CutSide, EngineConfig, LimitsConfig, RopeBase, Settings
from polar_ray.encoding.encode import ENCODING_VERSION
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.build import describe_engine


class Receipt(Settings):
    """Two rewards with equal `receipt_id` were made by the same weights, ids and arithmetic, and may be compared."""

    weights_digest: str
    """sha256 over the model's numbers and tensors, however they are cut into files; empty for an engine without any."""

    tokenizer_digest: str
    encoding_version: int
    max_tokens: int
    max_response_tokens: int
    cut_side: CutSide
    on_too_long: Literal["cut", "error"]
    on_empty: Literal["error", "score"]
    rope_base: RopeBase
    dtype: str
    device: str
    engine: str
    engine_version: str
    activation: Literal["none"] = Field("none")
    """Rewards are the value head's raw scalar."""

    @property
    def receipt_id(self) -> str:
        """sha256 of the fields above, hexadecimal."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def differences(self, other: Receipt) -> dict[str, tuple[object, object]]:
        """Field to (ours, theirs) where the two disagree."""
        ours, theirs = self.model_dump(), other.model_dump()
        return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


def build_receipt(folder: Path, tokenizer: PolarTokenizer, engine: EngineConfig, limits: LimitsConfig) -> Receipt:
    """The receipt of what `engine`, its `auto` values already resolved, makes of the checkpoint in `folder`.

    Raises what `describe_engine` raises.
    """
    return Receipt.model_validate(
        {
            **describe_engine(engine, folder),
            "tokenizer_digest": tokenizer.digest,
            "encoding_version": ENCODING_VERSION,
            **limits.model_dump(),
        }
    )
