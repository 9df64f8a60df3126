"""Times ``generate()`` on engines, in Hugging Face's class and in CTranslate2, and compares the tokens.

All run in this process, on the same device, in turns. Results are records (dicts for JSON), which `t5_trt.tools.records` stores
and shows. Parts of a call are not timed here: see ``benchmarks/engines.py``.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM

from t5_trt.checkpoint.load import load_config, load_tokenizer
from t5_trt.checkpoint.tokenizing import padded, token_rows
from t5_trt.engine.tensorrt_api import load_tensorrt
from t5_trt.errors import InputError
from t5_trt.generation.search_settings import length_limit, one_search
from t5_trt.modeling import TRTT5ForConditionalGeneration
from t5_trt.tools.ctranslate2_library import import_ctranslate2
from t5_trt.tools.ctranslate2_peer import CTranslate2Model
from t5_trt.tools.environment import environment
from t5_trt.tools.random_models import RANDOM, random_source, random_t5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request to time.

    Attributes:
        batch: rows.
        source_tokens: of each row, where tokens are random.
        new_tokens: exact number of tokens that every row generates.
        num_beams: 1 is greedy search, or sampling.
        do_sample: draw tokens, with the same seed before every call.
    """

    batch: int = 1
    source_tokens: int = 32
    new_tokens: int = 64
    num_beams: int = 1
    do_sample: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "source_tokens", "new_tokens", "num_beams"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} got {value!r}; expected an integer of at least 1.")


@dataclass
class Baseline:
    """A model, and further arguments of its ``generate()``."""

    model: Any
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Benchmark:
    """What `load_benchmark` loaded.

    Attributes:
        name: of the model, for records.
        ours: the model on engines.
        baselines: name in records, such as "hf_eager_fp32" or "ctranslate2_int8", -> another model on the same device.
        left_out: name in records -> why that model is not measured.
        tokenizer: of the checkpoint, or None where its weights are random.
    """

    name: str
    ours: TRTT5ForConditionalGeneration
    baselines: dict[str, Baseline]
    left_out: dict[str, str]
    tokenizer: Any = None


def load_benchmark(
    model: str,
    *,
    hugging_face: bool = True,
    texts: bool = False,
    threads: int | None = None,
    against: str | None = None,
    **options: Any,
) -> Benchmark:
    """Load a model on engines, and Hugging Face's class with the same weights on the same device.

    On a GPU Hugging Face runs in float32, in float16, and in float16 with a static cache and torch.compile; on a CPU in
    float32 only.

    Args:
        model: a folder, a hub id, or "random:" and a key of `SHAPES`.
        hugging_face: also load Hugging Face's class.
        texts: also load the tokenizer.
        threads: CPU threads of each; None leaves torch's number.
        against: "ctranslate2" to load it too, in the precision of ours.
        options: as of ``from_pretrained``, such as ``backend`` and ``precision``.

    Raises:
        InputError: there is no such random model, or `texts` with one; or CTranslate2 does not take this model or precision.
        BackendError: CTranslate2 is not installed.
        T5TRTError: loading failed, see ``TRTT5ForConditionalGeneration.from_pretrained``.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if against not in (None, "ctranslate2"):
        raise InputError(f"against got {against!r}; expected None or 'ctranslate2'.")
    if against:
        import_ctranslate2()
    shape = model.removeprefix(RANDOM) if model.startswith(RANDOM) else None
    if shape is not None and texts:
        raise InputError(
            f"texts got a model with random weights, {model!r}, which has no tokenizer. Name a checkpoint."
        )
    if shape is not None:
        first = random_t5(shape)
        ours = TRTT5ForConditionalGeneration.from_model(first, num_threads=threads, **options)
        name = f"{shape} shapes, random weights, seed 0"
    else:
        ours = TRTT5ForConditionalGeneration.from_pretrained(model, num_threads=threads, **options)
        name = Path(model).resolve().name if Path(model).is_dir() else model
        safe: dict[str, Any] = {"config": load_config(model), "trust_remote_code": False}
        first = None
        if hugging_face or against:
            first = AutoModelForSeq2SeqLM.from_pretrained(model, dtype=torch.float32, **safe).eval()
    benchmark = Benchmark(name, ours, {}, {}, load_tokenizer(model) if texts else None)
    if hugging_face:
        _add_hugging_face(benchmark, first)
    if against:
        precision, device = ours.session.precision, ours.device
        benchmark.baselines[f"ctranslate2_{precision}"] = Baseline(CTranslate2Model(first, precision, device, threads))
    return benchmark


def _add_hugging_face(benchmark: Benchmark, first: Any) -> None:
    """Add Hugging Face's models, made of one in float32 on the CPU."""
    device = benchmark.ours.device
    if device.type == "cpu":
        benchmark.baselines["hf_eager_fp32"] = Baseline(first)
        benchmark.left_out = {
            "hf_eager_fp16": "float16 is measured on GPUs only",
            "hf_compiled_fp16": "Transformers compiles generate() on GPUs only",
        }
        return
    # copies: from_model shares the memory of `first`
    half = copy.deepcopy(first).half().to(device)
    benchmark.baselines["hf_eager_fp32"] = Baseline(copy.deepcopy(first).to(device))
    benchmark.baselines["hf_eager_fp16"] = Baseline(half)
    if find_spec("triton"):
        benchmark.baselines["hf_compiled_fp16"] = Baseline(half, {"cache_implementation": "static"})
    else:  # torch would notice only after half a minute, for every case
        benchmark.left_out["hf_compiled_fp16"] = "torch.compile needs the package triton, which is not installed"


