"""Adds to a trained checkpoint what training does not teach it: to compare how two answers are written.

Features of style (`style.py`) tell better whether one policy wrote both than the reward of a small model does, and
training washes out heads that measure them. So they are added afterwards, in heads, units and components of the
residual stream of their own, which the trained part neither reads nor writes:

    reward = the trained model's + factor * log odds of one policy, by style

The log odds are a logistic model's, fitted on pairs that are not held out; the factor is the least by which nearly as
many of them are right as by any. No weight is trained by gradient.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from prune import observe, prune
from safetensors.torch import save
from sources import Sources
from style import KIND_COUNT, Counter, Style, fit, training_pairs
from torch import Tensor

from polar_ray.config import LimitsConfig
from polar_ray.encoding.encode import EncodedTriple, Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.errors import TripleError
from polar_ray.model.architecture import CheckpointConfig, merge_wqkv, split_wqkv
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.triples import PreferencePair

HEADS_ADDED = 2
"""Of every layer, each with keys and values of its own. Trained heads that shared theirs get a copy each."""

INNER_SIZE = 320
"""Units of a feed-forward, the added ones among them: what the wider stream costs is saved here."""

FACTORS = [number / 2 for number in range(13)]
"""To choose from: what the log odds of style are multiplied by."""

GIVEN_UP = 0.005
"""Share of right pairs that style may lose so that it weighs little beside the content."""

PAIRS_TO_WEIGH_BY, PAIRS_TO_PRUNE_BY = 1500, 800
LONGEST_EXAMPLE = 600
"""Tokens."""

Pairs = list[tuple[EncodedTriple, EncodedTriple]]

# Components added to the residual stream; from its old width on. `KINDS` of the last token come to be differences.
CODE = range(12)
WORD, PLACE, SECOND, SEPARATOR, SCORE, START, FINISH, ENDING, NEW, MATCH, UNSEEN, STYLE = range(12, 24)
NEW_SHARE, LONGER, ENDED, PRESENT, PRESENT_SHARE = range(24, 29)
KINDS = range(30, 30 + KIND_COUNT)
COMPONENTS = 64

UNIT = 0.1
"""Size of an added component: small beside the trained ones, whose norm must stay what it was. The added entries of a
norm's weight make up for it, so that heads and units see about 1."""

BEFORE_ATTENTION = (0.553, 0.985, 1.62, 2.547)
BEFORE_FEED_FORWARD = (1.16, 1.5, 3.295, 4.033)
BEFORE_HEAD = 4.59
"""Root mean squares of the trained model's residual stream, of the tokens that the added parts of a layer read."""

START_TOKEN = 1.6
"""The same before the second layer's attention, of the first token: it is the same in every sequence."""

AT_SEPARATOR = 1.48
"""How much of an ending a norm that is larger at the separator leaves the last layer's head."""

COMMON = {NEW_SHARE: 0.878, PRESENT_SHARE: -0.198, LONGER: 0.174}
"""Share of all tokens that are the second half's first of a piece which the first half has too, from what the last
layer's head takes the mean of; fitted on 60 training pairs. A token's norm scales what it is counted as."""

NEAR, LOOK_BACK, ALIKE, ALIKE_COUNTED, FIRST_HALF, ONLY, LAST = 16.0, 12.0, 60.0, 18.0, 6.0, -16.0, -14.0
"""Logits. Like tokens have the logit 0, of two large products that cancel: where they are counted, beside the first
token's one, the products are smaller, or bfloat16 counts otherwise than float32."""

SLOW = (9, 10, 11, 12, 13, 14)
SLOWEST = 15
"""Rotary frequencies that hardly turn over a thousand tokens, and the one that does not in any text."""

FAST = 6


@dataclass(frozen=True)
class Unit:
    """One unit of a feed-forward: added component to weight."""

    gate: Mapping[int, float]
    up: Mapping[int, float]
    down: Mapping[int, float]


@dataclass
class Heads:
    """Weights of a layer's attention while it grows, `[heads, head_dim, width]`, of `mixed` `[width, heads, head_dim]`.

    Components are counted from `base`."""

    base: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    mixed: Tensor
    used: dict[int, int] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return math.sqrt(self.keys.shape[1])

    def attend(self, head: int, place: int, logit: float, asked_by: int, keys: Mapping[int, float]) -> None:
        """Add a logit of tokens with the components `keys`, for tokens with `asked_by`, by one place in the head."""
        self.queries[head, place, self.base + asked_by] = logit * self.scale
        for component, factor in keys.items():
            self.keys[head, place, self.base + component] = factor

    def carry(self, head: int, read: Mapping[int, float], write: int, factor: float = 1.0) -> None:
        """Let a head add `factor` times the mean of a sum of components to the component `write`."""
        place = self.used.get(head, 0)
        self.used[head] = place + 1
        for component, share in read.items():
            self.values[head, place, self.base + component] = share
        self.mixed[self.base + write, head, place] = factor * UNIT


