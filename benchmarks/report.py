"""Fill README.md's tables and pictures from the records in ``benchmarks/results``, so that no number is typed by hand.

The text between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->`` is replaced for every name in `SECTIONS`. A name that
README.md does not have is reported and left out. With ``--check`` nothing is written; the status is 1 if README.md, or
a picture it should show, is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from t5_trt.bench_plot import draw_records
from t5_trt.bench_records import Record, read_records
from t5_trt.errors import InputError, T5TRTError

RESULTS = ROOT / "benchmarks" / "results"
CPU_RECORDS, CPU_PLOT_RECORDS = "cpu-onnxruntime.json", "cpu-bench.json"
GPU_RECORDS = "h100-trt8.5.3.json"
#: stages of `benchmarks/h100_loops.py` whose records are in the table, and the one that is drawn
GPU_STAGES, GPU_CURVES = ("h100_loops loops", "h100_loops compiled"), "h100_loops curves"
#: names in records of a GPU -> columns
GPU_TIMES = {
    "hf_eager_fp32_ms": "Transformers fp32 ms",
    "hf_eager_fp16_ms": "Transformers fp16 ms",
    "hf_compiled_fp16_ms": "compiled fp16 ms",
    "ours_ms": "t5_trt ms",
}
PICTURES = "docs/images"
COLUMNS = ("model", "precision", "batch", "beams", "processor", "Transformers ms", "t5_trt ms", "times as fast")


def speed_table(records: Sequence[Record]) -> str:
    """A markdown table of the records that have both times; of several for one row the last one counts."""
    compared = [record for record in records if record.get("ours_ms") and record.get("hf_eager_fp32_ms")]
    sizes = {(record["source_tokens"], record["new_tokens"]) for record in compared}
    rows: dict[tuple[str, ...], tuple[str, ...]] = {}
    for record in compared:
        model = record["model"].split(",")[0]
        if len(sizes) > 1:
            model += f", {record['source_tokens']} + {record['new_tokens']} tokens"
        if record.get("do_sample"):
            model += ", sampling"
        precision = record["precision"] + (", prepacked weights" if record.get("prepack_weights") else "")
        key = (model, precision, str(record["batch"]), str(record["num_beams"]), record["processor"])
        stock, ours = record["hf_eager_fp32_ms"], record["ours_ms"]
        rows[key] = (*key, f"{stock:.0f}", f"{ours:.0f}", f"{stock / ours:.2f}")
    lines = [COLUMNS, tuple("---" if column in COLUMNS[:2] + COLUMNS[4:5] else "---:" for column in COLUMNS)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [*lines, *rows.values()])


def gpu_speed_table(records: Sequence[Record]) -> str:
    """A markdown table of whole calls on a GPU: ours, and Transformers eager and compiled; the last record of a case counts."""
    cases: dict[tuple[int, int, int], Record] = {}
    for record in records:
        if record.get("stage") in GPU_STAGES:
            case = cases.setdefault((record["batch"], record["num_beams"], record["new_tokens"]), {})
            case |= {name: record[name] for name in GPU_TIMES if name in record}
    columns = ("batch", "beams", "new tokens", *GPU_TIMES.values(), "times as fast", "tokens per s")
    lines = [columns, ("---:",) * len(columns)]
    for (batch, beams, tokens), case in cases.items():
        if "ours_ms" in case and "hf_eager_fp32_ms" in case:
            times = [f"{case[name]:.0f}" if name in case else "" for name in GPU_TIMES]
            ours = case["ours_ms"]
            ratios = (f"{case['hf_eager_fp32_ms'] / ours:.1f}", f"{batch * tokens / ours * 1e3:.0f}")
            lines.append((str(batch), str(beams), str(tokens), *times, *ratios))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gpu_speed(readme: Path, write: bool) -> str:
    """The table of times on a GPU."""
    return gpu_speed_table(read_records(RESULTS / GPU_RECORDS))


def cpu_speed(readme: Path, write: bool) -> str:
    """The table of times on CPUs."""
    return speed_table(read_records(RESULTS / CPU_RECORDS))


def cpu_speed_plot(readme: Path, write: bool) -> str:
    """The picture of times on CPUs, and the line that shows it."""
    return _picture(readme, write, "cpu-speed.png", "CPUs", read_records(RESULTS / CPU_PLOT_RECORDS))


def gpu_speed_plot(readme: Path, write: bool) -> str:
    """The picture of times on a GPU, and the line that shows it."""
    records = read_records(RESULTS / GPU_RECORDS)
    curves = [record for record in records if record.get("stage") == GPU_CURVES]
    return _picture(readme, write, "gpu-speed.png", "an H100", curves)


def _picture(readme: Path, write: bool, name: str, where: str, records: Sequence[Record]) -> str:
    """Draw records into a file beside the README."""
    picture = readme.parent / PICTURES / name
    if write:
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw_records(records, picture)
    elif not picture.exists():
        return "the picture is missing"  # differs from any README
    return f"![Time of generate() on {where}]({PICTURES}/{name})"


SECTIONS: dict[str, Callable[[Path, bool], str]] = {
    "cpu-speed": cpu_speed,
    "cpu-speed-plot": cpu_speed_plot,
    "gpu-speed": gpu_speed,
    "gpu-speed-plot": gpu_speed_plot,
}


def filled(readme: Path, write: bool) -> tuple[str, list[str]]:
    """The README as it should be, and the names of sections that it does not have.

    Raises:
        InputError: a section begins more than once, or does not end.
    """
    text, missing = readme.read_text(encoding="utf-8"), []
    for name, make in SECTIONS.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        if begin not in text and end not in text:
            missing.append(name)
            continue
        parts = re.findall(f"{re.escape(begin)}.*?{re.escape(end)}", text, flags=re.DOTALL)
        if len(parts) != 1 or text.count(begin) != 1 or text.count(end) != 1:
            raise InputError(
                f"{readme.name} got markers of {name!r} that do not pair; expected one {begin} before one {end}."
            )
        text = text.replace(parts[0], f"{begin}\n{make(readme, write)}\n{end}")
    return text, missing


def main() -> None:
    """Rewrite, or with --check compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the README is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args()
    try:
        text, missing = filled(args.readme, write=not args.check)
    except T5TRTError as error:
        sys.exit(f"error: {error}")
    for name in missing:
        print(f"{args.readme.name} has no <!-- begin: {name} --> and <!-- end: {name} -->; that section is left out")
    if text == args.readme.read_text(encoding="utf-8"):
        print(f"{args.readme.name} is up to date")
    elif args.check:
        sys.exit(f"{args.readme.name} is out of date; run python benchmarks/report.py")
    else:
        args.readme.write_text(text, encoding="utf-8")
        print(f"{args.readme.name} is rewritten")


if __name__ == "__main__":
    main()