def measure(benchmark: Benchmark, case: Case, runs: int = 5, texts: Sequence[str] | None = None) -> dict[str, Any]:
    """Time one request on all models of a benchmark.

    The first two calls of each model, which build and open engines or compile, are not among the runs.

    Args:
        benchmark: the models.
        case: the request.
        runs: timed calls of each model, in turns.
        texts: sources, repeated until there are `case.batch` of them; None takes random tokens.

    Returns:
        The record. ``*_ms`` are medians and ``*_p90_ms`` 90th percentiles in milliseconds of the whole ``generate()`` call,
        ``*_first_call_s`` seconds, ``*_busy_cores`` how many CPU cores worked on average, ``speedup`` and ``tokens_equal`` are against ``hf_eager_fp32`` and None without it.

    Raises:
        InputError: `runs` is below 1, `texts` is empty, or there is no tokenizer for them.
        T5TRTError: our model failed. One of Hugging Face's that fails is left out, and the record says why.
    """
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise InputError(f"runs got {runs!r}; expected an integer of at least 1.")
    ours, request = benchmark.ours, _request(benchmark, case, texts)
    running, tokens, first_call_s, left_out = _warm_up(benchmark, request)
    loop = str(ours.last_generation_path)
    times: dict[str, list[float]] = {name: [] for name in running}
    cores: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(runs):
        for name, baseline in running.items():
            busy = time.process_time()
            seconds = _call(baseline, request, ours.device)[1]
            times[name].append(seconds * 1e3)
            cores[name].append((time.process_time() - busy) / seconds)
    medians = {name: statistics.median(found) for name, found in times.items()}
    share = equal_share(tokens["ours"], tokens["hf_eager_fp32"]) if "hf_eager_fp32" in running else None
    tensorrt = load_tensorrt(ours.runtime_config.flavor).version if ours.session.backend == "tensorrt" else None
    return {
        **_settings(benchmark, case, request),
        "source": "random tokens" if texts is None else "texts",
        "threads": torch.get_num_threads(),
        "runs": runs,
        **_speeds(case, times, first_call_s),
        **{f"{name}_busy_cores": round(statistics.median(found), 2) for name, found in cores.items()},
        **_shares(tokens, running),
        "speedup": None if share is None else round(medians["hf_eager_fp32"] / medians["ours"], 2),
        "tokens_equal": None if share is None else share == 1.0,
        "tokens_equal_share": None if share is None else round(share, 4),
        "distinct_tokens": int(tokens["ours"].unique().numel()),
        "loop": loop,
        "left_out": left_out,
        **environment(tensorrt),
    }


def _settings(benchmark: Benchmark, case: Case, request: dict[str, Any]) -> dict[str, Any]:
    """The fields of a record about the model and the request."""
    ours = benchmark.ours
    return {
        "model": benchmark.name,
        "backend": ours.session.backend,
        "precision": ours.session.precision,
        "decode": ours.session.steps_by,
        "prepack_weights": ours.runtime_config.prepack_weights,
        "batch": case.batch,
        "source_tokens": request["input_ids"].shape[1],
        "new_tokens": case.new_tokens,
        "num_beams": case.num_beams,
        "do_sample": case.do_sample,
    }


