"""Records of a run on a GPU with TensorRT: build, load, equality with the stock class, step and whole-call times.

Stages are separate commands because builds are long and timing wants a quiet machine: ``build`` fills the store, the
others use it. Every stage appends to the same JSON file.
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.gpu import (
    BASE,
    NEW_TOKENS,
    SOURCE_TOKENS,
    Records,
    events_ms,
    gpu_environment,
    kernels,
    main,
    our_model,
    replay_us,
    request,
    timed_ms,
)
from t5_trt.engine.profiles import SMALLEST
from t5_trt.engine.store import EngineStore
from t5_trt.random_models import random_t5
from tests.tiny_models import batch, make_stock


def stage_build(store: Path, precision: str) -> Records:
    """Build T5-base's encoder and step side by side."""
    model, start = our_model(store, precision), time.perf_counter()
    model.generate(**request(new=2))
    print(f"{precision}: first call with builds {time.perf_counter() - start:.1f} s")
    return iter(())


def stage_base(store: Path, precision: str) -> Records:
    """T5-base shapes, batch 1: load from the store, compare tokens, time everything."""
    stock = random_t5("t5-base")
    ours, start = our_model(store, precision, stock), time.perf_counter()
    ours.generate(**request(new=2))
    load_s = time.perf_counter() - start
    stock = random_t5("t5-base").cuda()
    torch.backends.cuda.matmul.allow_tf32 = False
    expected, got = stock.generate(**request()), ours.generate(**request())
    hf_fp32_ms, _ = timed_ms(lambda: stock.generate(**request()), 3)
    ours_ms, _ = timed_ms(lambda: ours.generate(**request()))
    stock.half()
    hf_fp16_ms, _ = timed_ms(lambda: stock.generate(**request()), 3)
    wanted = {"precision": precision, "architecture": asdict(ours.architecture)}
    builds = {}
    for entry in EngineStore(store).entries():
        made = entry.manifest
        smallest = made["shapes"]["B"] == made["shapes"]["N"] == 1 and made["shapes"]["T"] <= SMALLEST["T"]
        if smallest and all(made[name] == value for name, value in wanted.items()):
            builds[made["graph"]] = made["build_s"]
    ours(
        **{name: request()[name] for name in ("input_ids", "attention_mask")},
        decoder_input_ids=torch.zeros_like(got[:, :1]),
    )
    gc.collect()  # requests that are over give their slots back
    slot = next(slots[-1] for slots in ours.session._idle.values() if slots)
    ids, mask = request()["input_ids"], request()["attention_mask"]
    yield {
        "model": BASE,
        "precision": precision,
        "batch": 1,
        "source_tokens": SOURCE_TOKENS,
        "new_tokens": NEW_TOKENS,
        "num_beams": 1,
        "ours_ms": round(ours_ms, 2),
        "hf_eager_fp32_ms": round(hf_fp32_ms, 1),
        "hf_eager_fp16_ms": round(hf_fp16_ms, 1),
        "tokens_equal": bool(torch.equal(got, expected)),
        "tokens_equal_share": (got == expected).float().mean().item(),
        "distinct_tokens": int(expected.unique().numel()),
        "build_s": builds,
        "load_s": round(load_s, 2),
        "step_us": round(replay_us(slot), 1),
        "encoder_ms": round(events_ms(lambda: ours.session.encode(ids, None, mask)), 3),
        **kernels(slot),
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
    """A stock model of two layers whose activations stay moderate at these widths."""
    model = make_stock(kind, seed=SEEDS[kind], **FAMILIES[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and name != "shared.weight" and "relative" not in name:
                parameter.mul_((64 / FAMILIES[kind]["d_model"]) ** 0.5)
    return model


def stage_families(store: Path, precision: str) -> Records:
    """Two-layer models of every kind: 40 greedy tokens of batches with padding, against the stock class."""
    for kind, sizes in FAMILIES.items():
        ours = our_model(store, precision, family(kind))
        stock = family(kind).cuda()
        for rows in (1, 3):
            inputs = {name: tensor.cuda() for name, tensor in batch(rows).items()}
            wanted = {**inputs, "max_new_tokens": 40, "min_new_tokens": 40}
            got, expected = ours.generate(**wanted), stock.generate(**wanted)
            yield {
                "model": f"{kind}, 2 layers, {sizes}, random weights",
                "precision": precision,
                "batch": rows,
                "source_tokens": 11,
                "new_tokens": 40,
                "num_beams": 1,
                "tokens_equal": bool(torch.equal(got, expected)),
                "distinct_tokens": int(expected.unique().numel()),
                **gpu_environment(),
            }


STAGES = {"build": stage_build, "base": stage_base, "families": stage_families}

if __name__ == "__main__":
    main(__doc__, STAGES, "fp32")
