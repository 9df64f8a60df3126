"""Fill the tables and pictures of README.md and README.ja.md from the records in ``benchmarks/results``.

The text between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->`` is replaced for every name in `SECTIONS`. A name that
a file does not have is reported and left out. With ``--check`` nothing is written; the status is 1 if a file, or
a picture it should show, is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.serving_plot import draw_serving
from t5_trt.errors import InputError, T5TRTError
from t5_trt.tools.plot import draw_records
from t5_trt.tools.records import Record, read_records

RESULTS = ROOT / "benchmarks" / "results"
CPU_RECORDS, CPU_PLOT_RECORDS = "cpu-onnxruntime.json", "cpu-bench.json"
#: of `benchmarks/kernel_session.py`; as long as there are none, the first ones of the backend "cuda"
KERNEL_RECORDS = "h200.json"
#: who else runs T5 in the precision of ours: names in records, less precision and unit -> names in the table
PEERS = {"hf_compiled": "Hugging Face compiled", "hf_eager": "Hugging Face eager", "ctranslate2": "CTranslate2"}
READMES = (ROOT / "README.md", ROOT / "README.ja.md")
PICTURES = "docs/images"
COLUMNS = (
    "model", "precision", "batch", "beams", "processor", "Hugging Face eager fp32 ms", "t5_trt ms", "times as fast",
)  # fmt: skip
GPU_COLUMNS = (
    "batch",
    "source tokens",
    "new tokens",
    "t5_trt ms",
    "fastest peer",
    "its ms",
    "times as fast",
    "tokens per s",
)


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
        eager, ours = record["hf_eager_fp32_ms"], record["ours_ms"]
        rows[key] = (*key, f"{eager:.0f}", f"{ours:.0f}", f"{eager / ours:.2f}")
    lines = [COLUMNS, tuple("---" if column in COLUMNS[:2] + COLUMNS[4:5] else "---:" for column in COLUMNS)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [*lines, *rows.values()])


def gpu_peers_table(records: Sequence[Record]) -> str:
    """A markdown table of what `benchmarks/curves.py` measured: ours beside the fastest of `PEERS` in the same precision and run."""
    lines = [GPU_COLUMNS, tuple("---" if column == "fastest peer" else "---:" for column in GPU_COLUMNS)]
    curves = [record for record in records if record.get("part") == "curves"]
    for record in sorted(curves, key=lambda each: (each["source_tokens"], each["new_tokens"], each["batch"])):
        peers = [(record[f"{name}_fp16_ms"], shown) for name, shown in PEERS.items() if f"{name}_fp16_ms" in record]
        if "ours_ms" in record and peers:
            ours, (fastest, peer) = record["ours_ms"], min(peers)
            sizes = (str(record[name]) for name in ("batch", "source_tokens", "new_tokens"))
            times = f"{fastest / ours:.1f}", f"{record['batch'] * record['new_tokens'] / ours * 1e3:.0f}"
            lines.append((*sizes, f"{ours:.1f}", peer, f"{fastest:.0f}", *times))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gpu_peers(readme: Path, write: bool) -> str:
    """The table of times on an H200 beside the fastest peer."""
    return gpu_peers_table(read_records(RESULTS / KERNEL_RECORDS))


def cuda_speed(readme: Path, write: bool) -> str:
    """The table of times of the decoder's kernels on an H200."""
    return kernel_speed_table(read_records(RESULTS / KERNEL_RECORDS))


