"""Time Hugging Face, CTranslate2 and ours in several precisions on a CPU, in turns, and their start.

Weights are random, of T5-base shapes; all contestants generate the same number of tokens. Each case is a record of one run, in which
every figure is a ratio to Hugging Face's class (eager, float32) of that run. A record replaces an older one of its case.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.cpu_contestant import Contestant
from t5_trt.tools.records import read_records, write_records

RESULTS = Path(__file__).resolve().parent / "results" / "cpu-peers.json"
BASE = "hf_eager_fp32"
CONTESTANTS = (BASE, "ctranslate2_fp32", "ours_fp32", "ours_bf16", "ctranslate2_int8", "ours_int8")
#: case -> its sizes
CASES = {
    "batch 1": {"batch": 1, "source_tokens": 32, "new_tokens": 99, "num_beams": 1},
    "batch 8": {"batch": 8, "source_tokens": 32, "new_tokens": 64, "num_beams": 1},
    "4 beams": {"batch": 1, "source_tokens": 32, "new_tokens": 64, "num_beams": 4},
    "source 512": {"batch": 8, "source_tokens": 512, "new_tokens": 64, "num_beams": 1},
}
START = "start"


def compared(times: dict[str, list[float]], tokens: dict[str, list[list[int]]]) -> dict[str, Any]:
    """The fields of a case's record.

    Args:
        times: contestant -> milliseconds of its calls.
        tokens: contestant -> its rows of tokens.

    Returns:
        Times Hugging Face by contestant; ours over CTranslate2 in the same precision; shares of tokens equal to Hugging Face's;
        medians in milliseconds.
    """
    medians = {name: statistics.median(found) for name, found in times.items()}
    rows = [(name, precision) for name in medians for kind, _, precision in [name.rpartition("_")] if kind == "ours"]
    return {
        "times_hf_eager": {name: round(medians[BASE] / ms, 2) for name, ms in medians.items() if name != BASE},
        "ours_over_ctranslate2": {
            precision: round(medians[f"ctranslate2_{precision}"] / medians[name], 2)
            for name, precision in rows
            if f"ctranslate2_{precision}" in medians
        },
        "equal_to_hf_eager": {name: equal_share(tokens[name], tokens[BASE]) for name in tokens if name != BASE},
        "ms": {name: round(ms, 1) for name, ms in medians.items()},
        "ms_least_and_most": {name: [round(min(found), 1), round(max(found), 1)] for name, found in times.items()},
    }


def equal_share(got: list[list[int]], expected: list[list[int]]) -> float:
    """Share of positions with the same token, of rows of the same lengths."""
    pairs = [pair for row, other in zip(got, expected, strict=True) for pair in zip(row, other, strict=True)]
    return round(sum(one == two for one, two in pairs) / len(pairs), 4)


def measured(contestants: dict[str, Contestant], case: str, runs: int) -> dict[str, Any]:
    """Time a case on all contestants, in turns, after a call of each that does not count."""
    from t5_trt.tools.random_models import random_source

    sizes = CASES[case]
    rows = random_source(sizes["batch"], sizes["source_tokens"]).tolist()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    cores: dict[str, list[float]] = {name: [] for name in contestants}
    tokens: dict[str, list[list[int]]] = {}
    for number in range(runs + 1):
        for name, contestant in contestants.items():
            ms, tokens[name] = contestant.generate(rows, sizes["new_tokens"], sizes["num_beams"])
            if number:
                times[name].append(ms)
                cores[name].append(contestant.cores)
    busy = {"busy_cores": {name: round(statistics.median(found), 2) for name, found in cores.items()}}
    return {"case": case, **sizes, "runs": runs, **compared(times, tokens), **busy}


def started(names: list[str], folder: Path, threads: int, runs: int) -> dict[str, Any]:
    """Starts in fresh processes, in turns, and the memory of the last one after 99 tokens, against the size of the weights.

    Ours in 8 bits starts once more, first, without stored matrices.
    """
    record: dict[str, Any] = {"case": START, "runs": runs}
    for name in names:
        if _is_stored(name):
            shutil.rmtree(folder / "store", ignore_errors=True)
            record[f"{name}_first"] = _start(name, folder, threads, generates=True)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(1, runs + 1):
        for name in names:
            record[name] = _start(name, folder, threads, generates=number == runs)
            times[name].append({field: record[name][field] for field in ("import_s", "load_s", "first_token_s")})
    for name, found in times.items():
        record[name] |= {field: round(statistics.median(each[field] for each in found), 2) for field in found[0]}
        record[name]["load_and_first_token_s"] = round(
            statistics.median(each["load_s"] + each["first_token_s"] for each in found), 2
        )
    return record


def _start(name: str, folder: Path, threads: int, *, generates: bool) -> dict[str, Any]:
    contestant = Contestant(name, folder, threads)
    found = dict(contestant.start)
    if generates:
        contestant.generate([list(range(2, 34))], 99, 1)
        weights = weights_mb(name, folder)
        found["weights_mb"] = round(weights, 1)
        now = {"peak": contestant.peak_mb - found["imports_mb"]}
        now["anonymous"] = contestant.anonymous_mb - found["imports_anonymous_mb"]
        for kind, above in now.items():
            found |= {f"{kind}_above_imports_mb": round(above, 1), f"{kind}_over_weights": round(above / weights, 2)}
    contestant.close()
    return found


def _is_stored(name: str) -> bool:
    """Whether our rounded matrices are kept on disk; those in bfloat16 are rounded by every process."""
    kind, _, precision = name.rpartition("_")
    return kind == "ours" and precision not in ("fp32", "bf16")


def weights_mb(name: str, folder: Path) -> float:
    """Size on disk of what a contestant loads, in 10**6 bytes; of ours in 8 bits, the matrices and no embedding."""
    place = "store" if _is_stored(name) else name if name.startswith("ctranslate2") else "model"
    return sum(path.stat().st_size for path in (folder / place).rglob("*") if path.is_file()) / 1e6


def prepare(folder: Path, shape: str, names: list[str]) -> None:
    """Write the checkpoint, CTranslate2's models and, by a first start, our 8-bit matrices."""
    from t5_trt.tools.ctranslate2_peer import compute_type_of, convert
    from t5_trt.tools.random_models import random_t5

    model = random_t5(shape)
    model.save_pretrained(folder / "model")
    for name in names:
        kind, _, precision = name.rpartition("_")
        if kind == "ctranslate2":
            (folder / name).mkdir()
            convert(model, folder / name, compute_type_of(precision, "cpu"))
        elif _is_stored(name):
            Contestant(name, folder, 1).close()


