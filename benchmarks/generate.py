"""Time `generate()` on engines against the stock class, both in this process, on CPU; check that tokens are equal.

Loading and opening the engines are excluded and reported apart. Runs alternate between the two models so that a change
of the machine's clock hits both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.shapes import SHAPES, environment, random_source, random_t5
from t5_trt import TRTT5ForConditionalGeneration


def measure(
    shape: str, batch: int, source: int, new: int, beams: int, threads: int, runs: int, prepack: bool, precision: str
) -> Any:
    """One record: medians in milliseconds of the whole `generate()` call."""
    torch.set_num_threads(threads)
    stock = random_t5(shape)
    ours = TRTT5ForConditionalGeneration.from_model(
        stock, backend="onnxruntime", precision=precision, num_threads=threads, prepack_weights=prepack
    )
    ids = random_source(batch, source)
    request = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "min_new_tokens": new,
        "max_new_tokens": new,
        "num_beams": beams,
        "do_sample": False,
    }
    start = time.perf_counter()
    first = ours.generate(**request)
    first_call_s = time.perf_counter() - start
    expected = stock.generate(**request)
    times: dict[str, list[float]] = {"ours": [], "stock": []}
    for _ in range(runs):
        for name, model in (("stock", stock), ("ours", ours)):
            start = time.perf_counter()
            model.generate(**request)
            times[name].append((time.perf_counter() - start) * 1e3)
    ours_ms, stock_ms = (statistics.median(times[name]) for name in ("ours", "stock"))
    return {
        "model": f"{shape} shapes, random weights, seed 0",
        "backend": "onnxruntime",
        "precision": precision,
        "prepack_weights": prepack,
        "batch": batch,
        "source_tokens": source,
        "new_tokens": new,
        "num_beams": beams,
        "threads": threads,
        "runs": runs,
        "ours_ms": round(ours_ms, 1),
        "hf_eager_fp32_ms": round(stock_ms, 1),
        "speedup": round(stock_ms / ours_ms, 2),
        "first_call_s": round(first_call_s, 2),
        "tokens_equal": bool(torch.equal(first, expected)),
        "tokens_equal_share": round((first == expected).float().mean().item(), 3),
        "distinct_tokens": int(first.unique().numel()),
        **environment(),
    }


def main() -> None:
    """Command line: measure, print, and append the record to a JSON file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="t5-base")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--source-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=99)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prepack-weights", action="store_true")
    parser.add_argument("--precision", choices=("fp32", "int8"), default="fp32")
    parser.add_argument("--json", type=Path, help="file to append the record to")
    args = parser.parse_args()
    record = measure(
        args.shape, args.batch, args.source_tokens, args.new_tokens, args.num_beams, args.threads, args.runs,
        args.prepack_weights, args.precision,
    )  # fmt: skip
    print(json.dumps(record, indent=2))
    if args.json:
        records = json.loads(args.json.read_text()) if args.json.exists() else []
        args.json.write_text(json.dumps([*records, record], indent=2) + "\n")
    if args.precision == "fp32" and not record["tokens_equal"]:
        sys.exit("tokens differ from the stock class")


if __name__ == "__main__":
    main()
