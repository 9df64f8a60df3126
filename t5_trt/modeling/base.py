"""What every model on engines has: loading, its session, its stock twin, saving, pickling.

The model *is* a stock module tree whose parameters are loaded by Transformers; the engines read the same memory. So
``isinstance`` checks, ``state_dict()``, ``save_pretrained`` and ``model.reference`` need no second copy of the weights. The
forward pass is not here: see `modeling/forward.py` and `modeling/encoder.py`; nor devices and dtypes, `modeling/placement.py`, nor
which class an instance has, `modeling/family_class.py`.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import PreTrainedModel

from t5_trt.checkpoint.adapter_files import load_adapter, take_adapter
from t5_trt.checkpoint.families import read_architecture
from t5_trt.checkpoint.files import check_indexes, correct_vocabulary
from t5_trt.checkpoint.load import (
    HUB_ARGUMENTS,
    check_tensors,
    load_checked,
    load_config,
    load_tokenizer,
    scales_decoder_output,
    share_weights,
    without_data,
)
from t5_trt.checkpoint.loading_report import Loading
from t5_trt.checkpoint.tokenizing import text_batches
from t5_trt.config import BuildConfig, RuntimeConfig, backend_from_environment
from t5_trt.engine.bundle import find_bundle
from t5_trt.errors import InputError, StrictModeError
from t5_trt.generation.repeats import Repeats
from t5_trt.generation.request import GenerationPath
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.parameters import EMBEDDING, HEAD
from t5_trt.modeling.adapted_model import AdaptedModel
from t5_trt.modeling.adapter_layers import adapter_layers
from t5_trt.modeling.adapters import AdaptedWeights, base_weights
from t5_trt.modeling.encoder import attach_encoder, engine_encoder
from t5_trt.modeling.family_class import FamilyClass
from t5_trt.modeling.forward import EngineForward, ordinary_tensors
from t5_trt.modeling.layer_checks import check_layers
from t5_trt.modeling.loading_arguments import check_arguments
from t5_trt.modeling.placement import PlacedModel
from t5_trt.modeling.reference import follow, make_reference, share_layers
from t5_trt.modeling.weight_tracker import WeightWatch
from t5_trt.runtime.forks import abandon, watch_forks
from t5_trt.runtime.select import best_precision, choose, resolve
from t5_trt.runtime.session import Session
from t5_trt.validation import PRECISION_OF, as_device, as_dtype, device_of_map

logger = logging.getLogger("t5_trt")
Self = TypeVar("Self", bound="EngineModel")
_DERIVED = ("_session", "_session_weights", "_adapted", "_reference", "_reference_weights", "_architecture")


class EngineModel(FamilyClass, PlacedModel, AdaptedModel, EngineForward, PreTrainedModel):
    """Base of the models on engines; a subclass of it is mixed in before the stock class of each family.

    Args:
        config: a T5Config, MT5Config or UMT5Config; the weights are random, as in the stock classes.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._runtime_config = RuntimeConfig()
        self._build_config = BuildConfig()
        self._placement_ = None
        self._session = None
        self._session_weights: WeightWatch | None = None
        self._adapted: AdaptedWeights | None = None
        self._reference: PreTrainedModel | None = None
        self._reference_weights: WeightWatch | None = None
        self._architecture: Architecture | None = None
        self._last_path: GenerationPath | None = None
        self._calibration: list[Any] | None = None
        self._attach()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[Self],
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        config: Any = None,
        backend: str | None = None,
        precision: str = "auto",
        decode: str = "auto",
        device: str | torch.device | int | None = None,
        strict: bool = False,
        num_threads: int | None = None,
        prepack_weights: bool | None = None,
        max_source_tokens: int | None = None,
        max_target_tokens: int | None = None,
        engine_cache_dir: str | Path | None = None,
        engine_cache_bytes: int | None = None,
        flavor: str | None = None,
        show_progress: bool | None = None,
        check_engines: bool = True,
        trust_engines: bool | None = None,
        build: BuildConfig | None = None,
        calibration: Iterable[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a checkpoint of the T5 family. No engine is built or opened yet.

        Args:
            pretrained_model_name_or_path: a hub id or a folder written by ``save_pretrained``, of a model or an adapter of peft.
            model_args: passed on to Transformers.
            config: a config to use instead of the checkpoint's.
            backend: "auto", "tensorrt", "cuda" or "onnxruntime"; default ``T5_TRT_BACKEND``, else "auto".
            precision: "auto", "fp32", "tf32", "fp16", "bf16" or "int8" (8-bit matrices; on GPUs experimental).
            decode: who does the one-token decoder step on a GPU: "auto", "kernels" (the library's own CUDA kernels) or "engine".
            device: where the engines run, such as "cuda:0"; None lets the backend choose.
            strict: raise instead of using the stock PyTorch model where engines cannot serve a request.
            num_threads: CPU threads of ONNX Runtime; None takes torch's number.
            prepack_weights: faster beams and batches on CPU for more memory; None packs the decoder once it has several rows.
            max_source_tokens: refuse longer sources.
            max_target_tokens: refuse longer outputs.
            engine_cache_dir: folder of built engines; default ``T5_TRT_CACHE``, else the user's cache folder.
            engine_cache_bytes: above this size the engines used least recently are removed.
            flavor: "tensorrt" or "rtx"; default ``T5_TRT_FLAVOR``, else the one that is installed.
            show_progress: draw a bar while engines are built; None does so on a terminal only.
            check_engines: compare each new engine with ONNX Runtime once, on random inputs, before it is used.
            trust_engines: use engines that come with the checkpoint; by default those of a folder that is no download from a
                hub. An engine is code: whoever wrote it can do what you can.
            build: settings of the engine builder.
            calibration: texts whose largest activations set the range of half precision; None goes by the weights.
            kwargs: what Transformers takes: cache_dir, revision, token, subfolder, ``device_map`` (read as a device), ``dtype`` (on a GPU
                the precision, on a CPU that of parameters and results; default: float32), ...

        Returns:
            The model, in evaluation mode; with ``output_loading_info=True`` also Transformers' dictionary about the loading.

        Raises:
            CheckpointError: files are missing, damaged, or do not fit each other.
            UnsupportedModelError: the checkpoint is not of the T5 family.
            BackendError: the backend that was asked for cannot run here.
            InputError: an argument has no meaning.
        """
        if pretrained_model_name_or_path is None:
            raise InputError("got None; expected a hub id or a folder. For a model in memory use from_model(model).")
        name = str(pretrained_model_name_or_path)
        check_arguments(kwargs)
        name, adapter = take_adapter(name, kwargs, HUB_ARGUMENTS)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        mapped = device_of_map(kwargs.pop("device_map", None))
        device = mapped if device is None else device
        reports, ignores = kwargs.pop("output_loading_info", False), kwargs.pop("ignore_mismatched_sizes", False)
        runtime = RuntimeConfig(
            backend=backend_from_environment(backend),
            precision=precision,
            decode=decode,
            device=as_device("device", device),
            strict=strict,
            num_threads=num_threads,
            prepack_weights=prepack_weights,
            max_source_tokens=max_source_tokens,
            max_target_tokens=max_target_tokens,
            engine_cache_dir=None if engine_cache_dir is None else Path(engine_cache_dir),
            engine_cache_bytes=engine_cache_bytes,
            flavor=flavor,
            show_progress=show_progress,
            check_engines=check_engines,
        )
        choose(runtime)  # what cannot run here is said before anything is fetched
        asked = None if dtype in (None, "auto") else as_dtype(dtype)
        where, settings = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}, dict(kwargs)
        if config is None or isinstance(config, str | Path):
            config = load_config(str(config or name), encoder_only=cls._encoder_only, changes=kwargs, **where)
        chosen, decoder = cls._class_for(config), None if cls._encoder_only else config
        if asked is None:
            runtime = replace(runtime, precision=best_precision(runtime, getattr(config, "dtype", None), decoder))
        elif precision == "auto" and choose(runtime, decoder).backend != "onnxruntime":
            runtime = replace(runtime, precision=PRECISION_OF[asked])
        placement = resolve(runtime, decoder)
        if placement.backend == "tensorrt":
            runtime = replace(runtime, bundled_engines=find_bundle(name, trust_engines, **where))
        check_indexes(name, config, kwargs.get("variant"), **where)
        if not ignores:
            variant = kwargs.get("variant")
            correct_vocabulary(name, config, variant, encoder_only=cls._encoder_only, **where)
        load = Loading(super(EngineModel, chosen).from_pretrained, ignore_mismatched_sizes=ignores, reports=reports)
        # ONNX Runtime reads the memory of float32 parameters, and copies of others; plans hold converted copies
        stored = (asked or dtype or torch.float32) if placement.backend == "onnxruntime" else "auto"
        model = load_checked(load, name, config, *model_args, dtype=stored, **kwargs)
        load_adapter(adapter, model)
        taken = {key: value for key, value in settings.items() if key not in kwargs}  # by the config
        if taken and getattr(model, "generation_config", None) is not None:
            model.generation_config.update(**taken)
        model._configure(runtime, build or BuildConfig(), placement)
        if calibration is not None:
            batches = text_batches(load_tokenizer(name, **where), calibration, pad_token_id=config.pad_token_id)
            model._calibration = list(batches)
        return cast("Self", (model, load.info) if reports else model)

    @classmethod
    def from_model(cls: type[Self], model: PreTrainedModel, **options: Any) -> Self:
        """Wrap a stock model that is in memory, for example one that was just fine-tuned. Its weights are shared.

        Args:
            model: a Hugging Face model of the same kind, in float32, float16 or bfloat16, on the CPU.
            options: `RuntimeConfig` fields, ``build`` as in `from_pretrained`, and ``calibration``: batches of
                ``input_ids`` and ``attention_mask``.

        Raises:
            InputError: the weights have another dtype, or are not on the CPU.
            UnsupportedModelError: the model is not of the T5 family, or has other modules than its class.
        """
        if not isinstance(model, PreTrainedModel):
            raise InputError(
                f"from_model got {type(model).__name__}; expected a Transformers model, uncompiled, or of a PeftModel "
                "its get_base_model()."
            )
        chosen = cls._class_for(model.config)
        kinds = {(p.dtype, p.device.type) for p in model.parameters()}
        wrong = sorted(
            f"{str(dtype)[6:]} on {place}" for dtype, place in kinds if dtype not in PRECISION_OF or place != "cpu"
        )
        if wrong:
            raise InputError(
                f"from_model got weights of {', '.join(wrong)}; expected float32, float16 or bfloat16 on cpu: "
                "model.float().cpu()."
            )
        build, calibration = options.pop("build", None), options.pop("calibration", None)
        runtime = RuntimeConfig(**{**options, "backend": backend_from_environment(options.get("backend"))})
        placement = resolve(runtime, None if cls._encoder_only else model.config)
        wrapped = share_layers(chosen, model) if adapter_layers(model) else share_weights(chosen, model)
        wrapped._configure(runtime, build or BuildConfig(), placement)
        wrapped._calibration = None if calibration is None else list(calibration)
        if hasattr(model, "generation_config"):
            wrapped.generation_config = model.generation_config
        return cast("Self", wrapped)

    @property
    def session(self) -> Session:
        """The opened engines over the weights as they are now; opening happens at the first use.

        Raises:
            UnsupportedModelError: modules of the model were exchanged.
        """
        self._notice_changes()
        return self._opened()

    def _notice_changes(self) -> None:
        """Drop engines over weights that have changed since they were opened; not within a ``generate()`` that has looked."""
        if self._beams_ahead is not None:
            return
        if self._session is None:
            self._check_values()
        elif self._session_weights is not None and self._session_weights.changed() and not self._follow_adapters():
            logger.info("the model's weights have changed: its engines are opened anew")
            self._session = self._architecture = None

    def _opened(self) -> Session:
        """`session` within a call."""
        if self._session is None:
            with ordinary_tensors():  # adapters write into its weights, in any mode
                self._session = self._open()
        return self._session

    @property
    def architecture(self) -> Architecture:
        """Sizes and switches of the model, read from its config and tensors once."""
        if self._architecture is not None:
            return self._architecture
        state, changing = base_weights(self)
        expected = without_data(self._stock_class, copy.deepcopy(self.config))
        check_tensors(state, expected.state_dict(), self._stock_class)
        check_layers(self, expected)
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        head: Any = getattr(self, "lm_head", self.shared)
        tied = head.weight.data_ptr() == self.shared.weight.data_ptr() and changing.isdisjoint((EMBEDDING, HEAD))
        scaled = not self._encoder_only and scales_decoder_output(self._stock_class, self.config)
        facts = {"tied_head": tied, "scaled_head": scaled, "encoder_only": self._encoder_only}
        self._architecture = read_architecture(self.config, shapes, **facts)
        return self._architecture

    @property
    def runtime_config(self) -> RuntimeConfig:
        """The settings that the model was loaded with."""
        return self._runtime_config

    @property
    def reference(self) -> PreTrainedModel:
        """The stock PyTorch model over the same weights, with eager attention, for what engines cannot give.

        It is made at the first use.

        Raises:
            StrictModeError: the model was loaded with ``strict=True``.
        """
        if self._runtime_config.strict:
            raise StrictModeError(
                "strict=True: the stock PyTorch model is not used. Load with strict=False to have it."
            )
        stock, weights = self._reference, self._reference_weights
        if weights is not None and (weights.replaced() if self.device.type == "cpu" else weights.changed()):
            stock = None
        if stock is None:
            self._reference_weights = WeightWatch(self)
            stock = make_reference(self, self._stock_class, self.device)
            self.__dict__["_reference"] = stock  # as an attribute it would become a part of this module and its state
        if hasattr(self, "generation_config"):
            stock.generation_config = self.generation_config
        follow(stock, self)
        return stock

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder module; calling it runs the encoder engine of this model, and not of a copy that shares the module."""
        attach_encoder(self)
        return self.encoder

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, include_engines: bool = False, **kwargs: Any
    ) -> Any:
        """Write an ordinary checkpoint that the stock class and this one load.

        Args:
            save_directory: the folder.
            args: as in Transformers.
            include_engines: also write the engines that were used so far; `from_pretrained` of the folder uses them on
                the same kind of GPU with the same TensorRT.
            kwargs: as in Transformers.

        Raises:
            InputError: there are no engines, because the backend is not TensorRT or nothing was run yet.
        """
        engines = getattr(self._session, "engines", None)
        if include_engines and engines is None:
            raise InputError(
                f"include_engines=True needs engines; the backend is {self._placement.backend!r} and "
                f"{'nothing was run yet' if self._session is None else 'has none'}. Run generate() on TensorRT first."
            )
        stock = self._hugging_face_twin()
        if hasattr(self, "generation_config"):
            stock.generation_config = self.generation_config
        result = stock.save_pretrained(save_directory, *args, **kwargs)
        if include_engines and engines is not None:
            engines.write_bundle(Path(save_directory))
        return result

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights; engines over the old ones are dropped."""
        self._session = self._reference = self._architecture = None
        return super().load_state_dict(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Change the vocabulary size; engines over the old matrix are dropped."""
        self._session = self._reference = self._architecture = None
        return super().resize_token_embeddings(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the engines: the copy opens its own at its first use."""
        state: dict[str, Any] = super().__getstate__()
        return {
            key: None if key in _DERIVED else value
            for key, value in state.items()
            if key not in ("_generation_lock", "_calls", "_repeats")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._attach()

    def _attach(self) -> None:
        self._generation_lock, self._calls, self._repeats = threading.RLock(), threading.local(), Repeats()
        engine_encoder(self.encoder)
        attach_encoder(self)
        watch_forks(self)

    def after_fork(self) -> None:
        """Leave the parent process's engines alone; the first use opens others. Python calls this in a forked process."""
        abandon(self._session)
        self._session, self._generation_lock, self._repeats = None, threading.RLock(), Repeats()
