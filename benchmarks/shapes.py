"""Models with published shapes and random weights for benchmarks: no download, the same work as the real checkpoint."""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers
from transformers import T5Config, T5ForConditionalGeneration

#: published T5 v1.0 shapes (Raffel et al. 2020, table 14)
SHAPES: dict[str, dict[str, Any]] = {
    "t5-small": {"d_model": 512, "d_ff": 2048, "num_heads": 8, "num_layers": 6},
    "t5-base": {"d_model": 768, "d_ff": 3072, "num_heads": 12, "num_layers": 12},
}


#: seed of `random_source`: of 49 sources the one whose 99 greedy tokens through T5-base shapes keep the largest distance
#: between the two best logits (0.59 at least; stock T5 in half precision is off by 0.27 at most), 81 kinds of token among 99
SOURCE_SEED = 33


def random_t5(shape: str, seed: int = 0) -> T5ForConditionalGeneration:
    """A stock float32 model of a published shape whose greedy tokens vary, with margins that half precision keeps.

    A fresh T5 repeats one token: the tied head finds the input embedding again in the residual stream, and attention is
    nearly even. Random signs in the last norm's weight break the first; large relative biases and queries and small
    residual branches the second. The factor 30 spreads the logits (standard deviation 30).
    """
    torch.manual_seed(seed)
    config = T5Config(vocab_size=32128, d_kv=64, decoder_start_token_id=0, **SHAPES[shape])
    model = T5ForConditionalGeneration(config).eval()
    factors = {".o.weight": 0.3, ".wo.weight": 0.3, ".q.weight": 3.0, "relative_attention_bias.weight": 40.0}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(next((factor for end, factor in factors.items() if name.endswith(end)), 1.0))
        signs = torch.randint(0, 2, (config.d_model,)) * 2 - 1
        model.decoder.final_layer_norm.weight.mul_(30.0 * signs)
    return model


def random_source(rows: int, tokens: int) -> torch.Tensor:
    """Random ids, int64 [rows, tokens]."""
    return torch.randint(2, 32000, (rows, tokens), generator=torch.Generator().manual_seed(SOURCE_SEED))


def environment() -> dict[str, Any]:
    """Versions and hardware of this run, for a result record."""
    import onnxruntime

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
        "machine": platform.machine(),
        "processor": _processor(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
