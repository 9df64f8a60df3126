"""Time steps of generate() that sample or have processors on an NVIDIA GPU, by our kernels and by torch's operations.

    python -m benchmarks.token_choice --out FOLDER [--batches 1,32,128] [--layers 2]

T5-base shapes with random weights, fp16, 32 source tokens. A step is the difference of whole calls of 84 and of 20 new tokens, over 64.
Records are written to FOLDER/token-choice.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode import request
from benchmarks.gpu import SOURCE_TOKENS, timed_ms
from benchmarks.kernel_models import attempt, base_name, keep, open_model, t5_base
from t5_trt.runtime import cuda_kernels
from t5_trt.tools.records import Record

#: search -> settings of generate()
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 0},
    "top-k 50": {"do_sample": True, "top_k": 50},
    "temperature 0.7, top-k 50, top-p 0.95": {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.95},
    "top-p 0.9": {"do_sample": True, "top_k": 0, "top_p": 0.9},
    "penalty 1.3, no 3-gram twice": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "4 beams": {"num_beams": 4},
    "4 beams, penalty 1.3, no 3-gram twice": {"num_beams": 4, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}
#: new tokens of the calls
FEW, MANY = 20, 84
#: beams of a larger batch do not pay for their time here
MOST_WITH_BEAMS = 32


@contextmanager
def by_torch() -> Iterator[None]:
    """Have torch's operations choose, for selectors that are made meanwhile."""
    real = cuda_kernels.choice_kernels
    cuda_kernels.choice_kernels = lambda device, vocabulary: False
    try:
        yield
    finally:
        cuda_kernels.choice_kernels = real


def step_us(model: Any, batch: int, settings: dict[str, Any], runs: int) -> float:
    """A step with its choice."""
    times = []
    for new in (FEW, MANY):
        arguments = {**request(batch, new=new), "min_new_tokens": 0, **settings}
        times.append(timed_ms(lambda now=arguments: model.generate(**now), runs)[0])
    return round((times[1] - times[0]) / (MANY - FEW) * 1e3, 1)


def tokens(model: Any, batch: int, settings: dict[str, Any]) -> torch.Tensor:
    """What a call gives after a seed."""
    torch.manual_seed(3)
    made: torch.Tensor = model.generate(**{**request(batch, new=MANY), "min_new_tokens": 0, **settings})
    return made


def measure(kernels: Any, torchs: Any, batch: int, search: str, runs: int) -> Record:
    """Steps of one search by two models, of which one has no kernels for it, and how many of their rows are equal."""
    settings = SEARCHES[search]
    beams = settings.get("num_beams", 1)
    found: Record = {"batch": batch, "num_beams": beams, "source_tokens": SOURCE_TOKENS, "search": search}
    attempt(found, "step_us", lambda: step_us(kernels, batch, settings, runs))
    with by_torch():
        attempt(found, "torch_step_us", lambda: step_us(torchs, batch, settings, runs))
        alike = [tokens(model, batch, settings) for model in (kernels, torchs)]
    found["equal_rows"] = int((alike[0] == alike[1]).all(1).sum())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--batches", default="1,32,128", help="comma-separated")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--store", type=Path, default=Path("/var/tmp/t5_trt-kernel-engines"), help="of engines")
    parser.add_argument("--runs", type=int, default=5, help="calls that a median is of")
    given = parser.parse_args(arguments)
    hugging_face = t5_base(given.layers)
    hugging_face.generation_config.eos_token_id = None  # all calls are equally long
    kernels, torchs = (open_model("cuda", hugging_face, "fp16", given.store) for _ in range(2))
    for batch in map(int, given.batches.split(",")):
        for search in SEARCHES:
            if "num_beams" not in SEARCHES[search] or batch <= MOST_WITH_BEAMS:
                found = measure(kernels, torchs, batch, search, given.runs)
                about = {"model": base_name(given.layers), "precision": "fp16", "backend": "cuda"}
                keep(given.out, "token-choice", [{**about, **found}])
                print(found, flush=True)


if __name__ == "__main__":
    main()