def _speeds(case: Case, times: dict[str, list[float]], first_call_s: dict[str, float]) -> dict[str, float]:
    """The fields of a record about each model's times, in milliseconds."""
    record: dict[str, float] = {}
    for name, found in times.items():
        median = statistics.median(found)
        record[f"{name}_ms"] = round(median, 2)
        record[f"{name}_p90_ms"] = round(sorted(found)[int(0.9 * (len(found) - 1) + 0.5)], 2)
        per_s = round(case.batch * case.new_tokens / median * 1e3, 1)
        record["tokens_per_s" if name == "ours" else f"{name}_tokens_per_s"] = per_s
        record["first_call_s" if name == "ours" else f"{name}_first_call_s"] = round(first_call_s[name], 2)
    return record


def _shares(tokens: dict[str, torch.Tensor], running: Collection[str]) -> dict[str, float]:
    """The fields of a record about equal tokens beside Hugging Face's, for other models than ours."""
    if "hf_eager_fp32" not in running:
        return {}
    others = [name for name in running if name not in ("ours", "hf_eager_fp32")]
    return {
        f"{name}_tokens_equal_share": round(equal_share(tokens[name], tokens["hf_eager_fp32"]), 4) for name in others
    }


def equal_share(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Share of positions with the same token, int64 [B, T] each; positions that only one of them has count as different."""
    width = min(got.shape[1], expected.shape[1])
    longest = max(got.shape[1], expected.shape[1])
    return int((got[:, :width] == expected[:, :width]).sum()) / (len(expected) * longest)


def _warm_up(benchmark: Benchmark, request: dict[str, Any]) -> tuple[Any, Any, Any, dict[str, str]]:
    """Call each model twice; return the working ones (ours last), their tokens, seconds of the first call, and failures."""
    device, compiled = benchmark.ours.device, "hf_compiled_fp16"
    working, tokens, seconds, left_out = {}, {}, {}, dict(benchmark.left_out)
    for name, baseline in {**benchmark.baselines, "ours": Baseline(benchmark.ours)}.items():
        if name == compiled:
            torch.compiler.reset()  # torch stops compiling silently after some shapes
            baseline.model.__dict__.pop("_compiled_call", None)
        try:
            tokens[name], seconds[name] = _call(baseline, request, device)
            _call(baseline, request, device)
        except Exception as error:
            if name == "ours":
                raise
            left_out[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            continue
        if name == compiled and "_compiled_call" not in baseline.model.__dict__:
            left_out[name] = "Transformers did not compile this request"
            continue
        working[name] = baseline
    return working, tokens, seconds, left_out


def _request(benchmark: Benchmark, case: Case, texts: Sequence[str] | None) -> dict[str, Any]:
    config = benchmark.ours.generation_config
    if texts is None:
        ids = random_source(case.batch, case.source_tokens, benchmark.ours.config.vocab_size)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif not texts:
        raise InputError("texts got none; expected at least one line that is not empty.")
    elif benchmark.tokenizer is None:
        raise InputError(
            "texts got lines for a benchmark without a tokenizer. Load it with load_benchmark(..., texts=True)."
        )
    else:
        rows = token_rows(benchmark.tokenizer, [texts[row % len(texts)] for row in range(case.batch)])
        inputs = padded(benchmark.tokenizer, rows, benchmark.ours.config.pad_token_id)
    return {
        **{name: tensor.to(benchmark.ours.device) for name, tensor in inputs.items()},
        **one_search(config, num_beams=case.num_beams, do_sample=case.do_sample),
        **length_limit(config, case.new_tokens),
        "min_new_tokens": case.new_tokens,
    }


def _call(baseline: Baseline, request: dict[str, Any], device: torch.device) -> tuple[torch.Tensor, float]:
    """The tokens of one call, and its time in seconds, including the GPU's work."""
    if request["do_sample"]:
        torch.manual_seed(0)
    _wait(device)
    start = time.perf_counter()
    tokens = baseline.model.generate(**request, **baseline.options)
    _wait(device)
    return tokens, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
