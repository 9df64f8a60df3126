"""Time generate() on an NVIDIA GPU over batch, source length and new tokens, beside every peer that can run here.

    python -m benchmarks.curves --out FOLDER [--cases 1x32x99,8x32x99] [--compiled 1x32x99] [--layers 2] [--seconds 300]

T5-base shapes with random weights, float16, greedy, the backend "cuda"; a case is batch x source tokens x new tokens. Peers, in the same process:
Hugging Face eager, with a static cache and torch.compile where --compiled names the case (half a minute each), and CTranslate2 if it is installed.
Times are of whole calls, medians after a warm-up; of Hugging Face eager one call, as it takes seconds. Every case is written to
FOLDER/curves.json as it comes; none starts after --seconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import kernel_models
from benchmarks.decode import peer_ms, request
from benchmarks.gpu import timed_ms
from benchmarks.kernel_models import attempt, base_name, keep, open_model, sizes, t5_base
from t5_trt.errors import T5TRTError
from t5_trt.tools.ctranslate2_peer import CTranslate2Model
from t5_trt.tools.records import Record

#: (batch, source tokens, new tokens), those of the README first
CASES = (
    (1, 32, 99), (8, 32, 99), (32, 32, 99), (128, 32, 99), (4, 32, 99), (64, 32, 99),
    (1, 128, 99), (1, 512, 99), (1, 2048, 99), (1, 32, 16), (1, 32, 256), (1, 32, 1024), (1, 2048, 1024), (8, 2048, 1024),
)  # fmt: skip
COMPILED = ((1, 32, 99), (8, 32, 99), (32, 32, 99))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write; the status is 1 if ours could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--cases", help="comma-separated batch x source x new tokens; default: 14 of them")
    parser.add_argument("--compiled", help="cases of torch.compile; default: three of them")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--store", type=Path, default=Path("/var/tmp/t5_trt-kernel-engines"), help="of kernels")
    parser.add_argument("--runs", type=int, default=5, help="calls that a median is of")
    parser.add_argument("--seconds", type=float, default=300, help="start no case after them")
    given = parser.parse_args(arguments)
    start = time.monotonic()
    hugging_face = t5_base(given.layers)
    ours, peers = open_model("cuda", hugging_face, "fp16", given.store), Peers(hugging_face)
    shared: Record = {
        "model": base_name(given.layers), "precision": "fp16", "backend": "cuda", "decode": "kernels", "source": "random tokens",
        "num_beams": 1, "do_sample": False,
    }  # fmt: skip
    failed, compiled = False, sizes(given.compiled) if given.compiled is not None else COMPILED
    for case in sizes(given.cases) if given.cases else CASES:
        if time.monotonic() - start > given.seconds:
            print(f"{case}: left out, no time is left", flush=True)
            continue
        found = measure(ours, peers, case, given.runs, compiled=case in compiled)
        keep(given.out, "curves", [{**shared, **found}])
        print(" ".join(f"{key}={value}" for key, value in found.items()), flush=True)
        failed |= "ours_ms" not in found
    sys.exit(1 if failed else 0)


class Peers:
    """Other runtimes with the same weights in float16.

    Args:
        hugging_face: float32, on the CPU.
    """

    def __init__(self, hugging_face: Any) -> None:
        self.ctranslate2: Any = None
        try:
            self.ctranslate2 = CTranslate2Model(hugging_face, "fp16", torch.device(kernel_models.DEVICE, 0))
        except (T5TRTError, RuntimeError, ValueError) as error:
            print(f"CTranslate2 is left out: {error}", flush=True)
        self.hugging_face = t5_base(hugging_face.config.num_layers).half().to(kernel_models.DEVICE)

    @torch.no_grad()
    def compiled_ms(self, arguments: dict[str, Any], runs: int) -> float:
        """Of Hugging Face's ``generate()`` with a static cache, which it compiles in its first call of a size."""
        torch.compiler.reset()  # torch stops compiling silently after some shapes
        vars(self.hugging_face).pop("_compiled_call", None)
        median, _ = timed_ms(lambda: self.hugging_face.generate(**arguments, cache_implementation="static"), runs)
        if "_compiled_call" not in vars(self.hugging_face):
            raise RuntimeError("Transformers did not compile this request")
        return median


def measure(ours: Any, peers: Peers, case: Sequence[int], runs: int, *, compiled: bool) -> Record:
    """The times of all for one case, ours first."""
    batch, source, new = case
    arguments = request(batch, new=new, source=source)
    found: Record = {"batch": batch, "source_tokens": source, "new_tokens": new}

    def timed(name: str, work: Callable[[], float]) -> None:
        attempt(found, f"{name}_ms", lambda: round(work(), 2))
        if f"{name}_ms" in found:
            per_s = round(batch * new / found[f"{name}_ms"] * 1e3, 1)
            found["tokens_per_s" if name == "ours" else f"{name}_tokens_per_s"] = per_s

    timed("ours", lambda: timed_ms(lambda: ours.generate(**arguments), runs)[0])
    if peers.ctranslate2 is not None:
        timed("ctranslate2_fp16", lambda: timed_ms(lambda: peers.ctranslate2.generate(**arguments), 2)[0])
    timed("hf_eager_fp16", lambda: peer_ms(peers.hugging_face, arguments, 1))
    if compiled:
        timed("hf_compiled_fp16", lambda: peers.compiled_ms(arguments, 2))
    return found


if __name__ == "__main__":
    main()
