"""Folders and hub ids that contain a peft adapter and name its base model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, find_adapter_config_file, is_peft_available

from t5_trt.errors import CheckpointError, InputError, T5TRTError

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """An adapter that was given instead of a model.

    Attributes:
        name: its folder or hub id.
        base: name of the base model.
        options: arguments of Transformers' ``load_adapter``.
    """

    name: str
    base: str
    options: dict[str, Any] = field(default_factory=dict)


def load_adapter(adapter: Adapter | None, model: Any) -> None:
    """Load an adapter into its base model; None does nothing.

    Raises:
        CheckpointError: tensors are missing, it does not fit the model, its files are damaged, or peft does not fit Transformers.
    """
    if adapter is None:
        return
    try:
        info = model.load_adapter(adapter.name, **adapter.options)
    except T5TRTError:
        raise
    except Exception as error:  # of Transformers, peft, safetensors and the hub
        raise CheckpointError(
            f"cannot load the adapter {adapter.name!r} into {adapter.base!r}: {type(error).__name__}: {error} Expected what "
            "save_pretrained() of peft writes for this model."
        ) from error
    missing = sorted(info.missing_keys)
    if missing:
        raise CheckpointError(
            f"the adapter {adapter.name!r} lacks {len(missing)} tensors (first {missing[0]!r}); expected one for each layer that its "
            "config names. Save it again; with peft 0.19 and older, whose names Transformers does not find, use a newer peft."
        )


def take_adapter(name: str, arguments: dict[str, Any], hub_arguments: tuple[str, ...]) -> tuple[str, Adapter | None]:
    """The name of the model to load, and the adapter if the name is one's.

    Args:
        name: folder or hub id.
        arguments: of ``from_pretrained``; those of the adapter are removed.
        hub_arguments: names of the arguments that locate a checkpoint.

    Raises:
        CheckpointError: the adapter's config cannot be read, or names no model.
        InputError: peft is not installed.
    """
    found = _find_config(name, {key: arguments[key] for key in hub_arguments if key in arguments})
    if found is None:
        return name, None
    try:
        stored = json.loads(found.read_text(encoding="utf-8"))
        base = stored["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{ADAPTER_CONFIG} of {name!r} cannot be used: {type(error).__name__}: {error}."
        ) from error
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{ADAPTER_CONFIG} of {name!r} has base_model_name_or_path={base!r}; expected a folder or hub id. Load the base model, then "
            "model.load_adapter()."
        )
    # these refer to the adapter's repository, the others to both
    own = {key: arguments.pop(key) for key in ("revision", "subfolder") if key in arguments}
    if stored.get("revision"):
        arguments["revision"] = stored["revision"]
    shared = {key: arguments[key] for key in hub_arguments if key in arguments and key != "revision"}
    options: dict[str, Any] = {"adapter_kwargs": {**shared, **own, **(arguments.pop("adapter_kwargs", None) or {})}}
    if Path(name).exists():  # Transformers 5.17 looks for a local config in no subfolder
        name = str(found.parent)
        options["adapter_kwargs"].pop("subfolder", None)
    if "adapter_name" in arguments:
        options["adapter_name"] = arguments.pop("adapter_name")
    return base, Adapter(name, base, options)


def _find_config(name: str, where: dict[str, Any]) -> Path | None:
    """The config of an adapter; None if there is none, or if it is beside a whole model."""
    if not Path(name).exists():
        path = find_adapter_config_file(name, **where) if is_peft_available() else None
        return None if path is None else Path(path)
    folder: Path = Path(name) / where.get("subfolder", "")
    found = folder / ADAPTER_CONFIG
    if not found.is_file() or (folder / CONFIG_NAME).is_file():
        return None
    if not is_peft_available():
        raise InputError(f"{name!r} is an adapter; expected peft, which is not installed: `pip install t5-trt[peft]`.")
    return found
