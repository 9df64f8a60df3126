"""One contestant of `benchmarks.cpu_peers` in a process of its own: answers requests, one line of JSON each.

A process of its own, so that no library's threads wait beside another's and memory is one contestant's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: rows of source tokens, new tokens, beams -> rows of tokens without the start token
Generate = Callable[[list[list[int]], int, int], list[list[int]]]


class Contestant:
    """The other side: starts a process, sends requests and reads answers.

    Args:
        name: such as "hf_eager_fp32", "ctranslate2_int8" or "ours_fp32".
        folder: with the checkpoint in "model", and CTranslate2's models in folders of the contestants' names.
        threads: of every operator.
    """

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.cpu_contestant", name, str(folder), "--threads", str(threads)]
        environ = {**os.environ, "T5_TRT_CACHE": str(folder / "store")}
        self._process = subprocess.Popen(
            command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.start = self._answer()

    def generate(self, rows: list[list[int]], new_tokens: int, num_beams: int) -> tuple[float, list[list[int]]]:
        """Milliseconds of a call, and its tokens. `cores` then says how many cores were busy on average."""
        assert self._process.stdin is not None
        print(json.dumps([rows, new_tokens, num_beams]), file=self._process.stdin, flush=True)
        answer = self._answer()
        self.peak_mb, self.cores = answer["peak_mb"], answer["cores"]
        return answer["ms"], answer["tokens"]

    @property
    def anonymous_mb(self) -> float:
        """Its memory now without pages of files, in 10**6 bytes."""
        return status_mb("RssAnon", str(self._process.pid))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contestant ended with {self._process.wait()}: {' '.join(self._process.args)}")  # type: ignore[arg-type]
        return json.loads(line)


def load_ctranslate2(folder: Path, threads: int) -> Generate:
    """CTranslate2, without torch."""
    from t5_trt.tools.ctranslate2_library import open_translator

    translator = open_translator(str(folder), intra_threads=threads)

    def generate(rows: list[list[int]], new_tokens: int, num_beams: int) -> list[list[int]]:
        limits = {"min_decoding_length": new_tokens, "max_decoding_length": new_tokens, "max_input_length": 0}
        found = translator.translate_batch([list(map(str, row)) for row in rows], beam_size=num_beams, **limits)
        return [list(map(int, result.hypotheses[0])) for result in found]

    return generate


def load_model(kind: str, precision: str, folder: Path, threads: int) -> Generate:
    """Hugging Face's class or ours."""
    import torch

    torch.set_num_threads(threads)
    if kind == "ours":
        from t5_trt import TRTT5ForConditionalGeneration

        model = TRTT5ForConditionalGeneration.from_pretrained(str(folder), precision=precision, num_threads=threads)
    else:
        from transformers import T5ForConditionalGeneration

        model = T5ForConditionalGeneration.from_pretrained(str(folder))

    def generate(rows: list[list[int]], new_tokens: int, num_beams: int) -> list[list[int]]:
        limits = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        found = model.generate(torch.tensor(rows), num_beams=num_beams, do_sample=False, **limits)
        return [row[1:] for row in found.tolist()]

    return generate


def import_all(kind: str) -> None:
    """Import what the contestant needs, so that loading is timed without it."""
    if kind == "ctranslate2":
        from t5_trt.tools.ctranslate2_library import import_ctranslate2

        import_ctranslate2()
    elif kind == "ours":
        import onnxruntime  # noqa: F401

        from t5_trt import TRTT5ForConditionalGeneration  # noqa: F401
    else:
        from transformers import T5ForConditionalGeneration  # noqa: F401


def peak_mb() -> float:
    """Largest resident size of this process so far, in 10**6 bytes; mapped weight pages count.

    Not `resource.getrusage`, whose number a process inherits from the one that started it.
    """
    return status_mb("VmHWM")


def status_mb(field: str, process: str = "self") -> float:
    """A size of a process that Linux counts in kB, in 10**6 bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e6


def main() -> None:
    """Command line: load, report, answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    kind, _, precision = args.name.rpartition("_")
    begun = time.perf_counter()
    import_all(kind)
    imported = time.perf_counter()
    imports = {"imports_mb": peak_mb(), "imports_anonymous_mb": status_mb("RssAnon")}
    if kind == "ctranslate2":
        generate = load_ctranslate2(args.folder / args.name / "converted", args.threads)
    else:
        generate = load_model(kind, precision, args.folder / "model", args.threads)
    loaded = time.perf_counter()
    generate([list(range(2, 34))], 1, 1)
    seconds = {"import_s": imported - begun, "load_s": loaded - imported, "first_token_s": time.perf_counter() - loaded}
    print(json.dumps({name: round(value, 3) for name, value in (seconds | imports).items()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        start, busy = time.perf_counter(), time.process_time()
        tokens = generate(*request)
        taken, busy = time.perf_counter() - start, time.process_time() - busy
        answer = {"ms": taken * 1e3, "cores": busy / taken, "tokens": tokens, "peak_mb": peak_mb()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
