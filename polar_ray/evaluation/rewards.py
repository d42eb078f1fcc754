"""`rewards.parquet`: the values behind an evaluation's figures, a row for each pair, or for each labelled triple.

No texts: a row says which row of which input it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from polar_ray.evaluation.baselines import BASELINES, MODEL
from polar_ray.evaluation.blocks import Measured
from polar_ray.receipts import Receipt
from polar_ray.triples import Scored

BY_PREFIX = "by_"
"""Before the name of a column of `by`, which could be one of ours."""


def rewards_table(measured: Measured, scored: Sequence[Scored], receipt: Receipt) -> pa.Table:
    """The table, its types written out and its receipt in the metadata.

    Pairs have the rewards, the status of both outputs and every method's margin; triples the label, the reward and
    every baseline's value. A value that could not be had is null.
    """
    make = _of_pairs if measured.sample.layout == "pairs" else _of_triples
    columns = make(measured, scored)
    metadata = {"polar_ray.receipt": receipt.model_dump_json(), "polar_ray.receipt_id": receipt.receipt_id}
    return pa.table(columns, metadata=metadata)


def to_parquet(table: pa.Table) -> pa.Buffer:
    """The table as a file's bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _of_pairs(measured: Measured, scored: Sequence[Scored]) -> dict[str, pa.Array]:
    sample = measured.sample
    better, worse = sample.better, sample.worse
    every = np.ones(len(better), np.bool_)
    return {
        **_origin(measured, better),
        "chosen_place": pa.array(sample.place_of[better], pa.int32()),
        "rejected_place": pa.array(sample.place_of[worse], pa.int32()),
        "chosen_reward": _rewards(measured, better),
        "rejected_reward": _rewards(measured, worse),
        "chosen_status": _statuses(scored, better),
        "rejected_status": _statuses(scored, worse),
        "margin": _numbers(measured.margins(MODEL.name, every)),
        **{f"{method.name}_margin": _numbers(measured.margins(method.name, every)) for method in BASELINES},
        **_by(measured, better),
    }


def _of_triples(measured: Measured, scored: Sequence[Scored]) -> dict[str, pa.Array]:
    every = np.arange(len(scored))
    return {
        **_origin(measured, every),
        "label": _numbers(measured.sample.labels),
        "reward": _rewards(measured, every),
        "status": _statuses(scored, every),
        **{method.name: _numbers(measured.values[method.name]) for method in BASELINES},
        **_by(measured, every),
    }


def _origin(measured: Measured, places: NDArray[np.int64]) -> dict[str, pa.Array]:
    """Which row of which input, and the group that the bootstrap draws it with."""
    sample = measured.sample
    inputs = [sample.inputs[file] for file in sample.file_of[places].tolist()]
    return {
        "input": pa.array(inputs, pa.string()),
        "row": pa.array(sample.row_of[places], pa.int64()),
        "group": pa.array(sample.group_of[places], pa.int64()),
    }


def _by(measured: Measured, places: NDArray[np.int64]) -> dict[str, pa.Array]:
    return {
        f"{BY_PREFIX}{column}": pa.array([values[place] for place in places.tolist()], pa.string())
        for column, values in measured.sample.values.items()
    }


def _rewards(measured: Measured, places: NDArray[np.int64]) -> pa.Array:
    return pa.array(measured.values[MODEL.name][places].astype(np.float32), pa.float32(), from_pandas=True)


def _numbers(values: NDArray[np.float64]) -> pa.Array:
    return pa.array(values, pa.float64(), from_pandas=True)


def _statuses(scored: Sequence[Scored], places: NDArray[np.int64]) -> pa.Array:
    return pa.array([scored[place].status for place in places.tolist()], pa.string())
