"""Time Hugging Face, CTranslate2 and ours in several precisions on a CPU, in turns in one process, and their start-up.

Weights are random, of T5-base shapes; all contestants generate the same number of tokens. Each case is a record of one run, in
which every figure is a ratio to Hugging Face's class (eager, float32) of that run. A record replaces an older one of its case.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.cpu_start import CONTESTANTS as STARTED
from benchmarks.cpu_start import start_record
from t5_trt.tools.records import read_records, write_records

RESULTS = Path(__file__).resolve().parent / "results" / "cpu-peers.json"
#: case -> its sizes
CASES = {
    "batch 1": {"batch": 1, "source_tokens": 32, "new_tokens": 99, "num_beams": 1},
    "batch 8": {"batch": 8, "source_tokens": 32, "new_tokens": 64, "num_beams": 1},
    "4 beams": {"batch": 1, "source_tokens": 32, "new_tokens": 64, "num_beams": 4},
    "source 512": {"batch": 8, "source_tokens": 512, "new_tokens": 64, "num_beams": 1},
}
START = "start"
#: precisions of ours beside float32, and of CTranslate2
OURS, THEIRS = ("int8",), ("fp32", "int8")


def compared(record: dict[str, Any]) -> dict[str, Any]:
    """The ratios of one case.

    Args:
        record: of `t5_trt.tools.benchmark.measure`, with ours in float32 as "ours" and in other precisions as "ours_int8".

    Returns:
        Times Hugging Face by contestant; ours over CTranslate2 in float32 and int8; shares of tokens equal to Hugging Face's.
    """
    base = record["hf_eager_fp32_ms"]
    named = {name: "ours_fp32" if name == "ours" else name for name in _contestants(record)}
    times = {named[name]: round(base / record[f"{name}_ms"], 2) for name in named}
    shares = {
        named[name]: record["tokens_equal_share" if name == "ours" else f"{name}_tokens_equal_share"] for name in named
    }
    over = {
        precision: round(record[f"ctranslate2_{precision}_ms"] / record[f"{ours}_ms"], 2)
        for precision, ours in (("fp32", "ours"), ("int8", "ours_int8"))
        if f"ctranslate2_{precision}_ms" in record and f"{ours}_ms" in record
    }
    return {"times_hf_eager": times, "ours_over_ctranslate2": over, "equal_to_hf_eager": shares}


def _contestants(record: dict[str, Any]) -> list[str]:
    names = [field.removesuffix("_ms") for field in record if field.endswith("_ms") and not field.endswith("_p90_ms")]
    return [name for name in names if name != "hf_eager_fp32"]


def measured(case: str, runs: int, threads: int, ours: list[str], shape: str) -> dict[str, Any]:
    """Time a case; see the module.

    Args:
        case: a key of `CASES`.
        runs: of each contestant, in turns.
        threads: of each contestant.
        ours: precisions of ours beside float32.
        shape: a key of `t5_trt.tools.random_models.SHAPES`.
    """
    from t5_trt import TRTT5ForConditionalGeneration
    from t5_trt.tools.benchmark import Baseline, Case, load_benchmark, measure
    from t5_trt.tools.ctranslate2_peer import CTranslate2Model

    benchmark = load_benchmark(f"random:{shape}", threads=threads, backend="onnxruntime")
    hugging_face = benchmark.baselines["hf_eager_fp32"].model
    for precision in ours:
        benchmark.baselines[f"ours_{precision}"] = Baseline(
            TRTT5ForConditionalGeneration.from_model(
                hugging_face, num_threads=threads, backend="onnxruntime", precision=precision
            )
        )
    for precision in THEIRS:
        benchmark.baselines[f"ctranslate2_{precision}"] = Baseline(
            CTranslate2Model(hugging_face, precision, benchmark.ours.device, threads)
        )
    benchmark.left_out.clear()
    record = measure(benchmark, Case(**CASES[case]), runs)
    return {"case": case, **compared(record), **record}


def store(file: Path, record: dict[str, Any]) -> None:
    """Put a record into a file in place of an older one of its case, atomically; cases stay in their order."""
    order = [*CASES, START]
    kept = [older for older in read_records(file) if older["case"] != record["case"]]
    write_records(file, sorted([*kept, record], key=lambda each: order.index(each["case"])))


def started(threads: int, shape: str, ours: list[str]) -> dict[str, Any]:
    """Start-up and memory of each contestant, each in a process of its own."""
    from t5_trt.tools.environment import environment
    from t5_trt.tools.random_models import random_t5

    record: dict[str, Any] = {"case": START, "model": f"{shape} shapes, random weights, seed 0", "threads": threads}
    with tempfile.TemporaryDirectory() as folder:
        random_t5(shape).save_pretrained(f"{folder}/model")
        for name in STARTED:
            if name.startswith("ours_") and name not in ("ours_fp32", *(f"ours_{each}" for each in ours)):
                continue
            environ = {**os.environ, "T5_TRT_CACHE": f"{folder}/store-{name}"}
            command = [sys.executable, "-m", "benchmarks.cpu_start", name, folder, "--threads", str(threads)]
            for stage in ("prepare", "run"):
                done = subprocess.run([*command, stage], env=environ, check=True, capture_output=True, text=True)
            record[name] = json.loads(done.stdout)
    return start_record(record) | environment()


def main() -> None:
    """Command line: measure the cases, print them, and put them into the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="+", choices=[*CASES, START], default=[*CASES, START])
    parser.add_argument("--runs", type=int, default=5, help="of each contestant, in turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ours", nargs="*", default=list(OURS), help="precisions of ours beside fp32")
    parser.add_argument("--shape", default="t5-base")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    for case in args.case:
        if case == START:
            record = started(args.threads, args.shape, args.ours)
        else:
            record = measured(case, args.runs, args.threads, args.ours, args.shape)
        store(args.json, record)
        print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
