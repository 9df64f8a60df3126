"""Ways to multiply a step's queries with the cached keys, each built as a TensorRT engine and timed on a GPU.

Outcome: the graph multiplies keys by query (`DeviceGraphBuilder.key_product`). With query times keys TensorRT 8.5 makes a multiplication and
a sum of the product, which takes 561 us against 498 for a step of three layers of T5-base with 128 rows (see docs/performance.md).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from benchmarks.gpu import SOURCE_TOKENS, Records, gpu_environment, kernels, main, replay_us
from t5_trt.engine.profiles import SMALLEST
from t5_trt.graph.builders import DeviceGraphBuilder
from t5_trt.tools.random_models import SHAPES, random_t5

#: (batch, beams, cache tokens) of the steps that `stage_scores` compares
SCORE_CASES = ((32, 4, 128), (32, 4, 64), (8, 4, 128))
SCORE_LAYERS = 3


def score_forms() -> dict[str, Callable[[Any, Any, Any], Any]]:
    """Name -> how a step multiplies its queries with the cached keys; `DeviceGraphBuilder.key_product` is "keys times query"."""

    def several_rows(count: int) -> Callable[[Any, Any, Any], Any]:
        def product(graph: Any, query: Any, keys: Any) -> Any:
            wide = graph.op("Concat", *[query] * count, axis=1)
            scores = graph.op("MatMul", wide, graph.transpose(keys, 0, 2, 1))  # [R*H, count, T]
            return graph.op("Slice", scores, graph.ints(0), graph.ints(1), graph.ints(1))

        return product

    def query_first(graph: Any, query: Any, keys: Any) -> Any:
        return graph.op("MatMul", query, graph.transpose(keys, 0, 2, 1))

    def as_a_sum(graph: Any, query: Any, keys: Any) -> Any:
        return graph.op("ReduceSum", graph.op("Mul", query, keys), graph.ints(2), keepdims=0)

    return {
        "query times keys": query_first,
        "keys times query": DeviceGraphBuilder.key_product,
        "2 equal queries": several_rows(2),
        "8 equal queries": several_rows(8),
        "product and sum": as_a_sum,
    }


def stage_scores(store: Path, precision: str) -> Records:
    """A decoder step of `SCORE_LAYERS` layers of T5-base with its queries and cached keys multiplied in several ways."""
    from t5_trt import TRTT5ForConditionalGeneration
    from t5_trt.graph.signature import STEP
    from t5_trt.runtime.kv_buffers import CrossStates

    SHAPES["t5-base"] = {**SHAPES["t5-base"], "num_layers": SCORE_LAYERS}
    SMALLEST["T"] = min(tokens for _, _, tokens in SCORE_CASES)
    first: dict[Any, torch.Tensor] = {}
    for name, form in score_forms().items():
        DeviceGraphBuilder.key_product = form  # type: ignore[method-assign]
        ours = TRTT5ForConditionalGeneration.from_model(
            random_t5("t5-base"),
            backend="tensorrt",
            decode="engine",
            precision=precision,
            engine_cache_dir=store / name.replace(" ", "-"),  # the graph is not part of an engine's key
            check_engines=False,
        )
        session, arch = ours.session, ours.session.arch
        bucket, start = session.engines.bucket, time.perf_counter()
        shapes = [bucket(B=entries, N=beams, S=SOURCE_TOKENS, T=tokens) for entries, beams, tokens in SCORE_CASES]
        session.engines.prefetch([(STEP, each.for_graph(STEP)) for each in shapes])
        print(f"{name}: built in {time.perf_counter() - start:.1f} s", flush=True)
        for entries, beams, tokens in SCORE_CASES:
            generator = torch.Generator().manual_seed(0)
            cross, past = (
                0.5
                * torch.randn((arch.decoder_layers, 2, rows, arch.num_heads, length, arch.d_kv), generator=generator)
                for rows, length in ((entries, SOURCE_TOKENS), (entries * beams, 40))
            )
            state = session.start(CrossStates(cross.to(session.device, session.dtype), beams), tokens)
            state.append(past.to(session.device, session.dtype))
            ids = torch.randint(2, 32000, (entries * beams, 1), generator=generator)
            logits = session.decode(state, ids.to(session.device)).float()
            expected = first.setdefault((entries, beams), logits)
            slot = state.binding.slot
            found = kernels(slot)
            yield {
                "compared": f"a step of {SCORE_LAYERS} layers of T5-base: how queries meet the cached keys",
                "form": name,
                "precision": precision,
                "batch": entries,
                "num_beams": beams,
                "cache_tokens": tokens,
                "step_us": round(min(replay_us(slot, steps=20) for _ in range(9)), 1),
                "error": round(float((logits - expected).norm() / expected.norm()), 6),
                **found,
                **gpu_environment(),
            }


STAGES = {"scores": stage_scores}

if __name__ == "__main__":
    main(__doc__, STAGES, "fp16")
