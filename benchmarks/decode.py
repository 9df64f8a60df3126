"""Time of the backend "cuda" on an NVIDIA GPU: the decoder step alone, with its choice of tokens, and generate() as a whole.

    python -m benchmarks.decode --out results.json [--layers 2]     # --layers 2 tries it on a small model

T5-base shapes with random weights, fp16, 32 source tokens, 99 new tokens; Hugging Face eager in the same process. Times are medians.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.environment import environment

CASES = ((1, 1), (1, 4), (8, 1), (32, 1), (8, 4), (32, 4))
SOURCE, NEW = 32, 99


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of the records, JSON")
    parser.add_argument("--layers", type=int, default=12)
    given = parser.parse_args()
    torch.manual_seed(0)
    sizes = {"d_model": 768, "d_ff": 3072, "num_layers": given.layers, "num_heads": 12}
    stock = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    ours = TRTT5ForConditionalGeneration.from_model(stock, backend="cuda", precision="fp16")
    start = time.perf_counter()
    ours.session  # noqa: B018 - opens it
    torch.cuda.synchronize()
    facts = {"environment": environment(), "shapes": sizes, "source_tokens": SOURCE, "new_tokens": NEW, "copy_tb_s": copy_rate(),
             "open_s": time.perf_counter() - start}  # fmt: skip
    eager = copy.deepcopy(stock).cuda()
    cases = [measure(ours, eager, batch, beams) for batch, beams in CASES]
    cases.append(long_output(ours))
    given.out.write_text(json.dumps({**facts, "cases": cases}, indent=2) + "\n")


def measure(ours: Any, stock: Any, batch: int, beams: int) -> dict[str, Any]:
    """All times of one batch size and number of beams."""
    ids = torch.randint(3, 32000, (batch, SOURCE), device="cuda")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def call(model: Any, tokens: int) -> Callable[[], Any]:
        return lambda: model.generate(**inputs, num_beams=beams, max_new_tokens=tokens, min_new_tokens=tokens)

    start = time.perf_counter()
    call(ours, NEW)()
    torch.cuda.synchronize()
    found: dict[str, Any] = {"batch": batch, "beams": beams, "first_call_ms": (time.perf_counter() - start) * 1e3}
    long, short = median_ms(call(ours, NEW)), median_ms(call(ours, NEW // 3))
    found["generate_ms"], found["step_with_choice_us"] = long, (long - short) / (NEW - NEW // 3) * 1e3
    found["encoder_ms"] = median_ms(lambda: ours.encode(ids, inputs["attention_mask"]))
    found["step_alone_us"] = step_alone_us(ours, batch, beams)
    with torch.no_grad():
        found["hugging_face_eager_fp32_ms"] = median_ms(call(stock, NEW), 3)
    print(found, flush=True)
    return found


def step_alone_us(ours: Any, batch: int, beams: int, replays: int = 50) -> float:
    """One step over the buffers of a request, as a CUDA graph."""
    slots = [
        slot
        for shapes, idle in ours.session._steps._idle.items()
        if (batch, beams) == (shapes.B, shapes.N)
        for slot in idle
    ]
    slot = slots[-1]
    slot.positions.fill_(NEW // 2)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        slot.step.enqueue(torch.cuda.current_stream().cuda_stream)

    def many() -> None:
        for _ in range(replays):
            graph.replay()

    return median_ms(many) / replays * 1e3


def long_output(ours: Any) -> dict[str, Any]:
    """What the last steps of 512 cost beside the first."""
    ids = torch.randint(3, 32000, (1, SOURCE), device="cuda")

    def call(tokens: int) -> Callable[[], Any]:
        return lambda: ours.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens)

    times = {tokens: median_ms(call(tokens), 5) for tokens in (16, 64, 448, 512)}
    first, last = (times[64] - times[16]) / 48 * 1e3, (times[512] - times[448]) / 64 * 1e3
    return {"batch": 1, "beams": 1, "new_tokens": 512, "first_steps_us": first, "last_steps_us": last}


def median_ms(call: Callable[[], Any], repeats: int = 9) -> float:
    """Of calls, by the host's clock, after two that do not count."""
    times = []
    for turn in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if turn > 1:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def copy_rate() -> float:
    """Of a large copy on the GPU, in TB/s read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source)) / 1e9


if __name__ == "__main__":
    main()
