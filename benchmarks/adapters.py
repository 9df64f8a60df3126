"""Switching between two LoRA adapters of T5-base shapes: time, memory, and whether tokens come back bit for bit.

Rank 16 on q and v. It needs peft, which may as well lie in a folder on PYTHONPATH. A switch is ``set_adapter()`` and all that it takes
until the weights that engines and kernels read are those of the other adapter; on a GPU it is waited for. The first switch to an adapter is
told apart.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

SWITCHES, NEW_TOKENS = 20, 24
NAMES = ("default", "second")


def with_adapters(model: Any, rank: int, targets: list[str]) -> Any:
    """A PeftModel around a model, with two random adapters."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="SEQ_2_SEQ_LM")
    wrapped = get_peft_model(model, config)
    wrapped.add_adapter(NAMES[1], config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:  # zeros so far
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def switch(wrapped: Any, model: Any, name: str) -> float:
    """Make an adapter active and bring the open engines up to date; ms."""
    start = time.perf_counter()
    wrapped.set_adapter(name)
    _ = model.session
    wait(model)
    return (time.perf_counter() - start) * 1e3


def wait(model: Any) -> None:
    """Wait for the GPU, if there is one at work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def used_mb(model: Any) -> float:
    """Memory in 10**6 bytes: of the GPU, or what this process has to itself (mapped files do not count)."""
    gc.collect()
    if model.device.type == "cuda":
        return torch.cuda.memory_allocated(model.device) / 1e6
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024 / 1e6


def measure(backend: str, precision: str, rank: int, targets: list[str]) -> dict[str, Any]:
    """Load, add two adapters, switch to and fro."""
    from t5_trt import TRTT5ForConditionalGeneration
    from t5_trt.tools.environment import environment
    from t5_trt.tools.random_models import random_source, random_t5

    model = TRTT5ForConditionalGeneration.from_model(random_t5("t5-base"), backend=backend, precision=precision)
    ids = random_source(4, 32).to(model.device)

    def tokens() -> list[Any]:
        greedy = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
        return [model.generate(ids, num_beams=beams, **greedy).cpu() for beams in (1, 4)]

    plain = tokens()
    before = used_mb(model)
    wrapped = with_adapters(model, rank, targets)
    session = model.session
    adapted = {NAMES[0]: tokens()}
    first = switch(wrapped, model, NAMES[1])
    adapted[NAMES[1]] = tokens()
    after = used_mb(model)
    times, equal = [], True
    for index in range(SWITCHES):
        name = NAMES[index % 2]
        times.append(switch(wrapped, model, name))
        if index < 4:
            equal &= all(torch.equal(a, b) for a, b in zip(tokens(), adapted[name], strict=True))
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    matrices = sum(layer.base_layer.weight.numel() for layer in layers) * 4 / 1e6
    lora = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name) / 1e6
    return {
        "model": "t5-base shapes, random weights",
        "adapters": f"2 x LoRA, rank {rank}, on {', '.join(targets)}: {len(layers)} matrices",
        "backend": model.session.backend,
        "precision": model.session.precision,
        "switch_ms": {
            "median": round(statistics.median(times), 2),
            "least": round(min(times), 2),
            "most": round(max(times), 2),
        },
        "first_switch_to_an_adapter_ms": round(first, 1),
        "same_session": model.session is session,
        "tokens_come_back": equal,
        "tokens_differ_between_adapters": not torch.equal(adapted[NAMES[0]][0], adapted[NAMES[1]][0]),
        "tokens_differ_from_base": not torch.equal(adapted[NAMES[0]][0], plain[0]),
        "adapted_matrices_mb_float32": round(matrices, 1),
        "adapters_own_mb": round(lora, 1),
        "memory_more_mb": round(after - before, 1),
        **environment(),
    }


def main() -> None:
    """Measure, print and store one record for each backend."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--backend", action="append", help="onnxruntime, cuda or tensorrt; several: the default is all but tensorrt"
    )
    parser.add_argument("--precision", default="auto", help="fp32, fp16, bf16 or int8")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="q,v", help="names of the adapted matrices, with commas")
    parser.add_argument("--json", type=Path, help="file to write the records to")
    args = parser.parse_args()
    backends = args.backend or ["onnxruntime", *(["cuda"] if torch.cuda.is_available() else [])]
    records = [measure(backend, args.precision, args.rank, args.targets.split(",")) for backend in backends]
    text = json.dumps(records, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
