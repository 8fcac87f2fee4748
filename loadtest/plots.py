"""The report's pictures, from results alone. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from hdrh.histogram import HdrHistogram
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from loadtest.results import Json
from loadtest.statistics import Floats

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
TITLES = {"ttft_s": "TTFT", "itl_s": "ITL", "tpot_s": "TPOT", "e2e_s": "E2E"}
NINES = (0, 50, 90, 99, 99.9, 99.99)

mpl.rcParams |= {"svg.hashsalt": "loadtest", "svg.fonttype": "none", "axes.grid": True, "grid.alpha": 0.3}


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawn figure, what to call it, and what a reader who cannot see it should know."""

    name: str
    title: str
    figure: Figure


def draw(results: Sequence[Json], labels: Sequence[str]) -> list[Plot]:
    """Latency curves of all results together, throughput against latency, and a timeline of each."""
    plots = [Plot("latency", "Latency by percentile", _latencies(results, labels))]
    if sum(len(result.get("stages", [result])) for result in results) > 1:
        plots.append(Plot("throughput", "Throughput against latency", _throughput(results, labels)))
    for number, (result, label) in enumerate(zip(results, labels, strict=True)):
        summaries = [result] if result.get("headline_stage") is None else result["stages"]
        for stage, summary in enumerate(summaries):
            if summary["timeline"]["start_s"]:
                title = f"Timeline of {label}" + (f", stage {stage}" if len(summaries) > 1 else "")
                plots.append(Plot(f"timeline-{number}-{stage}", title, _timeline(summary)))
    return plots


def _groups(results: Sequence[Json], labels: Sequence[str]) -> Iterator[tuple[str, Json]]:
    for result, label in zip(results, labels, strict=True):
        prefix = f"{label}: " if len(results) > 1 else ""
        yield f"{prefix}overall", result["overall"]
        for name, group in result["by_variant"].items():
            yield f"{prefix}{name}", group


def _latencies(results: Sequence[Json], labels: Sequence[str]) -> Figure:
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(2, 2).flat, TITLES.items(), strict=True):
        for number, (name, group) in enumerate(_groups(results, labels)):
            if group[metric]["count"]:
                shares, values_ms = _curve(group[metric]["histogram"])
                axes.step(_nines(shares), values_ms, where="pre", label=name, color=_colour(number))
        _percentile_axis(axes)
        axes.set(title=title)
        _milliseconds_axis(axes, "ms")
        if axes.lines:
            axes.legend(fontsize="small")
    return figure


def _curve(encoded: str) -> tuple[Floats, Floats]:
    """Shares in percent and the latency, in ms, that each does not exceed; the last stops where the samples do."""
    counts = HdrHistogram.decode(encoded)
    steps = [(item.total_count_to_this_value, item.value_iterated_to) for item in counts.get_recorded_iterator()]
    reached, values = np.asarray(steps, dtype=float).T
    total = counts.get_total_count()
    return 100 * np.minimum(reached, total - 0.5) / total, values / 1e3


def _nines(shares: Floats | Sequence[float]) -> Floats:
    """Each further nine takes the same room, so that the tail is as wide as the body."""
    nines: Floats = -np.log10(1 - np.asarray(shares, dtype=float) / 100)
    return nines


def _percentile_axis(axes: Axes) -> None:
    axes.set_xticks(_nines(NINES), [f"p{share:g}" for share in NINES])
    axes.set_xlim(0, 4.2)


def _milliseconds_axis(axes: Axes, label: str) -> None:
    """Logarithmic where the values span more than a decade."""
    axes.set(ylabel=label)
    if axes.dataLim.ymax > 10 * axes.dataLim.minposy:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _throughput(results: Sequence[Json], labels: Sequence[str]) -> Figure:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (result, label) in enumerate(zip(results, labels, strict=True)):
        stages = sorted(
            (stage["overall"] for stage in result.get("stages", [result])), key=lambda group: group["requests_per_s"]
        )
        for axes, rate in ((left, "requests_per_s"), (right, "tokens_per_s")):
            _latency_over(axes, stages, rate, label, _colour(number))
        for key, marker in (("knee", "o"), ("highest_meeting_slo", "*")):
            if (found := result.get(key)) is not None:
                at_s = result["stages"][found["stage"]]["overall"]["e2e_s"]["p99"] or 0.0
                name = f"{label}: {key.replace('_', ' ')}"
                left.plot(found["requests_per_s"], at_s * 1e3, marker, ms=12, mfc="none", c=_colour(number), label=name)
    left.set(xlabel="requests/s")
    right.set(xlabel="tokens/s")
    for axes in (left, right):
        _milliseconds_axis(axes, "E2E, ms")
        if axes.lines:
            axes.legend(fontsize="small")
    return figure


def _latency_over(axes: Axes, stages: Sequence[Json], rate: str, label: str, colour: str) -> None:
    known = [group for group in stages if group["e2e_s"]["count"]]
    for percentile, style in (("p50", ".-"), ("p99", ".--")):
        at = [group["e2e_s"][percentile] * 1e3 for group in known]
        if known:
            axes.plot([group[rate] for group in known], at, style, color=colour, label=f"{label} {percentile}")


def _timeline(summary: Json) -> Figure:
    columns = summary["timeline"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    rates, waiting, latency = figure.subplots(3, 1, sharex=True)
    at_s = columns["start_s"]
    for axes, name in ((rates, "due_per_s"), (rates, "completed_per_s"), (rates, "failed_per_s")):
        axes.step(at_s, columns[name], where="post", label=name.removesuffix("_per_s"))
    waiting.step(at_s, columns["in_flight"], where="post", label="due and not yet answered")
    for name, title in (
        ("ttft_p50_s", "TTFT p50"),
        ("ttft_p99_s", "TTFT p99"),
        ("e2e_p50_s", "E2E p50"),
        ("e2e_p99_s", "E2E p99"),
    ):
        values_ms = [np.nan if value is None else value * 1e3 for value in columns[name]]
        latency.step(at_s, values_ms, where="post", label=title)
    rates.set(ylabel="requests/s")
    waiting.set(ylabel="requests")
    latency.set(xlabel="seconds")
    _milliseconds_axis(latency, "ms, of those due then")
    start_s, end_s = columns["window_s"]
    for axes in (rates, waiting, latency):
        _shade(axes, (min(at_s), start_s))
        _shade(axes, (end_s, max(at_s) + columns["slice_s"]))
        axes.legend(fontsize="small", loc="upper left")
    return figure


def _shade(axes: Axes, span_s: tuple[float, float]) -> None:
    """What lies outside the measured window."""
    if span_s[1] > span_s[0]:
        axes.axvspan(*span_s, color="0.85", zorder=0)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
