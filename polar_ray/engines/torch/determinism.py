"""Which numbers of rows a machine's products may have for a row's bits to depend on that row alone.

A matrix product sums each row in an order that may change with the number of rows and with the place of the row among
them. What a kernel does is no promise of its library, so it is tried: with the weights' own shapes, in every place of
every number of rows that is then used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polar_ray.engines.torch.decoder import Decoder
from polar_ray.engines.torch.layout import Segment, Span
from polar_ray.errors import EngineStartError

STEP_TOKENS = 64
"""Numbers of rows are multiples of this: at most so many less one are computed for nothing in a batch."""

DISTINCT_ROWS = 16
"""Of a trial; that a wrong order goes unseen takes that it gives the same bits in every element of all of them."""


def even_lengths(decoder: Decoder, hidden_size: int, device: torch.device) -> tuple[int, ...]:
    """Numbers of rows, rising, whose rows have the bits that they have in a whole chunk, which is the last of them.

    Raises `EngineStartError` where a row's bits depend on its place in a whole chunk, or on the number of threads.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(DISTINCT_ROWS, hidden_size, generator=generator).to(device)
    whole = decoder.chunk_tokens
    by_row, attended = _try(decoder, rows, whole)
    if by_row is None:
        raise EngineStartError(
            f"engine.deterministic: on this machine a row's product depends on its place among {whole}{_advice(device)}"
        )
    if device.type == "cpu" and (threads := torch.get_num_threads()) > 1:
        torch.set_num_threads(1)
        try:
            by_row_alone, attended_alone = _try(decoder, rows, whole)
        finally:
            torch.set_num_threads(threads)
        if not (_same_bits(by_row_alone, by_row) and torch.equal(attended_alone, attended)):
            raise EngineStartError(
                f"engine.deterministic: on this machine {threads} threads round otherwise than one{_advice(device)}"
            )
    sizes = range(STEP_TOKENS, whole, STEP_TOKENS)
    return (*(size for size in sizes if _same_bits(_try(decoder, rows, size)[0], by_row)), whole)


def fill_up(n_rows: int, lengths: Sequence[int]) -> int:
    """The fewest rows, `n_rows` at least, that are whole chunks and one of `lengths`."""
    chunks, rest = divmod(n_rows, lengths[-1])
    return chunks * lengths[-1] + (next(length for length in lengths if length >= rest) if rest else 0)


def _try(decoder: Decoder, rows: Tensor, size: int) -> tuple[Tensor | None, Tensor]:
    """What each of `rows` comes to in a chunk of `size` filled with them, None if that depends on its place; and the
    attention of the whole chunk."""
    everything = Span(0, size)
    filled = rows.repeat(-(-size // len(rows)), 1)[:size]
    by_row, attended = decoder.first_layer(filled, [Segment(everything, everything)])
    first = by_row[: len(rows)]
    same = torch.equal(by_row, first.repeat(-(-size // len(rows)), 1)[:size])
    return (first if same else None), attended


def _same_bits(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and torch.equal(found, expected)


def _advice(device: torch.device) -> str:
    return "; set engine.threads = 1" if device.type == "cpu" else ""
