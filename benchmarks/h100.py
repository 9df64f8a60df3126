"""Records of a run on a GPU with TensorRT: build, load, equality with the stock class, step and whole-call times.

Stages are separate commands because builds are long and timing wants a quiet machine: ``build`` fills the store, the
others use it. Every stage appends to the same JSON file.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.shapes import environment, random_source, random_t5
from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.engine.store import EngineStore
from t5_trt.engine.tensorrt_api import load_tensorrt
from tests.tiny_models import batch, make_stock

NEW_TOKENS, SOURCE_TOKENS = 99, 32


def gpu_environment() -> dict[str, Any]:
    """Versions, GPU and driver."""
    return environment(load_tensorrt().version)


def median_ms(work: Callable[[], Any], runs: int = 5) -> float:
    """Median wall time of `work` in milliseconds, the GPU's work included, after one warm-up."""
    work()
    times = []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def request(rows: int = 1, **options: Any) -> dict[str, Any]:
    """Random ids of T5-base shapes and a fixed number of new tokens."""
    ids = random_source(rows, SOURCE_TOKENS).cuda()
    fixed = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **fixed, **options}


def stage_build(store: Path, precision: str) -> list[dict[str, Any]]:
    """Build T5-base's encoder and step side by side."""
    model = TRTT5ForConditionalGeneration.from_model(
        random_t5("t5-base"), backend="tensorrt", precision=precision, engine_cache_dir=store
    )
    start = time.perf_counter()
    model.generate(**request() | {"min_new_tokens": 2, "max_new_tokens": 2})
    print(f"{precision}: first call with builds {time.perf_counter() - start:.1f} s")
    return []


def stage_base(store: Path, precision: str) -> list[dict[str, Any]]:
    """T5-base shapes, batch 1: load from the store, compare tokens, time everything."""
    stock = random_t5("t5-base")
    ours = TRTT5ForConditionalGeneration.from_model(
        stock, backend="tensorrt", precision=precision, engine_cache_dir=store
    )
    start = time.perf_counter()
    ours.generate(**request() | {"min_new_tokens": 2, "max_new_tokens": 2})
    load_s = time.perf_counter() - start
    stock = stock.cuda()
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = stock.generate(**request())
    got = ours.generate(**request())
    hf_fp32_ms = median_ms(lambda: stock.generate(**request()), 3)
    ours_ms = median_ms(lambda: ours.generate(**request()))
    stock.half()
    hf_fp16_ms = median_ms(lambda: stock.generate(**request()), 3)
    builds = {
        entry.manifest["graph"]: entry.manifest["build_s"]
        for entry in EngineStore(store).entries()
        if entry.manifest["precision"] == precision and entry.manifest["architecture"] == asdict(ours.architecture)
    }
    ours(
        **{name: request()[name] for name in ("input_ids", "attention_mask")},
        decoder_input_ids=torch.zeros_like(got[:, :1]),
    )
    gc.collect()  # requests that are over give their slots back
    slot = next(slots[-1] for slots in ours.session._idle.values() if slots)
    ids, mask = request()["input_ids"], request()["attention_mask"]
    record = {
        "model": "t5-base shapes, random weights, seed 0",
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
        "step_us": round(_step_us(slot), 1),
        "encoder_ms": round(_events_ms(lambda: ours.session.encode(ids, None, mask), 20), 3),
        **_kernels(slot),
        **gpu_environment(),
    }
    print(json.dumps(record, indent=1))
    return [record]


