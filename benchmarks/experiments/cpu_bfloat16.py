"""Products, decoder step and encoder in bfloat16 by PyTorch on a CPU, in turns with our float32 and int8 by ONNX Runtime.

Outcome: no ``precision="bf16"`` on CPUs. A step of one row takes as long as ours in float32, because what half of the bytes saves goes to
PyTorch's small operations, and int8 is faster in all cases but the encoder of long sources (see docs/performance.md). T5-base shapes.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.graph.relative_positions import distance_buckets
from t5_trt.runtime.kv_buffers import CrossStates
from t5_trt.tools.environment import environment
from t5_trt.tools.random_models import random_source, random_t5

BF16, ROUNDS, TOKENS, SOURCE = torch.bfloat16, 7, 40, 32
#: (batch, beams) of steps
STEPS = ((1, 1), (8, 1), (1, 4))
#: (batch, tokens, rounds) of encoders
SOURCES = ((1, 32, 9), (8, 32, 7), (8, 512, 2))


class Step:
    """One decoder step for R rows up to the logits, with few operations; features come before rows, as in W x.

    Matrices, keys and values are bfloat16, the residual stream and norms float32. A norm's weight is in the matrices behind it, and its
    epsilon is left out.

    Args:
        model: Hugging Face's, of T5 v1.0.
        cross: sources' K and V.
    """

    def __init__(self, model: Any, cross: CrossStates) -> None:
        config, weights = model.config, model.state_dict()
        self.heads, self.width, self.size = config.num_heads, config.d_kv, config.d_model
        self.rows, self.batch, self.beams = cross.rows, cross.batch, cross.beams
        self.embedding = weights["shared.weight"].to(BF16)
        self.layers = [self.matrices(weights, f"decoder.block.{i}.layer") for i in range(config.num_decoder_layers)]
        # sqrt(E) of the norm and 1 / sqrt(E) of T5's output cancel out
        self.head = (weights["shared.weight"] * weights["decoder.final_layer_norm.weight"]).to(BF16)
        buckets = distance_buckets(
            config.relative_attention_num_buckets, config.relative_attention_max_distance, bidirectional=False
        )
        table = weights["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        self.bias = table[buckets[torch.arange(TOKENS).clamp(max=len(buckets) - 1)]].t().flip(1).to(BF16)
        self.cross = cross.kv.to(BF16).flatten(2, 3)  # [L, 2, B * H, S, D]
        self.cross_bias = torch.zeros((1, 1, 1), dtype=BF16)
        self.kv = torch.zeros((len(self.layers), 2, self.rows, self.heads, TOKENS, self.width), dtype=BF16)
        self.scale, self.normed = torch.empty(1, self.rows), torch.empty(self.size, self.rows, dtype=BF16)

    def matrices(self, weights: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
        """A layer's matrices by the ends of their names, with q, k and v as one."""
        root = self.size**0.5
        norms = [weights[f"{layer}.{i}.layer_norm.weight"] * root for i in range(3)]
        qkv = torch.cat([weights[f"{layer}.0.SelfAttention.{name}.weight"] for name in "qkv"])
        made = {
            "qkv": qkv * norms[0],
            "self_out": weights[f"{layer}.0.SelfAttention.o.weight"],
            "query": weights[f"{layer}.1.EncDecAttention.q.weight"] * norms[1],
            "cross_out": weights[f"{layer}.1.EncDecAttention.o.weight"],
            "wi": weights[f"{layer}.2.DenseReluDense.wi.weight"] * norms[2],
            "wo": weights[f"{layer}.2.DenseReluDense.wo.weight"],
        }
        return {name: matrix.to(BF16) for name, matrix in made.items()}

    def product(self, matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """W x for [inputs, R]."""
        return torch.mv(matrix, columns[:, 0])[:, None] if self.rows == 1 else torch.mm(matrix, columns)

    def norm(self, stream: torch.Tensor) -> torch.Tensor:
        """The stream over its length, in bfloat16."""
        torch.linalg.vector_norm(stream, dim=0, keepdim=True, out=self.scale)
        return torch.div(stream, self.scale, out=self.normed)

    def run(self, tokens: torch.Tensor, position: int) -> torch.Tensor:
        """Logits float32 [R, V] of int64 [R, 1] at a position."""
        rows, batch, beams, heads, width = self.rows, self.batch, self.beams, self.heads, self.width
        stream = self.embedding[tokens[:, 0]].float().t().contiguous()
        bias = self.bias[:, TOKENS - 1 - position :].repeat(rows, 1)[:, None]
        for kv, (cross_k, cross_v), own in zip(self.kv, self.cross, self.layers, strict=True):
            qkv = self.product(own["qkv"], self.norm(stream)).view(3, heads, width, rows).permute(0, 3, 1, 2)
            kv.select(3, position).copy_(qkv[1:])
            keys, values = kv.flatten(1, 2).narrow(2, 0, position + 1)
            shares = torch.baddbmm(bias, qkv[0].reshape(-1, 1, width), keys.transpose(1, 2)).softmax(-1)
            mixed = torch.bmm(shares, values).view(rows, heads * width).t()
            stream.add_(self.product(own["self_out"], mixed))
            query = self.product(own["query"], self.norm(stream)).view(heads, width, batch, beams).permute(2, 0, 3, 1)
            query = query.reshape(-1, beams, width)
            shares = torch.baddbmm(self.cross_bias, query, cross_k.transpose(1, 2)).softmax(-1)
            mixed = torch.bmm(shares, cross_v).view(batch, heads, beams, width)
            stream.add_(self.product(own["cross_out"], mixed.permute(1, 3, 0, 2).reshape(heads * width, rows)))
            inner = self.product(own["wi"], self.norm(stream)).relu_()
            stream.add_(self.product(own["wo"], inner))
        return self.product(self.head, self.norm(stream)).t().float()


def in_turns(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median time of each, in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: round(statistics.median(each), 2) for name, each in times.items()}


def time_products(step: Step) -> dict[str, float]:
    """All of a step's products without anything between them, by several operators; output matrix apart."""
    layers = [matrix for layer in step.layers for matrix in layer.values()]
    works: dict[str, Callable[[], Any]] = {}
    for part, matrices in (("layers", layers), ("head", [step.head])):
        packed = [torch.ops.mkldnn._reorder_linear_weight(matrix, step.rows) for matrix in matrices]
        columns = [torch.randn(matrix.shape[1], step.rows).to(BF16) for matrix in matrices]
        rows = [each.t().contiguous() for each in columns]

        def multiply(a: Any = matrices, b: Any = columns) -> None:
            for matrix, given in zip(a, b, strict=True):
                step.product(matrix, given)

        def linear(a: Any = matrices, b: Any = rows) -> None:
            for matrix, given in zip(a, b, strict=True):
                torch.nn.functional.linear(given, matrix)

        def prepacked(a: Any = packed, b: Any = rows) -> None:
            for matrix, given in zip(a, b, strict=True):
                torch.ops.mkldnn._linear_pointwise(given, matrix, None, "none", [], "")

        works |= {f"{part}, W x": multiply, f"{part}, linear": linear, f"{part}, packed linear": prepacked}
    in_turns(works, 1)
    return in_turns(works, ROUNDS)


def time_steps(model: Any, float32: Any, batch: int, beams: int) -> dict[str, Any]:
    """A step by ONNX Runtime in float32 and by PyTorch in bfloat16, and how far logits are apart."""
    ids = random_source(batch, SOURCE)
    _, cross = float32.encode(ids, None, torch.ones_like(ids))
    cross = cross.for_beams(beams)
    step, tokens = Step(model, cross), random_source(batch * beams, TOKENS)
    state = float32.start(cross, TOKENS)
    apart = []
    for position in range(TOKENS):
        made = step.run(tokens[:, position, None], position)
        expected = float32.decode(state, tokens[:, position, None])[:, 0]
        apart.append(float((made - expected).norm() / expected.norm()))

    def ours() -> None:
        state.crop(0)
        for position in range(TOKENS):
            float32.decode(state, tokens[:, position, None])

    def torchs() -> None:
        for position in range(TOKENS):
            step.run(tokens[:, position, None], position)

    whole = in_turns({"fp32, ONNX Runtime": ours, "bf16, PyTorch": torchs}, ROUNDS)
    per_step = {name: round(each / TOKENS, 2) for name, each in whole.items()}
    return {"step_ms": per_step, "products_ms": time_products(step), "largest_difference": round(max(apart), 4)}


@torch.inference_mode()
def main() -> None:
    """Print one record for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=("step", "encoder"), default=("step", "encoder"))
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = random_t5("t5-base")
    float32, int8 = (
        TRTT5ForConditionalGeneration.from_model(
            model, backend="onnxruntime", precision=precision, num_threads=given.threads
        ).session
        for precision in ("fp32", "int8")
    )
    if "step" in given.parts:
        for batch, beams in STEPS:
            record = {"batch": batch, "num_beams": beams, **time_steps(model, float32, batch, beams), **environment()}
            print(json.dumps(record), flush=True)
    if "encoder" in given.parts:
        wide, narrow = model.encoder, copy.deepcopy(model.encoder).to(BF16)
        for batch, tokens, rounds in SOURCES:
            ids = random_source(batch, tokens)
            works = {
                "fp32, ONNX Runtime": lambda ids=ids: float32.encode(ids, None, torch.ones_like(ids)),
                "int8, ONNX Runtime": lambda ids=ids: int8.encode(ids, None, torch.ones_like(ids)),
                "fp32, Hugging Face": lambda ids=ids: wide(ids),
                "bf16, Hugging Face": lambda ids=ids: narrow(ids),
            }
            in_turns(works, 1)
            print(json.dumps({"batch": batch, "source_tokens": tokens, "encoder_ms": in_turns(works, rounds)}))


if __name__ == "__main__":
    main()
