"""Time `generate()` on ONNX Runtime against Hugging Face's class on a CPU, with random weights, and compare tokens.

The measuring is `t5_trt.tools.benchmark`'s, as in `t5-trt bench`; this script times one case, can prepack weights, and ends
with an error if float32 tokens differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from t5_trt.tools.benchmark import Case, load_benchmark, measure
from t5_trt.tools.random_models import RANDOM, SHAPES
from t5_trt.tools.records import append_records


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
    benchmark = load_benchmark(
        RANDOM + args.shape,
        threads=args.threads,
        backend="onnxruntime",
        precision=args.precision,
        prepack_weights=args.prepack_weights or None,
    )
    case = Case(
        batch=args.batch, source_tokens=args.source_tokens, new_tokens=args.new_tokens, num_beams=args.num_beams
    )
    record = measure(benchmark, case, args.runs)
    print(json.dumps(record, indent=2))
    if args.json:
        append_records(args.json, [record])
    if args.precision == "fp32" and not record["tokens_equal"]:
        sys.exit("tokens differ from the Hugging Face class")


if __name__ == "__main__":
    main()
