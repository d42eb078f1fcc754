"""The page about a finished job: `report.html` beside its output, one file that needs nothing else to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from polar_ray.corpus.health_figures import draw_drift, shares_of_health, words_of_length
from polar_ray.corpus.history import Trace, trace
from polar_ray.corpus.rates import Area, draw_rates
from polar_ray.corpus.summary import LENGTH_BINS_PER_OCTAVE, UnitReport
from polar_ray.corpus.trend import Part
from polar_ray.health import REWARD_BIN
from polar_ray.report.page import Figure, Share, Tile, render_page
from polar_ray.report.plots import Bars, draw_histogram, gather, octave_ticks, quantile, value_ticks
from polar_ray.report.wording import clock, decimal, duration, meanings, number, percent, plural
from polar_ray.triples import STATUS_OK

NAMED_INPUTS = 3
"""Inputs named at the head of the page; of the others it gives the number."""


@dataclass(frozen=True)
class ReportFacts:
    """What the page says beside the counts: which job, and this run of it."""

    title: str
    model: str
    receipt: Mapping[str, object]
    receipt_id: str
    inputs: tuple[str, ...]
    started: float
    """Unix time at which this run began; earlier runs of the job may have done a part of the units."""

    finished: float
    wall_seconds: float
    actors: int


def write_report(total: UnitReport, facts: ReportFacts, parts: Sequence[Part] = ()) -> str:
    """The page, as HTML that is well-formed XML too. Changes nothing and reads nothing but its template."""
    history = trace(total.finished, total.seconds)
    return render_page(
        "polar_ray.corpus",
        facts=facts,
        named_inputs=facts.inputs[:NAMED_INPUTS],
        more_inputs=number(max(0, len(facts.inputs) - NAMED_INPUTS)),
        tiles=_tiles(total, facts),
        distributions=[_rewards(total), _spread(total), _lengths(total)],
        speeds=_speeds(history),
        work=_work(total),
        cuts=_cuts(total),
        drift=draw_drift(parts),
        signs=shares_of_health(total),
        lengths=words_of_length(total),
        failures=_failures(total),
        counts=_counts(total, facts),
    )


def _tiles(total: UnitReport, facts: ReportFacts) -> list[Tile]:
    encoded = sum(total.length_bins.values())
    return [
        Tile("rows", number(total.rows), plural(len(total.finished), "unit")),
        Tile(
            "rewarded",
            percent(total.ok / total.rows) if total.rows else "–",
            f"{number(total.failed)} without a reward" if total.failed else "none without a reward",
        ),
        Tile("tokens", number(total.tokens), f"{number(total.tokens / encoded)} a row" if encoded else "none encoded"),
        Tile("computed tokens", number(total.computed_tokens), f"{percent(_saved_share(total))} saved by sharing"),
        _speed_tile(total, facts),
        Tile("receipt", facts.receipt_id[:12], "same receipt, comparable rewards"),
    ]


def _speed_tile(total: UnitReport, facts: ReportFacts) -> Tile:
    """Rows of this run over its wall time, start-up included."""
    rows = sum(unit[1] for unit in total.finished if unit[0] >= facts.started)
    if not rows or facts.wall_seconds <= 0:
        return Tile("rows/s", "–", "this run had nothing left to score")
    part = "" if rows == total.rows else f"{number(rows)} rows in "
    note = f"{part}{duration(facts.wall_seconds)}, {plural(facts.actors, 'actor')}"
    return Tile("rows/s", number(rows / facts.wall_seconds), note)


def _rewards(total: UnitReport) -> Figure:
    title = "Rewards"
    mean, std, lowest, highest = total.reward_mean, total.reward_std, total.lowest_reward, total.highest_reward
    if mean is None or std is None or lowest is None or highest is None or not total.reward_bins:
        return Figure(title, Markup(""), "No row has a reward.")
    bars = gather(total.reward_bins)
    middle = min(max(quantile(total.reward_bins, 0.5) * REWARD_BIN, lowest), highest)
    drawing = draw_histogram(
        bars,
        title="Histogram of rewards",
        axis=f"reward, in steps of {bars.step * REWARD_BIN:g}",
        ticks=lambda low, high: value_ticks(low, high, REWARD_BIN),
        describe=_reward_range,
        counted="rows",
        markers={
            kind: value / REWARD_BIN
            for kind, value in (("mean", mean), ("median", middle))
            if bars.first <= value / REWARD_BIN <= bars.last
        },
    )
    span = f"From {decimal(lowest)} to {decimal(highest)}, standard deviation {decimal(std)}."
    note = (f"Every reward is {decimal(mean)}." if lowest == highest else span) + _tails(bars, "rows")
    return Figure(title, drawing, note, (("mean", f"mean {decimal(mean)}"), ("median", f"median ≈ {decimal(middle)}")))


def _lengths(total: UnitReport) -> Figure:
    title = "Lengths"
    if not total.length_bins:
        return Figure(title, Markup(""), "No row could be encoded.")
    bars = gather(total.length_bins)
    middle = quantile(total.length_bins, 0.5)
    drawing = draw_histogram(
        bars,
        title="Histogram of lengths in tokens",
        axis="tokens of a row, doubling",
        ticks=lambda low, high: octave_ticks(low, high, LENGTH_BINS_PER_OCTAVE),
        describe=lambda start, stop: f"{_tokens_at(start):,.0f} to {_tokens_at(stop):,.0f} tokens",
        counted="rows",
        markers={"median": middle},
        floor=0,
    )
    encoded = sum(total.length_bins.values())
    note = f"Prompt twice, reference and output; {number(total.tokens / encoded)} tokens a row on average."
    return Figure(title, drawing, note, (("median", f"median ≈ {number(round(_tokens_at(middle)))}"),))


def _spread(total: UnitReport) -> Figure:
    title, spread = "Spread within groups", total.spread
    if not spread.groups or not spread.bins:
        return Figure(title, Markup(""), "No two neighbouring rows with a reward share prompt and reference.")
    bars = gather({0: 0, **spread.bins})
    drawing = draw_histogram(
        bars,
        title="Histogram of the spread of rewards within groups",
        axis=f"highest less lowest reward, in steps of {bars.step * REWARD_BIN:g}",
        ticks=lambda low, high: value_ticks(low, high, REWARD_BIN),
        describe=_reward_range,
        counted="groups",
        base=spread.zero_groups,
        floor=0,
    )
    note = (
        f"Without spread: {percent(spread.zero_groups / spread.groups)} of {plural(spread.groups, 'group')}. "
        "Where all rewards of a group are equal, a group-relative trainer learns nothing from it."
    )
    legend = (("base", f"no spread: {number(spread.zero_groups)}"),) if spread.zero_groups else ()
    return Figure(title, drawing, note + _tails(bars, "groups"), legend)


def _speeds(history: Trace | None) -> list[Figure]:
    titles = ("Rows per second", "Tokens per second")
    if history is None:
        return [Figure(title, Markup(""), "No unit was finished.") for title in titles]
    pauses = sorted((float(pause) for pause in history.pauses if pause > 0), reverse=True)
    span = f"From {clock(history.starts[0])} to {clock(history.ends[-1])} UTC."
    if pauses:
        longest = "" if len(pauses) == 1 else ", the longest"
        span += f" {plural(len(pauses), 'pause')} without work{longest} of {duration(pauses[0])}, cut out (striped)."
    rows = draw_rates(history, [Area("rows", "rows/s", history.rows)], title="Rows per second over time")
    if not history.tokens.any():
        return [Figure(titles[0], rows, span), Figure(titles[1], Markup(""), "No row could be encoded.")]
    areas = [
        Area("all", "tokens/s of the rows", history.tokens),
        Area("computed", "tokens/s computed", history.computed_tokens),
    ]
    tokens = draw_rates(history, areas, title="Tokens per second over time")
    legend = (("all", "tokens of the rows"), ("computed", "computed"))
    gain = "What lies between the two was saved by sharing."
    return [Figure(titles[0], rows, span), Figure(titles[1], tokens, gain, legend)]


def _work(total: UnitReport) -> list[Share]:
    most = max(total.tokens, total.computed_tokens)
    saved = f"{percent(_saved_share(total))} saved: shared prefixes and {plural(total.duplicates, 'duplicate')} were "
    return [
        Share("tokens of the rows", _share(total.tokens, most), number(total.tokens)),
        Share(
            "computed",
            _share(total.computed_tokens, most),
            number(total.computed_tokens),
            f"{saved}computed once." if _saved_share(total) else "Nothing was shared.",
        ),
    ]


def _cuts(total: UnitReport) -> list[Share]:
    rows, tokens = _share(total.cut_rows, total.rows), _share(total.cut_tokens, total.tokens + total.cut_tokens)
    return [
        Share("rows cut", rows, f"{number(total.cut_rows)} ({percent(rows)})"),
        Share("tokens cut", tokens, f"{number(total.cut_tokens)} ({percent(tokens)})"),
    ]


def _failures(total: UnitReport) -> list[Share]:
    """A bar for each status but `ok`, the most frequent first, with what its code means."""
    meaning_of = meanings()
    failures = sorted(((count, code) for code, count in total.by_status.items() if code != STATUS_OK), reverse=True)
    return [
        Share(
            code,
            count / max(failures)[0],
            f"{count:,} ({percent(_share(count, total.rows))})",
            meaning_of.get(code, "A status that this version does not know."),
        )
        for count, code in failures
        if count
    ]


def _counts(total: UnitReport, facts: ReportFacts) -> dict[str, str]:
    mean, std = total.reward_mean, total.reward_std
    return {
        "rows": f"{total.rows:,}",
        **{f"rows, {code}": f"{count:,}" for code, count in sorted(total.by_status.items())},
        "rows cut": f"{total.cut_rows:,}",
        "rows with control tokens, removed": f"{total.control_token_rows:,}",
        "outputs that are the reference": f"{total.health.equal_echoes:,}",
        "outputs that hold a long reference": f"{total.health.contained_echoes:,}",
        "duplicates": f"{total.duplicates:,}",
        "tokens": f"{total.tokens:,}",
        "tokens computed": f"{total.computed_tokens:,}",
        "tokens cut": f"{total.cut_tokens:,}",
        "reward, mean": "–" if mean is None else decimal(mean),
        "reward, standard deviation": "–" if std is None else decimal(std),
        "reward, lowest": "–" if total.lowest_reward is None else decimal(total.lowest_reward),
        "reward, highest": "–" if total.highest_reward is None else decimal(total.highest_reward),
        "groups": f"{total.spread.groups:,}",
        "groups without spread": f"{total.spread.zero_groups:,}",
        "units": f"{len(total.finished):,}",
        "time of actors on units": duration(total.seconds),
        "of it in the engine": duration(total.engine_seconds),
        "this run, started": f"{clock(facts.started)} UTC",
        "this run, finished": f"{clock(facts.finished)} UTC",
        "this run, wall time": duration(facts.wall_seconds),
        "this run, actors": f"{facts.actors:,}",
        "inputs": f"{len(facts.inputs):,}",
    }


def _saved_share(total: UnitReport) -> float:
    """Share of the tokens that did not go through the model. Batches that failed and were tried again count twice."""
    return max(0.0, 1 - total.computed_tokens / total.tokens) if total.tokens else 0.0


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _tails(bars: Bars, counted: str) -> str:
    low, high = decimal(bars.first * REWARD_BIN), decimal(bars.last * REWARD_BIN)
    said = [f"{number(bars.below)} {counted} below {low}"] if bars.below else []
    said += [f"{number(bars.above)} {counted} above {high}"] if bars.above else []
    return f" The pale end bars also hold {' and '.join(said)}." if said else ""


def _reward_range(start: int, stop: int) -> str:
    return f"{decimal(start * REWARD_BIN)} to {decimal(stop * REWARD_BIN)}"


def _tokens_at(place: float) -> float:
    return float(2.0 ** (place / LENGTH_BINS_PER_OCTAVE))
