"""Loading a model from a checkpoint's name and the arguments of ``from_pretrained``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from t5_trt.checkpoint.adapter_files import load_adapter, take_adapter
from t5_trt.checkpoint.files import check_indexes, correct_vocabulary
from t5_trt.checkpoint.load import HUB_ARGUMENTS, load_checked, load_config, load_tokenizer
from t5_trt.checkpoint.loading_report import Loading
from t5_trt.checkpoint.tokenizing import text_batches
from t5_trt.config import BuildConfig, RuntimeConfig
from t5_trt.engine.bundle import find_bundle
from t5_trt.modeling.runner import ModelSettings
from t5_trt.runtime.select import Placement, best_precision, choose, resolve
from t5_trt.validation import PRECISION_OF, as_dtype


@dataclass(frozen=True)
class LoadOptions:
    """The arguments of ``from_pretrained`` that this library adds.

    Attributes:
        runtime: how the model runs.
        build: settings of the engine builder.
        config: a config, or the name of one, to use instead of the checkpoint's.
        trust_engines: use engines stored with the checkpoint; None trusts a folder that is not a download.
        calibration: texts whose largest activations set the range of half precision.
    """

    runtime: RuntimeConfig
    build: BuildConfig
    config: Any
    trust_engines: bool | None
    calibration: Iterable[str] | None


def load_model(cls: Any, name: str, options: LoadOptions, *model_args: Any, **kwargs: Any) -> Any:
    """Load a checkpoint, and with ``output_loading_info=True`` return Transformers' dictionary about that, too.

    Args:
        cls: the requested class; the model's class combines it with the checkpoint's family.
        name: hub id or folder.
        options: our own arguments.
        model_args: Transformers'.
        kwargs: Transformers', checked by `t5_trt.modeling.loading_arguments.check_arguments`.
    """
    name, adapter = take_adapter(name, kwargs, HUB_ARGUMENTS)
    choose(options.runtime)  # fail before anything is downloaded
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    asked = None if dtype in (None, "auto") else as_dtype(dtype)
    reports, ignores = kwargs.pop("output_loading_info", False), kwargs.pop("ignore_mismatched_sizes", False)
    where = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    settings, config = dict(kwargs), options.config
    if config is None or isinstance(config, str | Path):
        config = load_config(str(config or name), encoder_only=cls._encoder_only, changes=kwargs, **where)
    chosen = cls._class_for(config)
    runtime, placement = _placed(options.runtime, asked, config, None if cls._encoder_only else config)
    if placement.backend == "tensorrt":
        runtime = replace(runtime, bundled_engines=find_bundle(name, options.trust_engines, **where))
    check_indexes(name, config, kwargs.get("variant"), **where)
    if not ignores:
        correct_vocabulary(name, config, kwargs.get("variant"), encoder_only=cls._encoder_only, **where)
    load = Loading(chosen._load_by_transformers, ignore_mismatched_sizes=ignores, reports=reports)
    # ONNX Runtime reads the memory of float32 parameters, and copies of others; plans hold converted copies
    stored = (asked or dtype or torch.float32) if placement.backend == "onnxruntime" else "auto"
    model = load_checked(load, name, config, *model_args, dtype=stored, **kwargs)
    load_adapter(adapter, model)
    taken = {key: value for key, value in settings.items() if key not in kwargs}  # by the config
    if taken and getattr(model, "generation_config", None) is not None:
        model.generation_config.update(**taken)
    batches = None
    if options.calibration is not None:
        tokenizer = load_tokenizer(name, **where)
        batches = list(text_batches(tokenizer, options.calibration, pad_token_id=config.pad_token_id))
    model._configure(ModelSettings(runtime, options.build, placement, batches))
    return (model, load.info) if reports else model


def _placed(
    runtime: RuntimeConfig, asked: torch.dtype | None, config: Any, decoder: Any
) -> tuple[RuntimeConfig, Placement]:
    """The settings with a precision for the checkpoint or the requested dtype, and the placement that follows from them."""
    if asked is None:
        runtime = replace(runtime, precision=best_precision(runtime, getattr(config, "dtype", None), decoder))
    elif runtime.precision == "auto" and choose(runtime, decoder).backend != "onnxruntime":
        runtime = replace(runtime, precision=PRECISION_OF[asked])
    return runtime, resolve(runtime, decoder)
