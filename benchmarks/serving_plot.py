"""A picture of the records of `benchmarks/serving_gpu.py`: tokens per second, and the time to the first token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5_trt.errors import InputError
from t5_trt.tools.plot import check_picture
from t5_trt.tools.records import Record

#: name in a record -> label and colour
WAYS = {"engine": ("t5_trt's engine", "#0072b2"), "static": ("static batches", "#d55e00")}
_WIDTH = 0.38


def draw_serving(records: Sequence[Record], path: Path) -> None:
    """Write a picture with two panels, and in each a group of bars for each case; of several records of a case the last one counts.

    Args:
        records: of the part "serving"; others are left out.
        path: ends in .png, .svg or .pdf.

    Raises:
        InputError: no record has a measurement of serving, or as `check_picture`.
        BackendError: as `check_picture`.
    """
    check_picture(path)
    cases = {_case(record): record["serving"] for record in records if "serving" in record}
    if not cases:
        raise InputError("the plot got no records of serving; expected some of `python -m benchmarks serving_gpu`.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(9.0, 3.6 * len(cases)), 4.4), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    rates, waits = figure.subplots(1, 2)
    for side, (way, (label, color)) in enumerate(WAYS.items()):
        places = [place + (side - 0.5) * _WIDTH for place in range(len(cases))]
        found = [made[way]["tokens_per_s"] for made in cases.values()]
        _label(rates, rates.bar(places, found, _WIDTH, color=color, label=label))
        firsts = [made[way]["first_token_ms"] for made in cases.values()]
        p95 = [first["p95"] for first in firsts]
        _label(waits, waits.bar(places, p95, _WIDTH, color=color, alpha=0.45))
        waits.bar(places, [first["p50"] for first in firsts], _WIDTH, color=color)
    titles = {
        rates: "tokens per second\nwith more arrivals than can be served",
        waits: "ms to the first token: p50, and p95 in light\nwith arrivals at 0.7 of what the engine can serve",
    }
    for panel, title in titles.items():
        panel.set_title(title, fontsize=10)
        panel.set_xticks(range(len(cases)), list(cases))
        panel.grid(axis="y", color="#dddddd", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    waits.set_yscale("log")
    rates.margins(y=0.12)
    waits.margins(y=0.15)
    figure.legend(*rates.get_legend_handles_labels(), loc="outside lower center", ncols=len(WAYS), frameon=False)
    first = next(record for record in records if "serving" in record)
    processor = (first.get("gpu_and_driver") or first["processor"]).partition(",")[0]
    figure.suptitle(f"Serving {first['model'].partition(',')[0]} in {first['precision']}, {processor}", fontsize=12)
    # without the program's name, so that equal records give equal bytes
    figure.savefig(path, metadata={"Software": None} if path.suffix.lower() == ".png" else None)


def _case(record: Record) -> str:
    stage = record["stage"].replace(", ", "\n")
    return f"{record['batch']} clients\n{stage}\n{record['backend']}"


def _label(panel: Any, bars: Any) -> None:
    panel.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=2)
