"""Time T5's encoder on an NVIDIA GPU: the library's kernels, its torch form, and Hugging Face's class, eager and compiled.

    python -m benchmarks.encoder --out FOLDER [--cases 16x512,1x32] [--layers 2] [--compiled 16x512]

T5-base shapes with random weights, fp16, cross-attention's K/V included where the library makes them. Times are those of the GPU by events,
medians of several rounds: of whole calls of the encoder, and of a CUDA graph of its work, which leaves the host out. For two sizes generate()
as a whole. Every case is written to FOLDER/encoder.json as it comes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import kernel_models
from benchmarks.gpu import events_ms, timed_ms
from benchmarks.kernel_models import attempt, base_name, keep, open_model, sizes, t5_base
from t5_trt.engine.store import EngineStore
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.parameters import EMBEDDING
from t5_trt.graph.relative_positions import distance_buckets
from t5_trt.kernels.compile import architecture_name, stored_cubin
from t5_trt.kernels.decode_step import model_constants
from t5_trt.kernels.encoder import SOURCE, EncoderKernels, refusal, relative_bias
from t5_trt.runtime.cuda_graph import capture
from t5_trt.runtime.device_weights import DeviceWeights
from t5_trt.runtime.kernel_encoder import KernelEncoder
from t5_trt.runtime.torch_layers import TorchEncoder
from t5_trt.tools.random_models import random_source
from t5_trt.tools.records import Record

#: (batch, source tokens)
CASES = ((16, 512), (1, 512), (1, 32), (8, 128), (32, 32))
#: beams of a generate() call of NEW_TOKENS new tokens, where one is timed
GENERATED = {(16, 512): 4, (1, 512): 1}
NEW_TOKENS = 64


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write; the status is 1 if one of our own forms could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--cases", help="comma-separated batch x source tokens; default: five of them")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument(
        "--store", type=Path, default=Path("/var/tmp/t5_trt-kernel-engines"), help="of compiled kernels"
    )
    parser.add_argument("--rounds", type=int, default=5, help="that a median is of")
    parser.add_argument("--no-peer", action="store_true", help="leave Hugging Face out")
    parser.add_argument(
        "--compiled", default="16x512", help="cases of torch.compile, which takes up to half a minute each"
    )
    given = parser.parse_args(arguments)
    cases = CASES if given.cases is None else sizes(given.cases)
    hugging_face = t5_base(given.layers)
    ours = open_model("cuda", hugging_face, "fp16", given.store)
    forms = open_forms(ours, given.store)
    peer = None if given.no_peer else t5_base(given.layers).half().to(kernel_models.DEVICE).encoder
    failed = False
    for batch, length in cases:
        found: Record = {"model": base_name(given.layers), "precision": "fp16", "backend": "cuda"}
        measure(found, ours, forms, batch, length, given.rounds)
        failed |= "failed" in found
        if peer is not None:
            compiled = (batch, length) in sizes(given.compiled)
            measure_peer(found, peer, batch, length, given.rounds, compiled=compiled)
        keep(given.out, "encoder", [found])
        print(summary(found), flush=True)
    sys.exit(1 if failed else 0)


def request(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and a mask that hides none."""
    ids = random_source(batch, length).to(kernel_models.DEVICE)
    return ids, torch.ones_like(ids)


@dataclass
class Forms:
    """The encoders of the backend "cuda" over one copy of a model's weights.

    Attributes:
        arch: of the model.
        weights: on the device, in the session's type.
        by_torch: the encoder of torch operations.
        by_kernels, kernels: the encoder that the backend uses, and its kernels; `by_torch` and None where those do not take the model.
    """

    arch: Architecture
    weights: DeviceWeights
    by_torch: TorchEncoder
    by_kernels: TorchEncoder
    kernels: EncoderKernels | None


def open_forms(ours: Any, store: Path) -> Forms:
    """The encoders of a model in fp16, with weights of their own."""
    session, tensors = ours.session, {name: tensor.cpu() for name, tensor in ours.state_dict().items()}
    arch, scaling, dtype = session.arch, session.scaling, session.dtype
    weights = DeviceWeights(arch, tensors, dtype, session.device, scaling)
    by_torch = TorchEncoder(arch, weights, scaling, "fp16")
    if refusal(arch, dtype):
        return Forms(arch, weights, by_torch, by_torch, None)
    constants, (major, minor) = model_constants(arch, dtype), torch.cuda.get_device_capability(session.device)
    cubin = stored_cubin(SOURCE, constants, architecture_name(major, minor), EngineStore(store))
    kernels = EncoderKernels(cubin, constants, session.device)
    return Forms(arch, weights, by_torch, KernelEncoder(kernels, arch, weights, scaling, "fp16"), kernels)


