"""Run all measurements of TensorRT's engines on a GPU, in calls of at most ten minutes, and keep their records.

    python -m benchmarks.engine_session smoke --out FOLDER     is all captured that ought to be? A minute before the rest
    python -m benchmarks.engine_session soak --out FOLDER      soak and GPU tests side by side
    python -m benchmarks.engine_session builds --out FOLDER    engines of the next part side by side, and T5-base that overflows
    python -m benchmarks.engine_session measure --out FOLDER   whole calls, parts of a call and equal text, one after the other
    python -m benchmarks.engine_session shapes --out FOLDER    other batches and lengths, small models that overflow
    python -m benchmarks.engine_session rest --out FOLDER      full GPU memory, and torch.compile's times
    python -m benchmarks.engine_session choices --out FOLDER   a step's product of queries and keys, in several forms
    python -m benchmarks.engine_session keep FOLDER            put the records of a folder into benchmarks/results

A part runs lanes side by side and the commands of a lane one after the other. What has not ended when the time is up is killed;
records that it has made by then are kept. FOLDER gets records.json and log.txt; soak.json comes with a later part.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.lanes import STORE, TESTS, Run
from t5_trt.tools.records import Record, read_records, write_records

RESULTS, SOAK = ROOT / "benchmarks" / "results" / "h100-trt8.5.3.json", "h100-soak.json"
#: records that agree in these are of one case: the newer one replaces the older one
CASE = ("stage", "model", "precision", "batch", "num_beams", "source_tokens", "new_tokens", "cache_tokens", "form")
#: Python without TensorRT's environment around it
PLAIN = "env -u PYTHONHOME -u PYTHONPATH -u LD_LIBRARY_PATH python3"
LOOPS_SMOKE = "{python} benchmarks/engine_calls.py smoke --store {store}/smoke"

#: part -> steps one after the other -> lanes side by side -> commands; {python}, {store} and {json} are filled in
PARTS: dict[str, list[list[list[str]]]] = {
    "smoke": [[[f"{TESTS} tests/gpu/test_recording.py"], [LOOPS_SMOKE]]],
    "soak": [
        [
            [  # in a session of its own: it may outlive this call a little
                "setsid {python} benchmarks/soak.py --backend tensorrt --minutes 8 --store {store}/soak --json {store}/soak.json "
                "> {store}/soak.log 2>&1 &"
            ],
            *(
                [f"{TESTS} tests/gpu -k '{which}' --durations=12"]
                for which in ("not too_little_memory and not fp16", "fp16")
            ),
            [LOOPS_SMOKE],
        ]
    ],
    "builds": [
        [
            [
                "{python} benchmarks/engine_calls.py build --store {store}",
                "{python} benchmarks/engines.py build --precision fp32 --store {store}",
            ],
            ["{python} benchmarks/engine_text.py shipped-build --precision fp16 --store {store}"],
            [
                "{python} benchmarks/engines.py families --precision fp32 --store {store}",
                "{python} benchmarks/engine_text.py shipped-build --precision fp32 --store {store}",
            ],
            [
                f"{{python}} benchmarks/engine_text.py {stage} --precision fp16 --store {{store}}/overflow --json {{json}}"
                for stage in ("overflow-stream", "overflow-inner")
            ],
        ]
    ],
    "measure": [
        [
            [
                "{python} benchmarks/engine_calls.py loops --store {store} --json {json}",
                "{python} benchmarks/engine_text.py shipped --precision fp16 --store {store} --json {json}",
                "{python} benchmarks/engines.py base --precision fp16 --store {store} --json {json}",
                "{python} benchmarks/engines.py base --precision fp32 --store {store} --json {json}",
                "{python} benchmarks/engines.py families --precision fp32 --store {store} --json {json}",
                "{python} benchmarks/engine_calls.py long --store {store} --json {json}",
                "{python} benchmarks/engine_text.py shipped --precision fp32 --store {store} --json {json}",
            ]
        ]
    ],
    "shapes": [
        [
            ["{python} benchmarks/engine_calls.py build-curves --store {store}"],
            ["{python} benchmarks/engine_text.py overflow --precision fp16 --store {store}/overflow --json {json}"],
        ],
        [["{python} benchmarks/engine_calls.py curves --store {store} --json {json}"]],
    ],
    "choices": [[["{python} benchmarks/experiments/key_product.py scores --store {store}/scores --json {json}"]]],
    "rest": [
        [
            [
                f"{TESTS} tests/gpu -k too_little_memory",
                f"{PLAIN} benchmarks/engine_calls.py compiled --json {{json}}",
            ]
        ]
    ],
}


def collect(run: Run) -> None:
    """Put all records into one file and all logs into another, remove the rest, and add what the soak has left so far."""
    parts = sorted(run.out.glob("*-*.json"))
    write_records(run.out / "records.json", [record for path in parts for record in read_records(path)])
    for path in parts:
        path.unlink()
    logs = sorted(run.out.glob("*.log"))
    texts = [path.read_text(errors="replace") for path in logs]
    (run.out / "log.txt").write_text("\n".join([*run.summary, *texts]))
    for path in logs:
        path.unlink()
    for path in STORE.glob("soak.*"):
        shutil.copy(path, run.out)


def run_part(part: str, out: Path, minutes: float) -> None:
    """Run one of `PARTS` in at most that time."""
    out.mkdir(parents=True, exist_ok=True)
    STORE.mkdir(mode=0o700, parents=True, exist_ok=True)
    run = Run(out.resolve(), time.monotonic() + minutes * 60)
    for number, lanes in enumerate(PARTS[part]):
        threads = [
            threading.Thread(target=run.lane, args=(f"{part}-{number}-{lane}", commands))
            for lane, commands in enumerate(lanes)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    collect(run)


def merged(old: list[Record], new: list[Record]) -> list[Record]:
    """Old records with new ones in the places of those of the same case, and the others behind them.

    New records that say how long their sources were also replace those of their stage, model and precision that did not.
    """
    renewed = {tuple(map(record.get, CASE[:3])) for record in new if "source_tokens" in record}
    old = [record for record in old if "source_tokens" in record or tuple(map(record.get, CASE[:3])) not in renewed]
    cases = {tuple(map(record.get, CASE)): record for record in old}
    return list((cases | {tuple(map(record.get, CASE)): record for record in new}).values())


def keep(folder: Path) -> None:
    """Put a folder's records into the results."""
    records, soak = folder / "records.json", folder / "soak.json"
    if records.is_file():
        write_records(RESULTS, merged(read_records(RESULTS), read_records(records)))
    if soak.is_file():
        RESULTS.with_name(SOAK).write_text(soak.read_text())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "keep"])
    parser.add_argument("folder", nargs="?", type=Path, help="with keep: what a part wrote")
    parser.add_argument("--out", type=Path, help="folder for records and logs")
    parser.add_argument("--minutes", type=float, default=9.5)
    args = parser.parse_args()
    if (args.folder if args.part == "keep" else args.out) is None:
        parser.error("keep needs FOLDER" if args.part == "keep" else f"{args.part} needs --out FOLDER")
    keep(args.folder) if args.part == "keep" else run_part(args.part, args.out, args.minutes)


if __name__ == "__main__":
    main()
