"""Engines built ahead, for a container image: a checkpoint's folder that holds the engines a service will need.

    python examples/prebuild_engines.py MODEL OUT --shapes 1x1x128x128 8x4x256x64      # batch x beams x source x target
    python examples/prebuild_engines.py MODEL OUT --dry-run
    python examples/prebuild_engines.py MODEL OUT --compute-capability 8.6 8.9         # TensorRT for RTX, no GPU needed

First form, on a machine with TensorRT and the same kind of GPU as the service: runs every shape once, which builds its
engines, and writes OUT with save_pretrained(include_engines=True). Copy OUT into the image; from_pretrained(OUT) there
builds nothing for these shapes. Without TensorRT and a GPU it says what it would do and ends with status 0. CI has no
GPU and runs this form up to that message.

Last form: builds with TensorRT for RTX, without a GPU, what `t5-trt build` builds, into the store OUT. With T5_TRT_CACHE=OUT a
model on a GPU of one of those capabilities, with the same TensorRT for RTX, finds them.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer

from t5_trt import BackendError, TRTT5ForConditionalGeneration, build_engines


class Shape(NamedTuple):
    """Sizes of one kind of request; engines exist for powers of two, so these are rounded up."""

    batch: int
    beams: int
    source: int
    target: int


def shape(text: str) -> Shape:
    """Read BATCHxBEAMSxSOURCExTARGET."""
    sizes = [int(size) for size in text.split("x")]
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected BATCHxBEAMSxSOURCExTARGET, such as 1x4x128x64")
    return Shape(*sizes)


def run_and_save(model: Any, out: Path, shapes: list[Shape]) -> None:
    """Run random tokens of every shape, then save checkpoint and engines."""
    for wanted in shapes:
        print(f"running {wanted}", flush=True)
        ids = torch.randint(3, model.config.vocab_size, (wanted.batch, wanted.source), device=model.device)
        # as many tokens as can be asked for: buffers grow on the way, and every size has its engine
        lengths = {"min_new_tokens": wanted.target, "max_new_tokens": wanted.target}
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=wanted.beams, **lengths)
    model.save_pretrained(out, include_engines=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id of a T5 checkpoint, such as examples/kana_romaji")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--shapes", type=shape, nargs="+", default=[Shape(1, 1, 128, 128)], metavar="BxNxSxT")
    parser.add_argument("--precision", default="fp16", help="fp32, tf32, fp16 or bf16")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument("--compute-capability", nargs="+", metavar="C", help="build with TensorRT for RTX for these")
    options = parser.parse_args()

    if options.compute_capability and importlib.util.find_spec("tensorrt_rtx") is None:
        print("nothing built: TensorRT for RTX is not installed. pip install 't5-trt[rtx]'")
    elif options.compute_capability and not options.dry_run:
        for wanted in options.shapes:
            engines = build_engines(
                options.model,
                flavor="rtx",
                compute_capabilities=options.compute_capability,
                precision=options.precision,
                batch=wanted.batch,
                beams=wanted.beams,
                source_tokens=wanted.source,
                target_tokens=wanted.target,
                cache_dir=options.out,
            )
            for engine in engines:
                print(f"{engine.label}: {engine.size_bytes / 1e6:.1f} MB")
            print(f"{len(engines)} engines in {options.out}")
    elif options.dry_run:
        print_plan(options)
    else:
        try:
            model = TRTT5ForConditionalGeneration.from_pretrained(
                options.model, backend="tensorrt", precision=options.precision
            )
        except BackendError as error:
            print(f"nothing built: {error}")
            print_plan(options)
            return
        run_and_save(model, options.out, options.shapes)
        AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
        print(f"checkpoint and engines are in {options.out}")


def print_plan(options: argparse.Namespace) -> None:
    """What a machine with TensorRT and a GPU would do."""
    for wanted in options.shapes:
        print(f"would build {options.precision} engines of {options.model} for {wanted}")
    print(f"would write to {options.out}")


if __name__ == "__main__":
    main()