def measure(found: Record, ours: Any, forms: Forms, batch: int, length: int, rounds: int) -> None:
    """Times of our own forms, their parts, and how far apart their results are."""
    ids, mask = request(batch, length)
    found["batch"], found["source_tokens"] = batch, length
    session, by_kernels, by_torch = ours.session, forms.by_kernels, forms.by_torch
    found["form"] = by_kernels.name

    def work(encoder: Any) -> Callable[[], Any]:
        return lambda: encoder.cross(encoder.run(ids, None, mask))

    attempt(found, "ours_call_ms", lambda: median_ms(lambda: session.encode(ids, None, mask), rounds))
    attempt(found, "ours_ms", lambda: graph_ms(work(by_kernels), rounds))
    attempt(found, "torch_form_ms", lambda: graph_ms(work(by_torch), rounds))
    attempt(found, "difference_from_torch_form", lambda: difference(by_kernels, by_torch, ids, mask))
    if forms.kernels is not None:
        attempt(found, "parts_ms", lambda: parts_ms(forms, forms.kernels, ids, mask, rounds))
    if (batch, length) in GENERATED:
        beams = GENERATED[batch, length]
        options = {"num_beams": beams, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
        whole = partial(ours.generate, input_ids=ids, attention_mask=mask, **options)
        found["num_beams"], found["new_tokens"] = beams, NEW_TOKENS
        attempt(found, "generate_ms", lambda: round(timed_ms(lambda: (whole(), whole()), rounds)[0] / 2, 3))


def parts_ms(forms: Forms, own: Any, ids: torch.Tensor, mask: torch.Tensor, rounds: int) -> Record:
    """What each kind of kernel takes of an encoder of all layers, and both forms of attention."""
    arch, weights, layers, rows = forms.arch, forms.weights, forms.arch.encoder_layers, ids.numel()
    stream, dtype = torch.randn((rows, arch.d_model), device=ids.device), weights[EMBEDDING].dtype
    normed = stream.to(dtype)
    first = "encoder.block.0.layer"
    qkv = (normed @ weights[f"{first}.0.SelfAttention.qkv"]).view(*ids.shape, -1)
    inner = normed @ weights[f"{first}.1.DenseReluDense.wi"]
    buckets = distance_buckets(arch.num_buckets, arch.max_distance, bidirectional=True).to(ids.device)
    bias = relative_bias(weights[arch.bias_weight("encoder", 0)], buckets)
    keys = own.list_keys(mask)
    mixed, acted = qkv[..., : qkv.shape[-1] // 3].reshape(rows, -1), inner[:, : arch.d_ff].contiguous()
    made = forms.by_kernels.cross(normed.view(*ids.shape, -1))
    by_token = made.permute(2, 4, 0, 1, 3, 5).reshape(*ids.shape, -1)

    names = {
        "0.SelfAttention.qkv": normed,
        "0.SelfAttention.o": mixed,
        "1.DenseReluDense.wi": normed,
        "1.DenseReluDense.wo": acted,
    }
    pairs = [
        (given, weights[f"encoder.block.{layer}.layer.{name}"])
        for layer in range(layers)
        for name, given in names.items()
    ]
    turned = [(given, matrix.t().contiguous()) for given, matrix in pairs]
    wi, none = weights[f"{first}.1.DenseReluDense.wi"], inner.new_zeros(inner.shape[1])

    def repeated(work: Callable[[], Any], times: int = layers) -> Callable[[], None]:
        return lambda: [work() for _ in range(times)] and None

    works: dict[str, Callable[[], Any]] = {
        "products": lambda: [given @ matrix for given, matrix in pairs],
        "products, matrices [out, in]": lambda: [linear(given, matrix) for given, matrix in turned],
        "attention, narrow": repeated(lambda: own.attend(qkv, keys, bias, wide=False)),
        "attention, wide": repeated(lambda: own.attend(qkv, keys, bias, wide=True)),
        "sums and norms": repeated(lambda: own.add_and_norm(stream, normed, 1e-3, 1e-6, None, dtype), 2 * layers + 1),
        "activations": repeated(lambda: own.activate(inner)),
        "inner products": repeated(lambda: normed @ wi),
        "inner products with relu in them": repeated(lambda: torch._addmm_activation(none, normed, wi)),
        "cross product": lambda: normed @ weights["decoder.cross_kv"],
        "cross split": lambda: own.split_heads(by_token, 2 * arch.decoder_layers),
        "keys": lambda: own.list_keys(mask),
    }
    found: Record = {}
    for name, work in works.items():
        attempt(found, name, lambda work=work: graph_ms(work, rounds))
    return found


def measure_peer(found: Record, peer: Any, batch: int, length: int, rounds: int, *, compiled: bool) -> None:
    """Hugging Face's encoder in float16, without cross-attention's K/V."""
    ids, mask = request(batch, length)

    def call(encoder: Any) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return encoder(input_ids=ids, attention_mask=mask)

        return run

    attempt(found, "hf_eager_ms", lambda: median_ms(call(peer), rounds))
    if compiled:
        attempt(found, "hf_compiled_ms", lambda: median_ms(call(torch.compile(peer, dynamic=False)), rounds))


def difference(by_kernels: Any, by_torch: Any, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """Length of the difference of both forms' results beside that of a result."""
    ours, expected = (each.run(ids, None, mask).float() for each in (by_kernels, by_torch))
    return float((ours - expected).norm() / expected.norm())


def median_ms(work: Callable[[], Any], rounds: int) -> float:
    """The GPU's time for one of ten calls in a row, the median of rounds."""
    work()
    return round(statistics.median(events_ms(work, 10) for _ in range(rounds)), 4)


def graph_ms(work: Callable[[], Any], rounds: int) -> float:
    """As `median_ms`, of a CUDA graph of the work."""
    graph = capture(work, torch.device(kernel_models.DEVICE, 0))
    return median_ms(graph.replay, rounds)


def summary(found: Record) -> str:
    """One line for a terminal."""
    return (
        f"{found['batch']}x{found['source_tokens']} {found['form']}: {found.get('ours_ms')} ms (a call {found.get('ours_call_ms')}), torch "
        f"form {found.get('torch_form_ms')}, Hugging Face {found.get('hf_eager_ms')}, compiled {found.get('hf_compiled_ms')}; generate "
        f"{found.get('generate_ms')}; difference {found.get('difference_from_torch_form')}; parts {found.get('parts_ms')}"
    )


if __name__ == "__main__":
    main()
