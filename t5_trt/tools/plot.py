"""A picture of records of `t5_trt.tools.benchmark`: latency against batch, source tokens, new tokens and beams.

Needs matplotlib, which is imported when a picture is drawn, but no display.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5_trt.errors import BackendError, InputError
from t5_trt.tools.records import CTRANSLATE2, OURS, RIVALS, Record

PICTURES = (".png", ".svg", ".pdf")
AXES = {"batch": "batch", "source_tokens": "source tokens", "new_tokens": "new tokens", "num_beams": "beams"}
#: fields that distinguish records of the same case
FACTS: tuple[str, ...] = (
    "model",
    "backend",
    "precision",
    "decode",
    "prepack_weights",
    "do_sample",
    "source",
    "threads",
)
FACTS += ("processor", "gpu_and_driver")
LEGEND = {
    "hf_eager_fp32": "Hugging Face, eager, float32",
    "hf_eager_fp16": "Hugging Face, eager, float16",
    "hf_compiled_fp16": "Hugging Face, static cache and torch.compile, float16",
    **{name: name.replace("ctranslate2_", "CTranslate2, ") for name in CTRANSLATE2},
}
#: a shade and a marker for each line of a model, distinguishable without colours
_LOOKS = {
    OURS: (("#0072b2", "o"), ("#56b4e9", "^"), ("#003c5f", "v"), ("#009e73", "<"), ("#7fd3c1", ">")),
    "hf_eager_fp32": (("#d55e00", "s"), ("#f0a468", "D"), ("#7a3600", "P"), ("#b8860b", "X")),
    "hf_eager_fp16": (("#cc79a7", "D"), ("#e8b7d2", "P"), ("#7d3f62", "X")),
    "hf_compiled_fp16": (("#6b6b6b", "P"), ("#a8a8a8", "X"), ("#2b2b2b", "d")),
    **dict.fromkeys(CTRANSLATE2, (("#8c510a", "*"), ("#c9a15a", "p"), ("#543005", "h"))),
}


def check_picture(path: Path) -> None:
    """Check that `draw_records` can write a picture, before anything is measured.

    Raises:
        InputError: the ending is none of `PICTURES`, or the folder is missing.
        BackendError: matplotlib is not installed.
    """
    if path.suffix.lower() not in PICTURES or not path.parent.is_dir():
        raise InputError(
            f"the plot got {str(path)!r}; expected a file in a folder that exists, ending in .png, .svg or .pdf."
        )
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        message = f"plots need matplotlib, which does not import here ({error}). Install it with "
        raise BackendError(message + '`pip install "t5-trt[bench]"`.') from error


def draw_records(records: Sequence[Record], path: Path, *, rates: bool = False) -> None:
    """Write a picture of median latency: a panel for each of batch, new tokens, beams and source tokens that varies.

    A panel shows cases that differ only in its axis; of several such sets, the one with the most points. Later records replace earlier
    ones of the same case.

    Args:
        records: at least one; models, precisions and machines become separate lines.
        path: ends in .png, .svg or .pdf.
        rates: also a row of panels with tokens per second, of all rows of a batch together.

    Raises:
        InputError: there are no records, or as `check_picture`.
        BackendError: as `check_picture`.
    """
    check_picture(path)
    if not records:
        raise InputError("the plot got no records; expected at least one. Measure a case first.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [
        {"decode": "engine", **record} for record in records
    ]  # older records lack the field: this was the only kind
    axes = [axis for axis in AXES if axis != "source_tokens" or not _of_texts(records)]
    varying = [axis for axis in axes if len({record[axis] for record in records}) > 1] or ["batch"]
    size = (max(6.4, 4.8 * len(varying)), 9.2 if rates else 5.2)
    figure = Figure(figsize=size, dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1 + rates, len(varying), squeeze=False)
    differing = [fact for fact in FACTS if len({str(record.get(fact)) for record in records}) > 1]
    looks = _looks(records, differing)
    shown: dict[str, Any] = {}
    for row, rate in zip(panels, (False, True), strict=False):
        for panel, axis in zip(row, varying, strict=True):
            shown |= _draw_panel(panel, axis, _comparable(records, axis, axes), looks, differing, rate=rate)
    shown = {label: shown[label] for _, label in looks if label in shown}
    titles = [str(value) for value in dict.fromkeys(record["model"] for record in records)]
    figure.suptitle(f"generate() of {', '.join(titles)}" if len(titles) < 3 else "generate()", fontsize=12)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(2, len(shown)), frameon=False)
    # without the program's name, so that equal records give equal bytes
    metadata = {"Software": None} if path.suffix.lower() == ".png" else None
    figure.savefig(path, metadata=metadata)


def _of_texts(records: Sequence[Record]) -> bool:
    """Whether sources are texts, whose length depends on the batch."""
    return any(record.get("source") == "texts" for record in records)


def _comparable(records: Sequence[Record], axis: str, axes: Sequence[str]) -> list[Record]:
    """The largest set of records that differ only in this axis; small cases first."""
    groups: dict[tuple[int, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[other] for other in axes if other != axis), []).append(record)
    return groups[min(groups, key=lambda key: (-len({record[axis] for record in groups[key]}), key))]


def _looks(records: Sequence[Record], differing: Sequence[str]) -> dict[tuple[str, str], dict[str, str]]:
    """(Name of a model in records, its label) -> style of its line in all panels; ours first."""
    looks: dict[tuple[str, str], dict[str, str]] = {}
    for name in (OURS, *RIVALS):
        labels = sorted({_label(record, name, differing) for record in records if f"{name}_ms" in record})
        for number, label in enumerate(labels):
            color, marker = _LOOKS[name][number % len(_LOOKS[name])]
            looks[name, label] = {"color": color, "marker": marker}
    return looks


def _label(record: Record, name: str, differing: Sequence[str]) -> str:
    label = f"t5_trt, {record['precision']}" if name == OURS else LEGEND[name]
    ours_only = ("backend", "precision", "decode", "prepack_weights")
    for fact in differing:
        value = record.get(fact)
        if fact == "precision" or (name != OURS and fact in ours_only) or value in (None, False):
            continue
        words = {"prepack_weights": "prepacked weights", "do_sample": "sampling", "threads": f"{value} threads"}
        words["decode"] = f"steps by {value}"
        label += f", {words.get(fact, value)}"
    return label


def _tokens_per_s(record: Record, name: str) -> float:
    return float(record["batch"] * record["new_tokens"] / record[f"{name}_ms"] * 1e3)


def _draw_panel(
    panel: Any, axis: str, records: Sequence[Record], looks: Any, differing: Sequence[str], *, rate: bool = False
) -> dict[str, Any]:
    handles: dict[str, Any] = {}
    values_shown: list[float] = []
    for name, label in looks:
        points = {
            record[axis]: _tokens_per_s(record, name) if rate else record[f"{name}_ms"]
            for record in records
            if f"{name}_ms" in record and _label(record, name, differing) == label
        }
        if points:
            found = [points[value] for value in sorted(points)]
            handles[label] = panel.plot(sorted(points), found, linewidth=2, markersize=7, **looks[name, label])[0]
            values_shown += found
    values = sorted({record[axis] for record in records})
    if values[-1] >= 8 * values[0]:
        panel.set_xscale("log", base=2)
    if max(values_shown) > 20 * min(values_shown):
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)
    panel.set_xticks(values, [str(value) for value in values])
    panel.minorticks_off()
    panel.set_xlabel("batch (rows)" if axis == "batch" else AXES[axis])
    panel.set_ylabel("tokens per second" if rate else "median time of the whole call (ms)")
    fixed = {label: records[0][other] for other, label in AXES.items() if other != axis}
    if _of_texts(records):
        fixed["source tokens"] = "of texts"
    panel.set_title(", ".join(f"{label} {value}" for label, value in fixed.items()), fontsize=9)
    panel.grid(color="#dddddd", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    return handles