def kernel_speed_table(records: Sequence[Record]) -> str:
    """A markdown table of what `benchmarks/decode.py` measured: the kernels, with either encoder, beside TensorRT's step in the same run.

    A row for each case and version of Python, because TensorRT is there on one of them only; what a run did not measure is a dash.
    """
    columns = (
        "batch", "beams", "new tokens", "kernels, TensorRT's encoder ms", "kernels, backend cuda ms", "TensorRT's step ms", "times as fast as that",
        "a step of kernels us", "with its choice us", "TensorRT's with its choice us", "tokens per s",
    )  # fmt: skip
    cases: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        if record.get("part") == "decode" and record.get("ours_ms"):
            case = (record["batch"], record["num_beams"], record["new_tokens"], record["python"])
            cases.setdefault(case, {})[record["backend"]] = record
    lines: list[tuple[str, ...]] = [columns, ("---:",) * len(columns)]
    for (batch, beams, tokens, _), by_backend in cases.items():
        beside, alone, engine = (by_backend.get(name, {}) for name in ("tensorrt-kernels", "cuda", "tensorrt-engine"))
        ours = beside or alone
        if not ours:
            continue
        whole, peer = ours["ours_ms"], engine.get("ours_ms")
        lines.append((
            str(batch), str(beams), str(tokens), _number(beside.get("ours_ms"), 1), _number(alone.get("ours_ms"), 1), _number(peer, 1),
            _number(peer and peer / whole, 1), _number(ours["step_us"].get("alone")), _number(ours["step_us"].get("with choice")),
            _number(engine.get("step_us", {}).get("with choice")), f"{batch * tokens / whole * 1e3:.0f}",
        ))  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def cpu_speed(readme: Path, write: bool) -> str:
    """The table of times on CPUs."""
    return speed_table(read_records(RESULTS / CPU_RECORDS))


def cpu_speed_plot(readme: Path, write: bool) -> str:
    """The picture of times on CPUs, and the line that shows it."""
    return _picture(
        readme, write, "cpu-speed.png", "Time of generate() on CPUs", read_records(RESULTS / CPU_PLOT_RECORDS)
    )


def serving_plot(readme: Path, write: bool) -> str:
    """The picture of serving on a GPU, and the line that shows it."""
    records = [record for record in read_records(RESULTS / KERNEL_RECORDS) if record.get("part") == "serving"]
    return _picture(readme, write, "serving.png", "Serving on an H200", records, draw_serving)


def gpu_curves(readme: Path, write: bool) -> str:
    """The picture of whole calls on an H200 over batch, source length and new tokens, and the line that shows it."""
    records = [record for record in read_records(RESULTS / KERNEL_RECORDS) if record.get("part") == "curves"]
    return _picture(
        readme,
        write,
        "gpu-curves.png",
        "generate() on an H200 beside its peers",
        records,
        partial(draw_records, rates=True),
    )


def _picture(
    readme: Path,
    write: bool,
    name: str,
    shown: str,
    records: Sequence[Record],
    draw: Callable[[Sequence[Record], Path], None] = draw_records,
) -> str:
    """Draw records into a file beside the README."""
    picture = readme.parent / PICTURES / name
    if write:
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(records, picture)
    elif not picture.exists():
        return "the picture is missing"  # differs from any README
    return f"![{shown}]({PICTURES}/{name})"


SECTIONS: dict[str, Callable[[Path, bool], str]] = {
    "cpu-speed": cpu_speed,
    "cpu-speed-plot": cpu_speed_plot,
    "gpu-peers": gpu_peers,
    "cuda-speed": cuda_speed,
    "gpu-curves": gpu_curves,
    "serving-plot": serving_plot,
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


def update(readme: Path, check: bool) -> bool:
    """Rewrite a README, or with `check` only look; whether it is up to date afterwards."""
    text, missing = filled(readme, write=not check)
    for name in missing:
        print(f"{readme.name} has no <!-- begin: {name} --> and <!-- end: {name} -->; that section is left out")
    if text == readme.read_text(encoding="utf-8"):
        print(f"{readme.name} is up to date")
    elif check:
        print(f"{readme.name} is out of date; run python benchmarks/report.py", file=sys.stderr)
        return False
    else:
        readme.write_text(text, encoding="utf-8")
        print(f"{readme.name} is rewritten")
    return True


def main() -> None:
    """Rewrite, or with --check compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a README is out of date")
    parser.add_argument("--readme", type=Path, nargs="+", default=READMES)
    args = parser.parse_args()
    try:
        current = [update(readme, args.check) for readme in args.readme]
    except T5TRTError as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if all(current) else 1)


if __name__ == "__main__":
    main()
