"""Time large models on an NVIDIA GPU without TensorRT: decoder steps beside what memory allows, and tokens per second.

    python -m benchmarks.large_models --out FOLDER [--models t5-large,t5-3b,flan-t5-xl] [--int8] [--batches 1] [--layers 2] [--no-peer]

Published shapes with random weights. Of every model: the time to open it, GPU memory, and for batches of 1, 8 and 32, greedy, 32 source tokens
and 99 new ones, a step with its token selection. The floors beside a step are the time to read the decoder's weights once, and that to read the
keys and values of all rows, too, at the rate of a large copy in the same process. Of Flan-T5-XL in bfloat16 also tokens per second: sources of 260 to 440 tokens, 128 new ones, batches of 32, 64 and 128,
the case of TensorRT-LLM's documentation. Hugging Face eager in the same precision and process. Every case is written to
FOLDER/large-models.json as it comes. With --int8 a model in float16 is measured in int8, too: the same weights, in the same process.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import kernel_models
from benchmarks.decode import copy_rate, opening_seconds, peer_ms, request, wall_ms, with_choice_us
from benchmarks.gpu import NEW_TOKENS, SOURCE_TOKENS, timed_ms
from benchmarks.kernel_models import attempt, keep, open_model
from t5_trt.tools.random_models import random_source, random_t5
from t5_trt.tools.records import Record

#: model -> its precision
MODELS = {"t5-large": "fp16", "t5-3b": "fp16", "flan-t5-xl": "bf16"}
#: precision -> the type of the matrices of a step
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
BATCHES = (1, 8, 32)
#: batch -> tokens per second of Flan-T5-XL in bfloat16 on one H100 in TensorRT-LLM's documentation
PUBLISHED = {32: 3312, 64: 4184, 128: 4768}
SHORTEST, LONGEST, LONG_NEW_TOKENS = 260, 440, 128


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write; the status is 1 if something could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--layers", type=int, help="of each stack, to try it")
    parser.add_argument("--int8", action="store_true", help="models in float16 in int8, too")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="comma-separated, of steps")
    parser.add_argument(
        "--store", type=Path, default=Path("/var/tmp/t5_trt-kernel-engines"), help="of compiled kernels"
    )
    parser.add_argument("--runs", type=int, default=3, help="calls that a median is of")
    parser.add_argument("--no-peer", action="store_true", help="leave Hugging Face out")
    given = parser.parse_args(arguments)
    good, rate = True, copy_rate()
    for name in given.models.split(","):
        for found in measure(name, given, rate):
            keep(given.out, "large-models", [found])
            print(" ".join(f"{key}={value}" for key, value in found.items()), flush=True)
            good &= "failed" not in found
        gc.collect()
        torch.cuda.empty_cache()
    sys.exit(0 if good else 1)


def measure(name: str, given: argparse.Namespace, rate: float) -> Iterator[Record]:
    """The records of a model."""
    peer = random_model(name, given.layers)
    hugging_face = copy.deepcopy(peer).cpu()
    if given.no_peer:
        peer = None
    for precision in (MODELS[name], *(["int8"] if given.int8 and MODELS[name] == "fp16" else [])):
        yield from measure_in(precision, name, hugging_face, peer, given, rate)
        gc.collect()
        torch.cuda.empty_cache()
        peer = None


def measure_in(
    precision: str, name: str, hugging_face: Any, peer: Any, given: argparse.Namespace, rate: float
) -> Iterator[Record]:
    """The records of a model in one precision."""
    before = torch.cuda.memory_allocated()
    ours = open_model("cuda", hugging_face, precision, given.store)
    shared: Record = {"model": f"{name} shapes, random weights", "precision": precision, "backend": "cuda"}
    if given.layers:
        shared["layers"] = given.layers
    attempt(shared, "open_s", lambda: opening_seconds(ours))
    if "failed" in shared:
        yield shared
        return
    shared |= {"memory_gb": gigabytes(torch.cuda.memory_allocated() - before), "parameters_gb": gigabytes(nbytes(hugging_face, DTYPES[precision]))}  # fmt: skip
    batches, long = [int(batch) for batch in given.batches.split(",")], PUBLISHED if name == "flan-t5-xl" else ()
    compile_kernels(ours, given.store, [*batches, *long])
    weights = step_bytes(hugging_face, DTYPES[precision])
    for batch in batches:
        yield {
            **shared,
            **step(ours, peer, batch, given.runs),
            "floor_us": round(weights / rate / 1e6, 1),
            "floor_with_caches_us": round((weights + batch * cache_bytes(hugging_face.config)) / rate / 1e6, 1),
            "copy_tb_s": round(rate, 2),
        }
    for batch in long:
        yield {**shared, **throughput(ours, peer, batch, given.runs)}


def random_model(name: str, layers: int | None) -> Any:
    """A Hugging Face model, made where it is fast."""
    model = random_t5(name, 0, DTYPES[MODELS[name]], kernel_models.DEVICE)
    if layers:
        for stack in (model.encoder, model.decoder):
            stack.block = stack.block[:layers]
        for config in (model.config, model.encoder.config, model.decoder.config):
            config.num_layers = config.num_decoder_layers = layers
    return model


def nbytes(model: Any, dtype: torch.dtype) -> int:
    """Of all parameters as a type."""
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def step_bytes(model: Any, dtype: torch.dtype) -> int:
    """Of the weights that a decoder step reads: all of the decoder's but the cross-attention's k and v, and the output matrix."""
    unread = (".EncDecAttention.k.", ".EncDecAttention.v.", "embed_tokens")
    read = [each for name, each in model.decoder.named_parameters() if not any(part in name for part in unread)]
    return (sum(each.numel() for each in read) + model.lm_head.weight.numel()) * dtype.itemsize


def cache_bytes(config: Any) -> int:
    """Of the keys and values in half precision that a step reads for a row, on average over the new tokens."""
    keys = (NEW_TOKENS + 1) // 2 + SOURCE_TOKENS
    return keys * 2 * config.num_decoder_layers * config.num_heads * config.d_kv * 2


def gigabytes(size: float) -> float:
    """Of bytes, for a record."""
    return round(size / 1e9, 3)


def compile_kernels(ours: Any, store: Path, rows: Sequence[int]) -> None:
    """Have the kernels for some numbers of rows compiled side by side; the measured process loads them from the store."""
    from t5_trt.kernels.compile import architecture_name
    from t5_trt.kernels.decode_step import constants

    arch, dtype, int8 = ours.session.arch, ours.session.dtype, ours.session.precision == "int8"
    major, minor = torch.cuda.get_device_capability()
    wanted = {tuple(each.items()): each for each in (constants(arch, dtype, count, major, int8=int8) for count in rows)}
    with ProcessPoolExecutor(max_workers=len(wanted), mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(compile_one, each, architecture_name(major, minor), store) for each in wanted.values()]
        for job in jobs:
            job.result()


def compile_one(wanted: dict[str, int], architecture: str, store: Path) -> None:
    """Compile the kernels of a decoder step, in a process of its own."""
    from t5_trt.engine.store import EngineStore
    from t5_trt.kernels.compile import stored_cubin

    stored_cubin("decode_step.cu", wanted, architecture, EngineStore(store))


def step(ours: Any, peer: Any, batch: int, runs: int) -> Record:
    """A step of greedy search and a whole call."""
    arguments = request(batch)
    found: Record = {
        "batch": batch, "num_beams": 1, "source_tokens": SOURCE_TOKENS, "new_tokens": NEW_TOKENS, "step_us": {},
    }  # fmt: skip
    attempt(found, "ours_ms", lambda: round(timed_ms(lambda: ours.generate(**arguments), runs)[0], 2))
    attempt(found["step_us"], "with choice", lambda: with_choice_us(ours, arguments))
    if peer is not None:
        attempt(found, "hf_eager_ms", lambda: peer_ms(peer, arguments, 1))
    return found


def throughput(ours: Any, peer: Any, batch: int, runs: int) -> Record:
    """Tokens per second of whole calls with long sources."""
    generator = torch.Generator().manual_seed(batch)
    ids = random_source(batch, LONGEST).to(kernel_models.DEVICE)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (batch, 1), generator=generator)
    mask = (torch.arange(LONGEST) < lengths).to(ids)
    fixed = {"min_new_tokens": LONG_NEW_TOKENS, "max_new_tokens": LONG_NEW_TOKENS, "do_sample": False, "num_beams": 1}
    arguments = {"input_ids": ids * mask, "attention_mask": mask, **fixed}
    found: Record = {
        "batch": batch, "num_beams": 1, "source_tokens": f"{SHORTEST} to {LONGEST}", "new_tokens": LONG_NEW_TOKENS,
        "tensorrt_llm_h100_tokens_per_s": PUBLISHED[batch],
    }  # fmt: skip

    def per_second(taken_ms: float) -> float:
        return round(batch * LONG_NEW_TOKENS / taken_ms * 1e3, 1)

    attempt(found, "ours_tokens_per_s", lambda: per_second(timed_ms(lambda: ours.generate(**arguments), runs)[0]))
    if "ours_tokens_per_s" in found:
        found["times_tensorrt_llm"] = round(found["ours_tokens_per_s"] / PUBLISHED[batch], 2)
    if peer is not None:
        with torch.no_grad():
            attempt(found, "hf_eager_tokens_per_s", lambda: per_second(wall_ms(lambda: peer.generate(**arguments))))
    return found


if __name__ == "__main__":
    main()
