"""Peak memory of loading and running T5-base shapes from a safetensors folder on CPU, each stage in a fresh process.

What Python, torch, Transformers and ONNX Runtime take before any model exists is measured first and subtracted.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def save(folder: str) -> None:
    """Write the model that the other stage loads."""
    from t5_trt.tools.random_models import random_t5

    random_t5("t5-base").save_pretrained(folder)


def run(folder: str) -> None:
    """Load, generate, and print one record."""
    import onnxruntime  # noqa: F401 - part of the baseline
    import torch

    from t5_trt import TRTT5ForConditionalGeneration
    from t5_trt.compat import CACHE
    from t5_trt.tools.environment import environment

    torch.set_num_threads(2)
    baseline = peak_mb()
    model = TRTT5ForConditionalGeneration.from_pretrained(folder)
    ids = torch.arange(2, 34)[None]
    model.generate(ids, min_new_tokens=99, max_new_tokens=99)
    weights = sum(p.nbytes for p in model.parameters()) / 1e6
    cache = model(ids, decoder_input_ids=torch.zeros(1, 100, dtype=torch.long))[CACHE]
    buffers = (cache.state.kv.nbytes + cache.state.cross.kv.nbytes) / 1e6
    used = peak_mb() - baseline
    record: dict[str, Any] = {
        "model": "t5-base shapes, float32 safetensors",
        "weights_mb": round(weights, 1),
        "kv_buffers_mb": round(buffers, 1),
        "baseline_mb": round(baseline, 1),
        "peak_above_baseline_mb": round(used, 1),
        "ratio_to_weights": round((used - buffers) / weights, 3),
        **environment(),
    }
    print(json.dumps(record, indent=2))


def peak_mb() -> float:
    """Largest resident size of this process so far, in 10**6 bytes; mapped weight pages count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    """Save in one process, run in another, print and store the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=("save", "run"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="file to write the record to")
    args = parser.parse_args()
    if args.stage:
        {"save": save, "run": run}[args.stage](args.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--folder", folder, "--stage"]
        subprocess.run([*command, "save"], check=True)
        text = subprocess.run([*command, "run"], check=True, capture_output=True, text=True).stdout
    print(text)
    if args.json:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
