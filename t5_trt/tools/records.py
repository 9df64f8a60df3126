"""Records of `t5_trt.tools.benchmark`: in files, and as a table in a terminal.

Needs neither torch nor Transformers, so that a script can show old records quickly.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table
from rich.text import Text

from t5_trt.errors import InputError

Record = dict[str, Any]
OURS = "ours"
#: names in records -> names in tables
CTRANSLATE2 = {f"ctranslate2_{precision}": f"CT2 {precision}" for precision in ("fp32", "fp16", "bf16", "int8")}
RIVALS = {
    "hf_eager_fp32": "HF fp32",
    "hf_eager_fp16": "HF fp16",
    "hf_compiled_fp16": "HF compiled",
    **CTRANSLATE2,
}


def read_records(path: Path) -> list[Record]:
    """The records of a file; an empty list if there is no file.

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
    """Append records to a file, which is replaced atomically.

    Raises:
        InputError: as `read_records`.
    """
    write_records(path, [*read_records(path), *records])


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Replace a file by records, atomically."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def print_records(records: Sequence[Record], console: Console) -> None:
    """Print the records of one run as a table, with their common fields above and below it.

    Args:
        records: of one model on one machine, as `t5_trt.tools.benchmark.measure` returns them.
        console: 80 columns are enough.
    """
    first = records[0]
    on_gpu = first["backend"] != "onnxruntime"
    where = first["gpu_and_driver"] if on_gpu else f"{first['processor']}, CPU threads: {first['threads']}"
    console.print(Text(first["model"], style="bold"))
    steps = f", decoder steps by {first['decode']}" if on_gpu and "decode" in first else ""
    console.print(Text(f"{first['backend']} {first['precision']}{steps} on {where}"))
    console.print(Text(f"median and 90th percentile of {first['runs']} runs of the whole generate() call"))
    console.print()
    console.print(record_table(records, roomy=console.width >= 110))
    console.print()
    if any("speedup" in record and record["speedup"] is not None for record in records):
        console.print(Text("times as fast, tokens equal: against HF fp32, eager, in the same run"))
    for name, label in RIVALS.items():
        for reason in dict.fromkeys(record["left_out"][name] for record in records if name in record["left_out"]):
            console.print(Text(f"left out: {label}: {reason}"))
    for loop in sorted({record["loop"] for record in records}):
        console.print(Text(f"our loop: {loop}"))
    engines = f"TensorRT {first['tensorrt']}" if first["tensorrt"] else f"ONNX Runtime {first['onnxruntime']}"
    console.print(
        Text(f"Python {first['python']}, torch {first['torch']}, Transformers {first['transformers']}, {engines}")
    )


def record_table(records: Sequence[Record], *, roomy: bool = False) -> Table:
    """Records as a table of at most 80 columns, or wider with `roomy`: a row for each model of each case."""
    table = Table(box=HORIZONTALS, pad_edge=False, padding=(0, 1 if roomy else 0), show_edge=False)
    heads = ("batch", "source\ntokens", "new\ntokens", "beams", "model", "median\nms", "p90\nms", "tokens\nper s")
    for head in (*heads, "times\nas fast", "tokens\nequal", "first\ncall s"):
        table.add_column(head, justify="left" if head == "model" else "right", no_wrap=True, vertical="bottom")
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
    median, hugging_face = record[f"{name}_ms"], record.get("hf_eager_fp32_ms")
    equal: str | Text = ""
    found = record.get(f"{prefix}tokens_equal_share")
    if found is not None:
        share = int(found * 1000) / 10  # rounded down: 100% means all
        equal = Text("yes", style="green") if found == 1.0 else Text(f"{share:.1f}%", style="red")
    return [
        _short(median),
        _short(record[f"{name}_p90_ms"]),
        _short(record[f"{prefix}tokens_per_s"]),
        "" if hugging_face is None or name == "hf_eager_fp32" else f"{hugging_face / median:.2f}",
        equal,
        _short(record[f"{prefix}first_call_s"]),
    ]


def _short(number: float) -> str:
    """At most six characters."""
    if number >= 999999.5:
        return f"{number / 1e6:.3g}M"
    return f"{number:.0f}" if number >= 10000 else f"{number:.1f}" if number >= 100 else f"{number:.2f}"
