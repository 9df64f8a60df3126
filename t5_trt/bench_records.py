"""Records of `t5_trt.benchmarking`: files of them, as a table in a terminal, as a picture. Nothing is measured here.

It needs neither torch nor Transformers, so that a script can show old records at once; matplotlib is imported by the
pictures only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import HORIZONTALS
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from t5_trt.errors import BackendError, InputError

Record = dict[str, Any]
OURS = "ours"
#: names in records -> names in tables and pictures
RIVALS = {"hf_eager_fp32": "HF fp32", "hf_eager_fp16": "HF fp16", "hf_compiled_fp16": "HF compiled"}
LEGEND = {
    "hf_eager_fp32": "Hugging Face, eager, float32",
    "hf_eager_fp16": "Hugging Face, eager, float16",
    "hf_compiled_fp16": "Hugging Face, static cache and torch.compile, float16",
}
AXES = {"batch": "batch (rows)", "new_tokens": "new tokens", "num_beams": "beams", "source_tokens": "source tokens"}
#: what makes two records of one case different things
FACTS = ("model", "backend", "precision", "prepack_weights", "do_sample", "source", "threads", "processor")
FACTS += ("gpu_and_driver",)
PICTURES = (".png", ".svg", ".pdf")
_COLORS = {"hf_eager_fp32": "#d55e00", "hf_eager_fp16": "#cc79a7", "hf_compiled_fp16": "#6b6b6b", OURS: "#0072b2"}
_MARKERS, _STYLES = "osD^vP", ("-", "--", ":", "-.")


def read_records(path: Path) -> list[Record]:
    """The records of a file; none if there is no file.

    Raises:
        InputError: the file is not a JSON list of objects, or its folder is missing.
    """
    if not path.parent.is_dir():
        raise InputError(f"the file got {str(path)!r}; its folder does not exist. Make it first, or name another file.")
    try:
        records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read as JSON ({error}). Name another file, or mend it.") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{str(path)!r} holds something else than a JSON list of records. Name another file.")
    return records


def append_records(path: Path, records: Sequence[Record]) -> None:
    """Add records to the end of a file, which is replaced as a whole.

    Raises:
        InputError: as `read_records`.
    """
    text = json.dumps([*read_records(path), *records], indent=2) + "\n"
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def print_records(records: Sequence[Record], console: Console) -> None:
    """Print the records of one run as a table, with what holds for all of them above and below it.

    Args:
        records: of one model on one machine, as `t5_trt.benchmarking.measure` returns them.
        console: 80 columns are enough.
    """
    first = records[0]
    where = first["gpu_and_driver"] or f"{first['processor']}, {first['threads']} threads"
    console.print(Text(first["model"], style="bold"))
    console.print(Text(f"{first['backend']} {first['precision']} on {where}"))
    console.print(Text(f"median and 90th percentile of {first['runs']} runs of the whole generate() call"))
    console.print(Padding(record_table(records, roomy=console.width >= 110), (1, 0)))
    if any("speedup" in record and record["speedup"] is not None for record in records):
        console.print(Text("times as fast, tokens equal: against HF fp32, eager, in the same run"))
    for name, reason in sorted({item for record in records for item in record["left_out"].items()}):
        console.print(Text(f"left out: {RIVALS[name]}: {reason}"))
    for loop in sorted({record["loop"] for record in records}):
        console.print(Text(f"our loop: {loop}"))
    engines = f"TensorRT {first['tensorrt']}" if first["tensorrt"] else f"ONNX Runtime {first['onnxruntime']}"
    console.print(Text(f"Python {first['python']}, torch {first['torch']}, Transformers {first['transformers']}, {engines}"))


def record_table(records: Sequence[Record], *, roomy: bool = False) -> Table:
    """Records as a table of at most 80 columns, or wider with `roomy`: a row for each model of each case."""
    table = Table(box=HORIZONTALS, pad_edge=False, padding=(0, 1 if roomy else 0), show_edge=False)
    heads = ("batch", "source\ntokens", "new\ntokens", "beams", "model", "median\nms", "p90\nms", "tokens\nper s")
    for head in (*heads, "times as\nfast", "tokens\nequal", "first\ncall s"):
        table.add_column(head, justify="left" if head == "model" else "right", no_wrap=True, vertical="top")
    for record in records:
        case = [str(record[axis]) for axis in ("batch", "source_tokens", "new_tokens", "num_beams")]
        for name, label in (*RIVALS.items(), (OURS, f"t5_trt {record['precision']}")):
            if f"{name}_ms" in record:
                table.add_row(*case, label, *_cells(record, name), style="bold" if name == OURS else None)
                case = [""] * len(case)
        table.add_section()
    return table


def _cells(record: Record, name: str) -> list[str | Text]:
    prefix = "" if name == OURS else f"{name}_"
    median, stock = record[f"{name}_ms"], record.get("hf_eager_fp32_ms")
    equal: str | Text = ""
    if name == OURS and record["tokens_equal"] is not None:
        share = int(record["tokens_equal_share"] * 1000) / 10  # cut: 100% means all
        equal = Text("yes", style="green") if record["tokens_equal"] else Text(f"{share:.1f}%", style="red")
    return [
        _short(median),
        _short(record[f"{name}_p90_ms"]),
        _short(record[f"{prefix}tokens_per_s"]),
        "" if stock is None or name == "hf_eager_fp32" else f"{stock / median:.2f}",
        equal,
        f"{record[f'{prefix}first_call_s']:.1f}",
    ]


def _short(number: float) -> str:
    """At most six characters below a million."""
    return f"{number:.0f}" if number >= 10000 else f"{number:.1f}" if number >= 100 else f"{number:.2f}"


def check_picture(path: Path) -> None:
    """Refuse what `draw_records` could not write, before anything is measured.

    Raises:
        InputError: the ending is none of `PICTURES`, or the folder is missing.
        BackendError: matplotlib is not installed.
    """
    if path.suffix.lower() not in PICTURES or not path.parent.is_dir():
        raise InputError(f"the plot got {str(path)!r}; expected a file in a folder that exists, ending in .png, .svg or .pdf.")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        message = f"plots need matplotlib, which does not import here ({error}). Install it with "
        raise BackendError(message + '`pip install "t5-trt[bench]"`.') from error


def draw_records(records: Sequence[Record], path: Path) -> None:
    """Write a picture of median latency: a panel for each of batch, new tokens, beams and source tokens that varies.

    A panel shows the cases that differ in its axis only; of those that leave a choice, the ones with the most points.
    Later records replace earlier ones of the same case.

    Args:
        records: with at least one; those of other models, precisions and machines become lines of their own.
        path: ends in .png, .svg or .pdf.

    Raises:
        InputError: there are no records, or as `check_picture`.
        BackendError: as `check_picture`.
    """
    check_picture(path)
    if not records:
        raise InputError("the plot got no records; expected at least one. Measure a case first.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    varying = [axis for axis in AXES if len({record[axis] for record in records}) > 1] or ["batch"]
    figure = Figure(figsize=(max(6.4, 4.8 * len(varying)), 5.2), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(varying), squeeze=False)[0]
    shown: dict[str, Any] = {}
    for panel, axis in zip(panels, varying, strict=True):
        shown |= _draw_panel(panel, axis, _comparable(records, axis), _labels(records))
    titles = [str(value) for value in dict.fromkeys(record["model"] for record in records)]
    figure.suptitle(f"generate() of {', '.join(titles)}" if len(titles) < 3 else "generate()", fontsize=12)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(2, len(shown)), frameon=False)
    # without the name of the program: the same records give the same bytes
    metadata = {"Software": None} if path.suffix.lower() == ".png" else None
    figure.savefig(path, metadata=metadata)


def _comparable(records: Sequence[Record], axis: str) -> list[Record]:
    """The records that agree in all other axes, where that leaves the most values of this one; small cases first."""
    groups: dict[tuple[int, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[other] for other in AXES if other != axis), []).append(record)
    return groups[min(groups, key=lambda key: (-len({record[axis] for record in groups[key]}), key))]


def _labels(records: Sequence[Record]) -> list[str]:
    """The facts that differ between records and so belong into the legend."""
    return [fact for fact in FACTS if len({str(record.get(fact)) for record in records}) > 1]


def _draw_panel(panel: Any, axis: str, records: Sequence[Record], differing: Sequence[str]) -> dict[str, Any]:
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for record in records:
        for name in (*RIVALS, OURS):
            if f"{name}_ms" in record:
                label = _label(record, name, differing)
                lines.setdefault((name, label), {})[record[axis]] = record[f"{name}_ms"]
    handles, drawn = {}, dict.fromkeys((*RIVALS, OURS), 0)
    for (name, label), points in sorted(lines.items(), key=lambda line: (line[0][0] != OURS, line[0])):
        values = sorted(points)
        style = {"color": _COLORS[name], "linewidth": 2, "markersize": 6}
        style |= {"marker": _MARKERS[drawn[name] % 6], "linestyle": _STYLES[drawn[name] % 4]}
        handles[label] = panel.plot(values, [points[value] for value in values], **style)[0]
        drawn[name] += 1
    values = sorted({record[axis] for record in records})
    times = [value for points in lines.values() for value in points.values()]
    if len(values) > 1 and values[-1] >= 8 * values[0]:
        panel.set_xscale("log", base=2)
    if max(times) > 20 * min(times):
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)
    panel.set_xticks(values, [str(value) for value in values])
    panel.minorticks_off()
    panel.set_xlabel(AXES[axis])
    panel.set_ylabel("median time of the whole call (ms)")
    others = (f"{records[0][other]} {word}" for other, word in _WORDS.items() if other != axis)
    panel.set_title(", ".join(others), fontsize=9)
    panel.grid(color="#dddddd", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    return handles


_WORDS = {"batch": "rows", "source_tokens": "source tokens", "new_tokens": "new tokens", "num_beams": "beams"}


def _label(record: Record, name: str, differing: Sequence[str]) -> str:
    label = f"t5_trt, {record['precision']}" if name == OURS else LEGEND[name]
    ours_only = ("backend", "precision", "prepack_weights")
    for fact in differing:
        value = record.get(fact)
        if fact == "precision" or (name != OURS and fact in ours_only) or value in (None, False):
            continue
        words = {"prepack_weights": "prepacked weights", "do_sample": "sampling", "threads": f"{value} threads"}
        label += f", {words.get(fact, value)}"
    return label
