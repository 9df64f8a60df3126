"""Run shell commands one after the other in several threads side by side, with logs, until the time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STORE = Path("/var/tmp/t5_trt-engines")
#: the GPU tests of a file or folder
TESTS = "T5_TRT_TEST_STORE={store}/tests {python} -m pytest -q -m gpu -p no:xdist -W default"


@dataclass
class Run:
    """One part on its way."""

    out: Path
    end: float  # time.monotonic()
    summary: list[str] = field(default_factory=list)

    def lane(self, name: str, commands: list[str]) -> None:
        """Run commands one after the other, each with a log and a file of records of its own."""
        for number, command in enumerate(commands):
            label = f"{name}-{number}"
            words = command.format(python=sys.executable, store=STORE, out=self.out, json=self.out / f"{label}.json")
            start = time.monotonic()
            with (self.out / f"{label}.log").open("w") as log:
                log.write(f"$ {words}\n")
                log.flush()
                process = subprocess.Popen(
                    words, shell=True, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
                try:
                    status = str(process.wait(max(self.end - start, 1)))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    status = "cut off"
            self.summary.append(f"{status:>8} {time.monotonic() - start:6.1f} s  {words}")
            print(self.summary[-1], flush=True)
