"""Checks of ``from_pretrained`` arguments that engines do not support."""

from __future__ import annotations

import logging
from typing import Any

import torch

from t5_trt.errors import InputError
from t5_trt.validation import as_device, device_of_map

logger = logging.getLogger("t5_trt")
#: arguments that let a checkpoint or a hub run code -> values that do not
_SAFE = {"trust_remote_code": False, "weights_only": True, "allow_all_kernels": False, "use_kernels": False}
_QUANTIZED = "engines choose their own types. Use precision='int8', or precision='fp16' (on a GPU)"
_ONE_DEVICE = "an engine runs on one device. Use device='cuda:0' or device='cpu'"
#: unsupported arguments -> the reason, and what to do instead
_REFUSED = {
    "quantization_config": _QUANTIZED,
    "load_in_8bit": _QUANTIZED,
    "load_in_4bit": _QUANTIZED,
    "gguf_file": "load the file with the Hugging Face class, save_pretrained() that model and load the folder",
    "max_memory": _ONE_DEVICE,
    "cpu_offload": _ONE_DEVICE,
    "tp_plan": _ONE_DEVICE,
    "tp_size": _ONE_DEVICE,
    "device_mesh": _ONE_DEVICE,
    "distributed_config": _ONE_DEVICE,
    "kernel_config": "engines have kernels of their own; leave it out",
}
#: folders for offloaded weights: ignored, as nothing is offloaded
_WITHOUT_EFFECT = ("offload_folder", "offload_buffers", "offload_state_dict")
#: attention implementations that every installation of torch has
_ATTENTION = ("eager", "sdpa")


def check_arguments(arguments: dict[str, Any]) -> None:
    """Remove arguments without effect on engines, with a warning where a user could expect another result.

    Args:
        arguments: of ``from_pretrained``; changed in place.

    Raises:
        InputError: one asks for quantization, several devices, offloading or another file format.
    """
    for name, why in _REFUSED.items():
        value = arguments.pop(name, None)
        if value is not None and value is not False:
            raise InputError(f"{name} got {value!r}, which is not supported: {why}.")
    for name, safe in _SAFE.items():
        given = arguments.pop(name, None)
        if given is not None and given != safe:
            logger.warning(
                "%s=%s is not used: no code of a checkpoint or hub is run. The Hugging Face class can do it.",
                name,
                given,
            )
    for name in _WITHOUT_EFFECT:
        arguments.pop(name, None)
    attention = arguments.get("attn_implementation")
    if attention is not None and attention not in _ATTENTION:
        del arguments["attn_implementation"]
        logger.warning("attn_implementation=%r is not used: engines have attention of their own.", attention)


def chosen_device(device: str | torch.device | int | None, arguments: dict[str, Any]) -> str | None:
    """The device that ``device``, or else ``device_map``, names; ``device_map`` is taken out of the arguments.

    Raises:
        InputError: engines do not run on it, or it names several devices.
    """
    mapped = device_of_map(arguments.pop("device_map", None))
    return as_device("device", mapped if device is None else device)