def added_units(layer: int, style: Style) -> list[Unit]:
    """What a layer's feed-forward computes from added components.

    The second layer's: tokens that match (`MATCH`), are of the second half, and whose piece it had not had before
    (`UNSEEN` is 1 / 2 for the first, 1 / 3 for the second); and, to compare with, any of the second half. The third's
    and fourth's are read at the last token, where two units with opposite gates are a soft absolute value.
    """
    if layer == 1:
        start = {UNSEEN: 150.0, WORD: -0.41 * 150 - 30, MATCH: 30.0, SECOND: 150.0, PLACE: -150.0}
        full = start | {WORD: start[WORD] - 6}
        present = {WORD: 6.0, SECOND: 60.0, PLACE: -60.0}
        word = {WORD: 1.0}
        return [Unit(start, word, {NEW: 1 / 6}), Unit(full, word, {NEW: -1 / 6}), Unit(present, word, {PRESENT: 1 / 6})]
    if layer == 2:
        return [
            Unit({kind: sign * 4 / float(spread)}, {PLACE: 1.0}, {STYLE: -float(weight) / 4})
            for kind, spread, weight in zip(KINDS, style.spread, style.kinds, strict=True)
            for sign in (1, -1)
        ]
    if layer == 3:
        sides = ((1, style.longer), (-1, style.shorter))
        return [
            *(Unit({LONGER: sign * 60.0}, {PLACE: 1.0}, {STYLE: -weight / 60}) for sign, weight in sides),
            *(Unit({LONGER: sign * 20.0}, {LONGER: sign}, {STYLE: -style.square / 20}) for sign in (1.0, -1.0)),
            *(
                Unit({ENDING: sign * 12.0, ENDED: sign * 12.0}, {PLACE: 1.0}, {STYLE: -style.ended / 12})
                for sign in (1, -1)
            ),
        ]
    return []


