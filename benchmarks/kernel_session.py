"""Run all checks of the decoder's kernels on a GPU, in calls of at most ten minutes, and keep their records.

    python -m benchmarks.kernel_session tests --out FOLDER       GPU tests that need no TensorRT, side by side
    python -m benchmarks.kernel_session engines --out FOLDER     GPU tests of TensorRT
    python -m benchmarks.kernel_session speed --out FOLDER       steps, whole calls, captures, the first call of a process
    python -m benchmarks.kernel_session tokens --out FOLDER      tokens against Hugging Face
    python -m benchmarks.kernel_session sanitize --out FOLDER    memory errors and races
    python -m benchmarks.kernel_session keep FOLDER [FOLDER ...] put the records of folders into benchmarks/results/h200.json

Every part runs on Python with TensorRT and without (`engines` needs it). ``--small`` tries a part on few layers and sentences.
The terminal gets a summary; FOLDER keeps logs and records.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.lanes import STORE, TESTS, Run
from t5_trt.tools.records import Record, read_records, write_records

RESULTS = ROOT / "benchmarks" / "results" / "h200.json"
#: records that agree in these are of one case: the newer one replaces the older one
CASE = (
    "part", "python", "backend", "model", "precision", "batch", "num_beams", "source_tokens", "new_tokens", "positions", "tool", "stage",
    "search",
)  # fmt: skip
BARE_TESTS = (
    "test_kernels.py",
    "test_kernel_shapes.py",
    "test_wide_products.py",
    "test_encoder_kernels.py",
    "test_packed_sources.py",
    "test_cuda_backend.py",
    "test_int8.py",
    "test_parity_cuda.py",
    "test_adapters.py",
    "test_serving.py",
    "test_token_choice.py",
    "test_positions.py",
    "test_two_gpus.py",
)
ENGINE_TESTS = ("test_background_builds.py", "test_recording.py", "test_decode_loop.py", "test_tensorrt.py")
#: building engines keeps one core busy each; more processes than this wait for the GPU
SIDE_BY_SIDE = (
    "T5_TRT_TEST_STORE={store}/tests {python} -m pytest -q -n 8 --dist worksteal -rf --durations=12 -W default"
)


def tests(names: Sequence[str]) -> list[list[str]]:
    """A lane for each file of GPU tests."""
    return [[f"{TESTS} tests/gpu/{name} --durations=3"] for name in names]


#: part -> lanes side by side -> commands one after the other; {python}, {store} and {out} are filled in, {small} with --small
PARTS: dict[str, list[list[str]]] = {
    "tests": tests(BARE_TESTS),
    "engines": [
        [
            f"{SIDE_BY_SIDE} -m 'gpu and not whole_gpu' {' '.join(f'tests/gpu/{name}' for name in ENGINE_TESTS)}",
            f"{TESTS} -m whole_gpu tests/gpu",
        ]
    ],
    "speed": [
        [
            "{python} -m benchmarks.decode --out {out} {layers}",
            "{python} -m benchmarks.decode_first --out {out} {layers}",
            "{python} -m benchmarks.encoder --out {out} {layers}",
            "{python} -m benchmarks.positions --out {out} {layers}",
            "{python} -m benchmarks.token_choice --out {out} {layers}",
        ]
    ],
    "tokens": [
        ["{python} -m benchmarks.kernel_tokens rows --out {out} {layers}"],
        ["{python} -m benchmarks.kernel_tokens shipped --out {out} {sentences}"],
        ["{python} -m benchmarks.kernel_tokens families --out {out}"],
    ],
    "sanitize": [["{python} -m benchmarks.sanitize --out {out}"]],
}
SMALL = {"{layers}": "--layers 2", "{sentences}": "--sentences 40"}
#: lines of a log that a summary shows
SHOWN = (
    " passed",
    " failed",
    "FAILED ",
    "ERROR ",
    "Error: ",
    "generate ",
    "ratio",
    "_equal=",
    "SUMMARY",
    "first_token_s",
    "against",
)
LINES_SHOWN = 24


def commands(part: str, *, small: bool) -> list[list[str]]:
    """The lanes of a part; braces of `lanes.Run` are left."""
    made = []
    for lane in PARTS[part]:
        made.append([])
        for command in lane:
            for name, words in SMALL.items():
                command = command.replace(name, words if small else "")
            made[-1].append(command.strip())
    return made


def run_part(part: str, out: Path, minutes: float, *, small: bool = False) -> bool:
    """Run a part in at most that time; whether all of it ended well."""
    out.mkdir(parents=True, exist_ok=True)
    STORE.mkdir(mode=0o700, parents=True, exist_ok=True)
    run = Run(out.resolve(), time.monotonic() + minutes * 60)
    lanes = commands(part, small=small)
    threads = [threading.Thread(target=run.lane, args=(f"{part}-{number}", lane)) for number, lane in enumerate(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for path in sorted(out.glob(f"{part}-*.log")):
        for line in digest(path.read_text(errors="replace")):
            print(f"  {path.stem}: {line}")
    return all(line.split()[0] == "0" for line in run.summary)


def digest(log: str) -> list[str]:
    """The lines of a log that matter: the last ones of those that are `SHOWN`, or its end."""
    lines = [line[:240] for line in log.splitlines()[1:] if line.strip()]
    return [line for line in lines if any(mark in line for mark in SHOWN)][-LINES_SHOWN:] or lines[-5:]


def merged(old: Sequence[Record], new: Sequence[Record]) -> list[Record]:
    """Old records with new ones in the places of those of the same `CASE`, and the others behind them."""
    return list({tuple(str(record.get(name)) for name in CASE): record for record in [*old, *new]}.values())


def keep(folders: Sequence[Path], results: Path = RESULTS) -> int:
    """Put the records of folders into the results; how many they had."""
    found = [record for folder in folders for path in sorted(folder.glob("*.json")) for record in read_records(path)]
    write_records(results, merged(read_records(results), found))
    return len(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; the status is 1 if something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "keep"])
    parser.add_argument("folders", nargs="*", type=Path, help="with keep: what parts wrote")
    parser.add_argument("--out", type=Path, help="folder for records and logs")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--small", action="store_true", help="few layers and sentences, to try it")
    given = parser.parse_args(arguments)
    if given.part == "keep":
        if not given.folders:
            parser.error("keep needs FOLDER")
        return print(f"{keep(given.folders)} records are in {RESULTS}")
    if given.out is None:
        parser.error(f"{given.part} needs --out FOLDER")
    sys.exit(0 if run_part(given.part, given.out, given.minutes, small=given.small) else 1)


if __name__ == "__main__":
    main()