def _events_ms(work: Callable[[], Any], times: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    work()
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def _step_us(slot: Any) -> float:
    """GPU time of one replayed step without a choice of tokens, positions running from 0 to NEW_TOKENS - 1."""
    slot.position.fill_(0)
    slot.position_host = -1
    return _events_ms(slot.steps[None].graph.replay, NEW_TOKENS) * 1e3


def _kernels(slot: Any) -> dict[str, Any]:
    """Kernels of one step: how many, their summed time, and the most expensive names."""
    slot.position.fill_(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            slot.steps[None].graph.replay()
        torch.cuda.synchronize()
    slot.position_host = -1
    events = [e for e in profile.key_averages() if e.device_time_total > 0]
    top = sorted(events, key=lambda e: -e.device_time_total)[:14]
    return {
        "step_kernels": sum(e.count for e in events) // 10,
        "step_kernel_sum_us": round(sum(e.device_time_total for e in events) / 10, 1),
        "top_kernels": [[e.key[:70], e.count / 10, round(e.device_time_total / 10, 1)] for e in top],
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


def stage_families(store: Path, precision: str) -> list[dict[str, Any]]:
    """Two-layer models of every kind: 40 greedy tokens of batches with padding, against the stock class."""
    records = []
    for kind, sizes in FAMILIES.items():
        ours = TRTT5ForConditionalGeneration.from_model(
            family(kind), backend="tensorrt", precision=precision, engine_cache_dir=store
        )
        stock = family(kind).cuda()
        for rows in (1, 3):
            inputs = {name: tensor.cuda() for name, tensor in batch(rows).items()}
            wanted = {**inputs, "max_new_tokens": 40, "min_new_tokens": 40}
            got, expected = ours.generate(**wanted), stock.generate(**wanted)
            records.append(
                {
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
            )
            print(kind, rows, records[-1]["tokens_equal"], records[-1]["distinct_tokens"], flush=True)
    return records


def stage_shipped(store: Path, precision: str) -> list[dict[str, Any]]:
    """500 sentences through the shipped model in several batch sizes, greedy and with 4 beams."""
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns in every call about max_length
    folder = ROOT / "examples" / "kana_romaji"
    words = (ROOT / "examples" / "data" / "kana.txt").read_text(encoding="utf-8").split()
    chooser = random.Random(0)
    sentences = [" ".join(chooser.choices(words, k=chooser.randint(1, 5))) for _ in range(500)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stock = T5ForConditionalGeneration.from_pretrained(folder).cuda().eval()
    ours = TRTT5ForConditionalGeneration.from_pretrained(
        folder, backend="tensorrt", precision=precision, engine_cache_dir=store
    )

    def run(model: Any, size: int, beams: int, texts: list[str] = sentences) -> tuple[list[list[int]], float]:
        results: list[list[int]] = []
        start = time.perf_counter()
        for first in range(0, len(texts), size):
            inputs = tokenizer(texts[first : first + size], return_tensors="pt", padding=True).to("cuda")
            rows = model.generate(**inputs, num_beams=beams, max_new_tokens=96).tolist()
            results += [row[: row.index(1) + 1] if 1 in row else row for row in rows]
        torch.cuda.synchronize()
        return results, (time.perf_counter() - start) * 1e3

    records = []
    for beams in (1, 4):
        expected, stock_ms = run(stock, 50, beams)
        for size in (1, 7, 16):
            run(ours, size, beams, sentences[:64])  # builds what is missing
            got, ours_ms = run(ours, size, beams)
            for source, left, right in zip(sentences, got, expected, strict=True):
                if left != right:
                    print(f"differs at batch {size}, {beams} beams: {source}: {left} against {right}", flush=True)
            equal = sum(a == b for a, b in zip(got, expected, strict=True))
            records.append(
                {
                    "model": "kana_romaji, 500 sentences",
                    "precision": precision,
                    "batch": size,
                    "num_beams": beams,
                    "sentences_equal": equal,
                    "tokens_equal": equal == len(sentences),
                    "ours_ms": round(ours_ms, 1),
                    "hf_eager_fp32_ms_batch_50": round(stock_ms, 1),
                    **gpu_environment(),
                }
            )
            print(beams, size, equal, ours_ms, stock_ms, flush=True)
    return records


STAGES = {"build": stage_build, "base": stage_base, "families": stage_families, "shipped": stage_shipped}


def main() -> None:
    """Run one stage and append its records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    records = STAGES[args.stage](args.store, args.precision)
    if args.json and records:
        known = json.loads(args.json.read_text()) if args.json.exists() else []
        args.json.write_text(json.dumps([*known, *records], indent=2) + "\n")


if __name__ == "__main__":
    main()
