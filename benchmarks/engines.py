"""Time TensorRT's engines on a GPU: builds, loading, a step and whole calls; and compare tokens with Hugging Face's class.

Stages are separate commands because builds are long and timing wants a quiet machine: ``build`` fills the store, the
others use it. Every stage appends to the same JSON file.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.gpu import (
    BASE,
    NEW_TOKENS,
    SOURCE_TOKENS,
    Records,
    call_times,
    engine_times,
    gpu_environment,
    kernels,
    load_seconds,
    main,
    our_model,
    request,
    slot_alone,
)
from t5_trt.tools.random_models import random_t5
from tests.tiny_models import batch, make_hugging_face


def stage_build(store: Path, precision: str) -> Records:
    """Build T5-base's encoder and step side by side."""
    model, start = our_model(store, precision), time.perf_counter()
    model.generate(**request(new=2))
    print(f"{precision}: first call with builds {time.perf_counter() - start:.1f} s")
    return iter(())


def stage_base(store: Path, precision: str) -> Records:
    """T5-base shapes, batch 1: load from the store, compare tokens, time everything."""
    load_s = load_seconds(store, precision, request(new=2))
    ours, hugging_face = our_model(store, precision), random_t5("t5-base").cuda()
    torch.backends.cuda.matmul.allow_tf32 = False
    expected, got = hugging_face.generate(**request()), ours.generate(**request())
    yield {
        "model": BASE,
        "precision": precision,
        "batch": 1,
        "source_tokens": SOURCE_TOKENS,
        "new_tokens": NEW_TOKENS,
        "num_beams": 1,
        **call_times(ours, hugging_face, request()),
        "tokens_equal": bool(torch.equal(got, expected)),
        "tokens_equal_share": (got == expected).float().mean().item(),
        "distinct_tokens": int(expected.unique().numel()),
        "load_s": round(load_s, 2),
        **engine_times(store, ours, request()),
        **kernels(slot_alone(ours, request())),
        **gpu_environment(),
    }


#: two layers of published shapes (mT5-small: d_kv * num_heads is not d_model)
FAMILIES: dict[str, dict[str, int]] = {
    "t5-v1.1": {"d_model": 768, "d_ff": 2048, "d_kv": 64, "num_heads": 12, "vocab_size": 32128},
    "mt5": {"d_model": 512, "d_ff": 1024, "d_kv": 64, "num_heads": 6, "vocab_size": 250112},
    "umt5": {"d_model": 512, "d_ff": 1024, "d_kv": 64, "num_heads": 6, "vocab_size": 256384},
}


#: seeds for which no two best logits of a step come closer than 0.4% of the logits' spread, found on the CPU: closer ones may
#: change places by rounding alone
SEEDS = {"t5-v1.1": 5, "mt5": 5, "umt5": 4}


def family(kind: str) -> Any:
    """A Hugging Face model of two layers whose activations stay moderate at these widths."""
    model = make_hugging_face(kind, seed=SEEDS[kind], **FAMILIES[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and name != "shared.weight" and "relative" not in name:
                parameter.mul_((64 / FAMILIES[kind]["d_model"]) ** 0.5)
    return model


def stage_families(store: Path, precision: str) -> Records:
    """Two-layer models of every kind: 40 greedy tokens of batches with padding, against the Hugging Face class."""
    for kind, sizes in FAMILIES.items():
        ours = our_model(store, precision, family(kind))
        hugging_face = family(kind).cuda()
        for rows in (1, 3):
            inputs = {name: tensor.cuda() for name, tensor in batch(rows).items()}
            wanted = {**inputs, "max_new_tokens": 40, "min_new_tokens": 40}
            got, expected = ours.generate(**wanted), hugging_face.generate(**wanted)
            load_s = load_seconds(store, precision, {**wanted, "min_new_tokens": 2, "max_new_tokens": 2}, family(kind))
            yield {
                "model": f"{kind}, 2 layers, {sizes}, random weights",
                "precision": precision,
                "batch": rows,
                "source_tokens": 11,
                "new_tokens": 40,
                "num_beams": 1,
                **call_times(ours, hugging_face, wanted),
                "tokens_equal": bool(torch.equal(got, expected)),
                "distinct_tokens": int(expected.unique().numel()),
                "load_s": round(load_s, 2),
                **engine_times(store, ours, wanted),
                **gpu_environment(),
            }


STAGES = {"build": stage_build, "base": stage_base, "families": stage_families}

if __name__ == "__main__":
    main(__doc__, STAGES, "fp32")