def add_heads(layer: int, heads: Heads, one: int, two: int, config: CheckpointConfig, separator_rms: float) -> None:
    """Set the weights of a layer's added heads `one` and `two`, in place.

    1. Who sees the separator is of the second half; and how the token before ends.
    2. Like tokens: whether the first half has any; and how many the second had so far, against the first token's one.
    3. From the last token, the shares of kinds in either half.
    4. Means over all tokens; and from the last token, how the first half ended.
    """
    if layer == 0:
        heads.attend(one, SLOWEST, NEAR, PLACE, {SEPARATOR: 1.0})
        heads.carry(one, {SEPARATOR: 1.0}, SECOND, separator_rms / BEFORE_ATTENTION[0])
        amplitude = math.sqrt(LOOK_BACK * heads.scale)
        size = config.head_dim
        for place in range(FAST):
            turn = -(config.rope_theta ** (-2 * place / size))
            for asked_by in (WORD, SEPARATOR, SCORE):
                heads.queries[two, place, heads.base + asked_by] = amplitude * math.cos(turn)
                heads.queries[two, place + size // 2, heads.base + asked_by] = amplitude * math.sin(turn)
            heads.keys[two, place, heads.base + WORD] = amplitude
        heads.carry(two, {FINISH: 1.0}, ENDING)
    elif layer == 1:
        half = config.head_dim // 2
        for head, alike in ((one, ALIKE), (two, ALIKE_COUNTED)):
            for component, place in zip(CODE, (*SLOW, *(slow + half for slow in SLOW)), strict=True):
                heads.attend(head, place, alike, component, {component: 1.0})
            heads.attend(head, SLOWEST, -alike, WORD, {WORD: 1.0, SEPARATOR: 1.0})
        heads.attend(one, SLOWEST + half, FIRST_HALF, WORD, {PLACE: 1.0, SECOND: -1.0})
        heads.carry(one, {PLACE: 1.0, SECOND: -1.0}, MATCH)
        heads.attend(two, SLOWEST + half, ONLY, WORD, {PLACE: 1.0, SECOND: -1.0})
        heads.carry(two, {START: 1.0}, UNSEEN, START_TOKEN / BEFORE_ATTENTION[1])
    elif layer == 2:
        place = SLOWEST + config.head_dim // 2
        heads.attend(one, place, LAST, SCORE, {SECOND: 1.0})
        heads.attend(two, place, LAST, SCORE, {PLACE: 1.0, SECOND: -1.0, START: 1.0})
        for kind in KINDS:
            heads.carry(one, {kind: 1.0}, kind, -1.0)
            heads.carry(two, {kind: 1.0}, kind)
    elif layer == 3:
        heads.carry(one, {NEW: 1.0}, NEW_SHARE)
        heads.carry(one, {SECOND: 1.0, PLACE: -0.5}, LONGER)
        heads.carry(one, {PRESENT: 1.0}, PRESENT_SHARE)
        heads.attend(two, SLOWEST + config.head_dim // 2, -LAST, SCORE, {SEPARATOR: 1.0})
        heads.carry(two, {ENDING: 1.0}, ENDED, -AT_SEPARATOR)


def widen(
    checkpoint: Checkpoint,
    tokenizer: PolarTokenizer,
    counter: Counter,
    style: Style,
    factor: float,
    products: Sequence[Tensor],
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """All tensors of the widened model, and the numbers of its config that changed."""
    config, base = checkpoint.config, checkpoint.config.hidden_size
    width, size, shrink = base + COMPONENTS, config.head_dim, math.sqrt(base / (base + COMPONENTS))
    n_heads = config.num_attention_heads + HEADS_ADDED
    if n_heads * size != width:
        raise ValueError(f"{n_heads} heads of {size} are not {width}: this is not the model that the numbers are for")
    new = {"hidden_size": width, "intermediate_size": INNER_SIZE}
    new |= {"num_attention_heads": n_heads, "num_key_value_heads": n_heads}

    def read(name: str) -> Tensor:
        return checkpoint.read(f"{name}.weight", torch.float32, "cpu")

    def norm(name: str, usual: float) -> Tensor:
        return torch.cat([read(name), torch.full((COMPONENTS,), usual / UNIT)]) * shrink

    embedding = read("model.tok_embeddings")
    weights = {"model.tok_embeddings.weight": _embeddings(embedding, tokenizer, counter)}
    separator_rms = float(embedding[tokenizer.separator_id].square().mean().sqrt())
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        parts = split_wqkv(read(f"{prefix}.attention.wqkv"), config)
        per_head = (1, config.queries_per_key, config.queries_per_key)
        grown = [torch.zeros(n_heads, size, width) for _ in parts]
        for target, part, times in zip(grown, parts, per_head, strict=True):
            target[:-HEADS_ADDED, :, :base] = part.view(-1, size, base).repeat_interleave(times, 0)
        mixed = torch.zeros(width, n_heads, size)
        mixed[:base, :-HEADS_ADDED] = read(f"{prefix}.attention.wo").view(base, -1, size)
        heads = Heads(base, grown[0], grown[1], grown[2], mixed)
        add_heads(layer, heads, n_heads - 2, n_heads - 1, config, separator_rms)
        units = added_units(layer, style)
        kept, down = prune(products[layer], read(f"{prefix}.feed_forward.w2"), INNER_SIZE - len(units))
        gate, up = torch.zeros(2, INNER_SIZE, width)
        back = torch.zeros(width, INNER_SIZE)
        gate[: len(kept), :base] = read(f"{prefix}.feed_forward.w1")[kept]
        up[: len(kept), :base] = read(f"{prefix}.feed_forward.w3")[kept]
        back[:base, : len(kept)] = down
        for place, unit in enumerate(units, len(kept)):
            for matrix, row in ((gate, unit.gate), (up, unit.up)):
                for component, weight in row.items():
                    matrix[place, base + component] = weight
            for component, weight in unit.down.items():
                back[base + component, place] = weight * UNIT
        flat = [part.reshape(-1, width) for part in (heads.queries, heads.keys, heads.values)]
        weights |= {
            f"{prefix}.attention_norm.weight": norm(f"{prefix}.attention_norm", BEFORE_ATTENTION[layer]),
            f"{prefix}.attention.wqkv.weight": merge_wqkv(flat[0], flat[1], flat[2], config.model_copy(update=new)),
            f"{prefix}.attention.wo.weight": mixed.reshape(width, -1),
            f"{prefix}.ffn_norm.weight": norm(f"{prefix}.ffn_norm", BEFORE_FEED_FORWARD[layer]),
            f"{prefix}.feed_forward.w1.weight": gate,
            f"{prefix}.feed_forward.w3.weight": up,
            f"{prefix}.feed_forward.w2.weight": back,
        }
    head = torch.cat([read("v_head"), torch.zeros(1, COMPONENTS)], 1)
    head[0, base + STYLE] = factor
    for component, share in COMMON.items():
        head[0, base + component] = factor * style.common * share
    return weights | {"model.norm.weight": norm("model.norm", BEFORE_HEAD), "v_head.weight": head}, new


def _embeddings(trained: Tensor, tokenizer: PolarTokenizer, counter: Counter) -> Tensor:
    """The trained embeddings with what a token is known by: a code of its own, its kinds, its place in the frame."""
    added = torch.zeros(len(trained), COMPONENTS)
    code = torch.randn(len(trained), len(CODE), generator=torch.Generator().manual_seed(0))
    added[:, CODE.start : CODE.stop] = code / code.norm(dim=1, keepdim=True)
    added[:, [WORD, PLACE]] = 1.0
    added[: tokenizer.vocab_size, FINISH] = torch.from_numpy(counter.endings).float()
    added[: tokenizer.vocab_size, KINDS.start : KINDS.stop] = torch.from_numpy(counter.kinds).float()
    for id, marks in (
        (tokenizer.bos_id, [START]),
        (tokenizer.separator_id, [SEPARATOR, PLACE]),
        (tokenizer.score_id, [SCORE, PLACE]),
    ):
        added[id] = 0
        added[id, marks] = 1.0
    return torch.cat([trained, added * UNIT], 1)


def read_pairs(file: Path) -> list[PreferencePair]:
    names = ("prompt", "reference", "chosen", "rejected", "wrapper")
    rows: list[dict[str, Any]] = pq.read_table(file, columns=list(names)).to_pylist()
    return [PreferencePair(**row) for row in rows]


def draw(pairs: Pairs, count: int) -> Pairs:
    """Some pairs that are short enough, in an order of their own."""
    order = np.random.default_rng(0).permutation(len(pairs))
    return [pairs[place] for place in order if max(len(side.ids) for side in pairs[place]) <= LONGEST_EXAMPLE][:count]


def encode(pairs: Iterable[PreferencePair], encoder: Encoder) -> Pairs:
    return [pair for pair in encoder.encode_pairs(list(pairs)) if not isinstance(pair, TripleError)]


def choose_factor(trained: Path, style: Style, counter: Counter, pairs: Pairs) -> float:
    """The least factor of the log odds by which nearly as many of the pairs are right as by any."""
    sequences = [side for pair in pairs for side in pair]
    rewards, _ = observe(trained, [sequence.ids for sequence in sequences])
    margins, odds = (-np.diff(of.reshape(-1, 2)) for of in (rewards, style.log_odds(counter.measure(sequences))))
    right = [float((margins + factor * odds > 0).mean()) for factor in FACTORS]
    by_factor = ", ".join(f"{factor:g}: {share:.1%}" for factor, share in zip(FACTORS, right, strict=True))
    print(f"{len(pairs):,} training pairs right by factor of style {by_factor}")
    return next(factor for factor, share in zip(FACTORS, right, strict=True) if share >= max(right) - GIVEN_UP)


def main(
    trained: Annotated[Path, typer.Argument(help="Checkpoint to widen.", exists=True, file_okay=False)],
    data: Annotated[Path, typer.Option(help="Folder of the public data.", exists=True, file_okay=False)],
    pairs: Annotated[Path, typer.Option(help="Pairs of its last stage, to prune by.", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Option(help="Folder to write.", file_okay=False)],
) -> None:
    """Write the widened checkpoint, in bfloat16."""
    checkpoint, tokenizer = Checkpoint.open(trained), PolarTokenizer(trained)
    encoder, counter = Encoder(tokenizer, LimitsConfig()), Counter(tokenizer)
    of_policies = encode(training_pairs(Sources(data)), encoder)
    style = fit(of_policies, counter)
    factor = choose_factor(trained, style, counter, draw(of_policies, PAIRS_TO_WEIGH_BY))
    to_prune_by = draw(encode(read_pairs(pairs), encoder), PAIRS_TO_PRUNE_BY)
    _, products = observe(trained, [pair[number % 2].ids for number, pair in enumerate(to_prune_by)])
    weights, changed = widen(checkpoint, tokenizer, counter, style, factor, products)
    output.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(trained / name, output / name)
    config = json.loads((trained / "config.json").read_text()) | changed | {"torch_dtype": "bfloat16"}
    (output / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    content = save(tensors, metadata={"format": "pt"})
    (output / "model.safetensors").write_bytes(content)
    print(f"{sum(tensor.numel() for tensor in tensors.values()):,} parameters, {len(content) / 1e6:.1f} MB in {output}")


if __name__ == "__main__":
    typer.run(main)
