"""Start one contestant of `benchmarks.cpu_peers` in this process: seconds to import, to load and to the first token, and memory."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CONTESTANTS = ("hf_eager_fp32", "ctranslate2_fp32", "ctranslate2_int8", "ours_fp32", "ours_int8")
SOURCE = list(range(2, 34))


def start_record(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the peak memory of every contestant over the size of its weights."""
    for name in CONTESTANTS:
        if name in record:
            found = record[name]
            found["peak_over_weights"] = round(found["peak_above_imports_mb"] / found["weights_mb"], 2)
    return record


def prepare(name: str, folder: Path) -> None:
    """Write what a user has before the first start: CTranslate2's converted model; our 8-bit weights in the store."""
    kind, _, precision = name.rpartition("_")
    if kind == "ctranslate2":
        from transformers import T5ForConditionalGeneration

        from t5_trt.tools.ctranslate2_peer import compute_type_of, convert

        (folder / name).mkdir()
        model = T5ForConditionalGeneration.from_pretrained(folder / "model")
        convert(model, folder / name, compute_type_of(precision, "cpu"))
    elif kind == "ours" and precision != "fp32":
        run(name, folder, 2)


def run(name: str, folder: Path, threads: int) -> dict[str, Any]:
    """Import, load, generate one token and then 99, and measure."""
    kind, _, precision = name.rpartition("_")
    start = time.perf_counter()
    generate: Any
    if kind == "ctranslate2":
        import ctranslate2

        imported, imports_mb = time.perf_counter(), peak_mb()
        converted = folder / name / "converted"
        translator = ctranslate2.Translator(str(converted), compute_type="default", intra_threads=threads)

        def generate(tokens: int) -> Any:
            return translator.translate_batch(
                [[str(token) for token in SOURCE]],
                beam_size=1,
                min_decoding_length=tokens,
                max_decoding_length=tokens,
            )

        weights_mb = (converted / "model.bin").stat().st_size / 1e6
    else:
        import torch

        if kind == "ours":
            import onnxruntime  # noqa: F401 - ours imports it when it loads the first graph

            from t5_trt import TRTT5ForConditionalGeneration as Model
        else:
            from transformers import T5ForConditionalGeneration as Model
        imported, imports_mb = time.perf_counter(), peak_mb()
        torch.set_num_threads(threads)
        options = {"precision": precision, "num_threads": threads} if kind == "ours" else {}
        model = Model.from_pretrained(str(folder / "model"), **options)
        ids = torch.tensor([SOURCE])

        def generate(tokens: int) -> Any:
            return model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens)

        stored = Path(os.environ["T5_TRT_CACHE"])
        if kind == "ours" and precision != "fp32":
            weights_mb = sum(path.stat().st_size for path in stored.rglob("*") if path.is_file()) / 1e6
        else:
            weights_mb = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    loaded = time.perf_counter()
    generate(1)
    first = time.perf_counter()
    generate(99)
    return {
        "import_s": round(imported - start, 2),
        "load_s": round(loaded - imported, 2),
        "first_token_s": round(first - loaded, 2),
        "weights_mb": round(weights_mb, 1),
        "imports_mb": round(imports_mb, 1),
        "peak_above_imports_mb": round(peak_mb() - imports_mb, 1),
    }


def peak_mb() -> float:
    """Largest resident size of this process so far, in 10**6 bytes; mapped weight pages count.

    Not `resource.getrusage`, whose number a process inherits from the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def main() -> None:
    """Command line of `benchmarks.cpu_peers`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("stage", choices=("prepare", "run"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.stage == "prepare":
        prepare(args.name, args.folder)
    else:
        print(json.dumps(run(args.name, args.folder, args.threads)))


if __name__ == "__main__":
    main()
