"""Which units of a trained model's feed-forwards can go, and what the others then do in their place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polar_ray.model.polar import load_polar

UNITS_DROPPED_AT_ONCE = 16


def prune(products: Tensor, down: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Which units of a feed-forward to keep, and the `[width, kept]` weights that then come nearest to what it gave.

    `products` are mean products of the units' values, `[units, units]`. Least squares, backwards: the units go whose
    loss the others make up for best.
    """
    ridge = 1e-5 * products.diagonal().mean()
    wanted = products @ down.double().T
    units = torch.arange(len(products))
    while True:
        inverse = torch.linalg.inv(products[units][:, units] + ridge * torch.eye(len(units)))
        refitted = inverse @ wanted[units]
        if len(units) == kept:
            return units, refitted.T.float()
        loss = refitted.square().sum(1) / inverse.diagonal()
        units = units[loss.argsort()[min(UNITS_DROPPED_AT_ONCE, len(units) - kept) :].sort().values]


@torch.inference_mode()
def observe(folder: Path, sequences: Sequence[NDArray[np.int32]]) -> tuple[NDArray[np.float64], list[Tensor]]:
    """The rewards of sequences, and mean products of the units' values in every layer, `[units, units]`: over all
    tokens, in the last layer over the last ones."""
    model = load_polar(folder, dtype=torch.float32)
    layers = model.model.layers
    sums = [torch.zeros(layer.mlp.down_proj.in_features, layer.mlp.down_proj.in_features).double() for layer in layers]
    counts = [0] * len(layers)

    def add(number: int, values: Tensor) -> None:
        rows = values[0, -1:] if number == len(layers) - 1 else values[0]
        sums[number] += (rows.T @ rows).double()
        counts[number] += len(rows)

    for number, layer in enumerate(layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs, number=number: add(number, inputs[0]))
    rewards = [float(model(torch.from_numpy(ids.astype(np.int64))[None])) for ids in sequences]
    return np.array(rewards), [total / count for total, count in zip(sums, counts, strict=True)]