def store(file: Path, record: dict[str, Any]) -> None:
    """Put a record into a file in place of an older one of its case, atomically; cases stay in their order."""
    order = [*CASES, START]
    kept = [older for older in read_records(file) if older["case"] != record["case"]]
    write_records(file, sorted([*kept, record], key=lambda each: order.index(each["case"])))


def _record(file: Path, record: dict[str, Any]) -> None:
    store(file, record)
    print(json.dumps(record, indent=2), flush=True)


def main() -> None:
    """Command line: measure the cases, print them, and put them into the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="+", choices=[*CASES, START], default=[*CASES, START])
    parser.add_argument("--runs", type=int, default=5, help="of each contestant, in turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), help=f"{BASE} and others")
    parser.add_argument("--shape", default="t5-base")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument(
        "--folder", type=Path, help="of prepared models, made if it is missing; default: a temporary one"
    )
    args = parser.parse_args()
    from t5_trt.tools.environment import environment

    facts = {"model": f"{args.shape} shapes, random weights, seed 0", "threads": args.threads, **environment()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "made"
        if not folder.exists():
            prepare(folder, args.shape, args.contestants)
        if START in args.case:
            _record(args.json, started(args.contestants, folder, args.threads, args.runs) | facts)
        cases = [case for case in args.case if case != START]
        contestants = {name: Contestant(name, folder, args.threads) for name in args.contestants if cases}
        for case in cases:
            _record(args.json, measured(contestants, case, args.runs) | facts)
        for contestant in contestants.values():
            contestant.close()


if __name__ == "__main__":
    main()
