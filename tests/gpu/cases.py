"""What tests on a GPU share: requests and models there, checkpoints that overflow float16, the buffers of a session."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from t5_trt import TRTT5ForConditionalGeneration
from tests.tiny_models import FACTORS, large_logits, swollen

LOGITS_ATOL = 1e-3  # float32 on a GPU: sums in another order than cuBLAS's, over logits of the order of 1 to 10


def on_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with tensors, and those inside of processors, on the GPU, where the Hugging Face class wants them."""
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    if "logits_processor" in moved:
        moved["logits_processor"] = copy.deepcopy(moved["logits_processor"])
        for processor in moved["logits_processor"]:
            for name, value in vars(processor).items():
                if isinstance(value, torch.Tensor):
                    setattr(processor, name, value.cuda())
    return moved


def idle_slots(session: Any) -> list[Any]:
    """The buffers of decoder steps, of either kind, that no request uses."""
    idle = session._slots.idle if session.steps_by == "engine" else session._steps._idle
    return [slot for slots in idle.values() for slot in slots]


def cuda_model(hugging_face: Any, store: Path, precision: str = "fp32", device: str = "cuda") -> Any:
    return TRTT5ForConditionalGeneration.from_model(
        hugging_face, backend="cuda", precision=precision, device=device, engine_cache_dir=store
    )


#: name -> what makes a checkpoint overflow half precision
OVERFLOWING = {
    **{
        f"feed-forward times {inner, output}": partial(swollen, inner=inner, output=output) for inner, output in FACTORS
    },
    **{f"embedding and head times {factor:g}": partial(large_logits, factor=factor) for factor in (2.0**15, 2.0**18)},
}
