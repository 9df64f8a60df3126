"""Time ours on a CPU by numbers of threads, with and without spinning, in one process and in two at once.

Each setting has two processes, which load and wait. In every round each setting is measured twice: by one of its processes alone, and by
both at the same time. A process makes greedy calls and calls with 4 beams in turns, for some seconds. Weights are random, of T5-base
shapes. A record replaces an older one of its precision and setting.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from t5_trt.tools.records import read_records, write_records

RESULTS = Path(__file__).resolve().parent / "results" / "cpu-threads.json"
SOURCE_TOKENS, NEW_TOKENS = 32, 32
SEARCHES = (1, 4)  # beams


class Setting(NamedTuple):
    """Threads of ONNX Runtime, whether they spin, and threads of torch."""

    threads: int
    spinning: bool
    torch_threads: int


SETTINGS = (
    Setting(2, True, 2),
    Setting(2, False, 2),
    Setting(2, True, 1),
    Setting(1, True, 1),
    Setting(1, False, 1),
)


class Worker:
    """A process with a model; it answers each line of input, a number of seconds, with the times of its calls."""

    def __init__(self, setting: Setting, precision: str, folder: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "benchmarks.cpu_threads",
            "--work",
            json.dumps([*setting, precision, str(folder)]),
        ]
        environ = {**os.environ, "T5_TRT_CACHE": str(folder / "store")}
        self._process = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, seconds: float) -> None:
        """Begin to make calls."""
        assert self._process.stdin is not None
        print(seconds, file=self._process.stdin, flush=True)

    def answer(self) -> Any:
        """Wait for the next answer; the first one says that the model is loaded."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process ended with {self._process.wait()}; its error is above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def work(setting: Setting, precision: str, folder: Path) -> None:
    """The other side of a `Worker`."""
    import torch

    from t5_trt import TRTT5ForConditionalGeneration
    from t5_trt.tools.random_models import random_source

    torch.set_num_threads(setting.torch_threads)
    options = {"num_threads": setting.threads, "thread_spinning": setting.spinning}
    model = TRTT5ForConditionalGeneration.from_pretrained(folder / "model", precision=precision, **options)
    source = random_source(1, SOURCE_TOKENS)

    def call(beams: int) -> float:
        begun = time.perf_counter()
        model.generate(source, num_beams=beams, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False)
        return (time.perf_counter() - begun) * 1e3

    for beams in SEARCHES:
        call(beams)
    print(json.dumps("loaded"), flush=True)
    for line in sys.stdin:
        end, found = time.perf_counter() + float(line), []
        while time.perf_counter() < end:
            found.append([call(beams) for beams in SEARCHES])
        print(json.dumps(found), flush=True)


def measured(precision: str, folder: Path, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """The records of all settings."""
    workers = {setting: [Worker(setting, precision, folder) for _ in range(2)] for setting in SETTINGS}
    for worker in [worker for pair in workers.values() for worker in pair]:
        worker.answer()
    found: dict[tuple[Setting, int], list[list[float]]] = {
        (setting, count): [] for setting in SETTINGS for count in (1, 2)
    }
    for _ in range(rounds):
        for (setting, count), times in found.items():
            for worker in workers[setting][:count]:
                worker.start(seconds)
            for worker in workers[setting][:count]:
                times += worker.answer()
    for worker in [worker for pair in workers.values() for worker in pair]:
        worker.close()
    return [record(precision, setting, found[setting, 1], found[setting, 2]) for setting in SETTINGS]


def record(precision: str, setting: Setting, alone: list[list[float]], both: list[list[float]]) -> dict[str, Any]:
    """Medians of a setting: milliseconds of a call, by one process alone and by each of two at once."""
    made: dict[str, Any] = {"precision": precision, **setting._asdict()}
    for number, beams in enumerate(SEARCHES):
        name = "greedy" if beams == 1 else f"{beams} beams"
        made[f"{name}, one process, ms"] = round(statistics.median(times[number] for times in alone), 1)
        made[f"{name}, each of two, ms"] = round(statistics.median(times[number] for times in both), 1)
    return made


def store(file: Path, records: list[dict[str, Any]]) -> None:
    """Put records into a file in place of older ones of their settings."""

    def key(each: dict[str, Any]) -> tuple[Any, ...]:
        return (each["precision"], *(each[name] for name in Setting._fields))

    new = {key(each) for each in records}
    write_records(file, [*(each for each in read_records(file) if key(each) not in new), *records])


def main() -> None:
    """Command line: measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of calls by each process, in each round")
    parser.add_argument("--shape", default="t5-base")
    parser.add_argument("--folder", type=Path, help="with the checkpoint in model; made if missing; default: temporary")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        threads, spinning, torch_threads, precision, folder = json.loads(given.work)
        work(Setting(threads, spinning, torch_threads), precision, Path(folder))
        return
    from t5_trt.tools.environment import environment
    from t5_trt.tools.random_models import random_t5

    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        if not (folder / "model").exists():
            random_t5(given.shape).save_pretrained(folder / "model")
        facts = {"model": f"{given.shape} shapes, random weights, seed 0", "rounds": given.rounds, **environment()}
        records = [{**made, **facts} for made in measured(given.precision, folder, given.rounds, given.seconds)]
    store(given.json, records)
    print(json.dumps([{name: each[name] for name in each if name not in facts} for each in records], indent=2))


if __name__ == "__main__":
    main()
