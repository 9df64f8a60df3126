"""The base class of the models on engines: loading, saving, pickling, and the runner.

The model *is* a Hugging Face module tree whose parameters are loaded by Transformers; the engines read the same memory. So
``isinstance`` checks, ``state_dict()``, ``save_pretrained`` and ``model.reference`` need no second copy of the weights.
`modeling/runner.py` computes, `modeling/placement.py` handles devices and dtypes, and `modeling/families.py` chooses the class of an instance.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import PreTrainedModel

from t5_trt.checkpoint.load import share_weights
from t5_trt.config import BuildConfig, RuntimeConfig, backend_from_environment
from t5_trt.errors import InputError
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.fp16_scaling import Fp16Scaling
from t5_trt.modeling.adapted_model import AdapterLoading, hugging_face_twin
from t5_trt.modeling.adapter_layers import adapter_layers
from t5_trt.modeling.encoder import attach_encoder, engine_encoder
from t5_trt.modeling.families import FamilyClass
from t5_trt.modeling.loading import LoadOptions, load_model
from t5_trt.modeling.loading_arguments import check_arguments, chosen_device
from t5_trt.modeling.placement import PlacedModel
from t5_trt.modeling.reference import share_layers
from t5_trt.modeling.runner import ModelRunner, ModelSettings
from t5_trt.runtime.forks import watch_forks
from t5_trt.runtime.select import resolve
from t5_trt.runtime.session import Session
from t5_trt.validation import PRECISION_OF

Self = TypeVar("Self", bound="EngineModel")


class EngineModel(FamilyClass, PlacedModel, AdapterLoading, PreTrainedModel):
    """Base of the models on engines; a subclass of it is combined with the Hugging Face class of each family.

    Args:
        config: a T5Config, MT5Config or UMT5Config; the weights are random, as in the Hugging Face classes.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._attach(ModelSettings())

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
        thread_spinning: bool = True,
        prepack_weights: bool | None = None,
        max_source_tokens: int | None = None,
        max_target_tokens: int | None = None,
        engine_cache_dir: str | Path | None = None,
        engine_cache_bytes: int | None = None,
        flavor: str | None = None,
        show_progress: bool | None = None,
        building: str = "wait",
        check_engines: bool = True,
        trust_engines: bool | None = None,
        build: BuildConfig | None = None,
        calibration: Iterable[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a checkpoint of the T5 family. No engine is built or opened yet.

        Args:
            pretrained_model_name_or_path: a hub id or a folder written by ``save_pretrained``; or those of an adapter of peft, which is
                loaded into its base model.
            model_args: passed on to Transformers.
            config: a config to use instead of the checkpoint's.
            backend: "auto", "tensorrt", "cuda" or "onnxruntime"; default ``T5_TRT_BACKEND``, else "auto".
            precision: "auto", "fp32", "tf32", "fp16", "bf16" (on a CPU the decoder's matrices only), "int8" (8-bit matrices; on GPUs the
                decoder's) or, on a CPU, "int4" (the decoder's matrices in 4 bits, the others in 8).
            decode: what runs the decoder: "auto", "kernels" (the library's own code, in CUDA or for CPUs in C) or "engine" (TensorRT or,
                on a CPU, ONNX Runtime).
            device: where the engines run, such as "cuda:0"; None lets the backend choose.
            strict: raise instead of using the Hugging Face model where engines cannot serve a request.
            num_threads: CPU threads of ONNX Runtime and of the C code; None takes torch's number.
            thread_spinning: False for a CPU with more busy threads than cores: ONNX Runtime's threads then sleep while they wait.
            prepack_weights: faster beams and batches on CPU for more memory; None packs the decoder once it has several rows.
            max_source_tokens: refuse longer sources.
            max_target_tokens: refuse longer outputs.
            engine_cache_dir: folder of built engines; default ``T5_TRT_CACHE``, else the user's cache folder.
            engine_cache_bytes: above this size the engines used least recently are removed.
            flavor: "tensorrt" or "rtx"; default ``T5_TRT_FLAVOR``, else the one that is installed.
            show_progress: draw a bar while engines are built; None does so on a terminal only.
            building: "wait" for the engine of an encoder, or build it in the "background" and encode as the backend "cuda" does until then.
            check_engines: compare each new engine with ONNX Runtime once, on random inputs, before it is used.
            trust_engines: use engines that come with the checkpoint; default: only those of a folder that is not a download. An engine can
                run arbitrary code.
            build: settings of the engine builder.
            calibration: texts whose largest activations set the range of half precision; None derives it from the weights.
            kwargs: what Transformers takes: cache_dir (of hub downloads), revision, token, subfolder, dtype, ...
                ``dtype`` is the precision on a GPU, and the dtype of parameters and results on a CPU (default: float32);
                ``device_map`` is read as a device.

        Returns:
            The model, in evaluation mode; with ``output_loading_info=True`` also Transformers' dictionary about the loading.

        Raises:
            CheckpointError: files are missing, damaged, or do not fit each other.
            UnsupportedModelError: the checkpoint is not of the T5 family.
            BackendError: the backend that was asked for cannot run here.
            InputError: an argument has a wrong type or value.
        """
        if pretrained_model_name_or_path is None:
            raise InputError("got None; expected a hub id or a folder. For a model in memory use from_model(model).")
        check_arguments(kwargs)
        runtime = RuntimeConfig(
            backend=backend_from_environment(backend),
            precision=precision,
            decode=decode,
            device=chosen_device(device, kwargs),
            strict=strict,
            num_threads=num_threads,
            thread_spinning=thread_spinning,
            prepack_weights=prepack_weights,
            max_source_tokens=max_source_tokens,
            max_target_tokens=max_target_tokens,
            engine_cache_dir=None if engine_cache_dir is None else Path(engine_cache_dir),
            engine_cache_bytes=engine_cache_bytes,
            flavor=flavor,
            show_progress=show_progress,
            building=building,
            check_engines=check_engines,
        )
        options = LoadOptions(runtime, build or BuildConfig(), config, trust_engines, calibration)
        return cast("Self", load_model(cls, str(pretrained_model_name_or_path), options, *model_args, **kwargs))

    @classmethod
    def _load_by_transformers(cls, *args: Any, **kwargs: Any) -> Any:
        """Transformers' ``from_pretrained`` of this class."""
        return super().from_pretrained(*args, **kwargs)

    @classmethod
    def from_model(cls: type[Self], model: PreTrainedModel, **options: Any) -> Self:
        """Wrap a Hugging Face model that is in memory, for example one that was just fine-tuned. Its weights are shared.

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
        batches = None if calibration is None else list(calibration)
        wrapped._configure(ModelSettings(runtime, build or BuildConfig(), placement, batches))
        if hasattr(model, "generation_config"):
            wrapped.generation_config = model.generation_config
        return cast("Self", wrapped)

    @property
    def session(self) -> Session:
        """The engines over the current weights; opened at the first use.

        Assigning a session makes the model use that one.

        Raises:
            UnsupportedModelError: modules of the model were exchanged.
        """
        self._runner.notice_changes()
        return self._runner.opened()

    @session.setter
    def session(self, session: Session | None) -> None:
        self._runner.session = session

    def fp16_scaling(self, precision: str) -> Fp16Scaling:
        """Factors folded into the weights of engines of a precision, see `t5_trt.graph.fp16_scaling`."""
        return self._runner.fp16_scaling(precision)

    @property
    def architecture(self) -> Architecture:
        """Sizes and switches of the model, read from its config and tensors once."""
        return self._runner.architecture

    @property
    def runtime_config(self) -> RuntimeConfig:
        """The settings that the model was loaded with."""
        return self._runner.settings.runtime

    @property
    def reference(self) -> PreTrainedModel:
        """The Hugging Face model over the same weights, with eager attention, for requests that engines cannot serve.

        Created at the first use.

        Raises:
            StrictModeError: the model was loaded with ``strict=True``.
        """
        return self._runner.reference()

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder module; calling it runs the encoder engine of this model, even if another model shares the module."""
        attach_encoder(self)
        return self.encoder

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, include_engines: bool = False, **kwargs: Any
    ) -> Any:
        """Write an ordinary checkpoint that the Hugging Face class and this one load.

        Args:
            save_directory: the folder.
            args: as in Transformers.
            include_engines: also write the engines that were used so far; `from_pretrained` of the folder uses them on
                the same kind of GPU with the same TensorRT.
            kwargs: as in Transformers.

        Raises:
            InputError: there are no engines, because the backend is not TensorRT or nothing was run yet.
        """
        session = self._runner.session
        engines = None if session is None else session.engines
        if include_engines and engines is None:
            raise InputError(
                f"include_engines=True needs engines; the backend is {self._runner.placement.backend!r} and "
                f"{'nothing was run yet' if session is None else 'has none'}. Run generate() on TensorRT first."
            )
        plain: Any = hugging_face_twin(self, self._hf_class)
        if hasattr(self, "generation_config"):
            plain.generation_config = self.generation_config
        result = plain.save_pretrained(save_directory, *args, **kwargs)
        if include_engines and engines is not None:
            engines.write_bundle(Path(save_directory))
        return result

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights; engines over the old ones are dropped."""
        self._runner.drop()
        return super().load_state_dict(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Change the vocabulary size; engines over the old matrix are dropped."""
        self._runner.drop()
        return super().resize_token_embeddings(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """The state without engines and other derived objects: the copy opens its own engines at its first use."""
        state: dict[str, Any] = super().__getstate__()
        kept = {key: value for key, value in state.items() if key != "_runner"}
        return {**kept, "_settings": self._runner.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        settings = state.pop("_settings")
        super().__setstate__(state)
        self._attach(settings)

    def _attach(self, settings: ModelSettings) -> None:
        """Create the parts that are not in the model's state."""
        engine_encoder(self.encoder)
        self._runner = ModelRunner(self, self._hf_class, settings)
        attach_encoder(self)
        watch_forks(self)

    def _configure(self, settings: ModelSettings) -> None:
        """Set how the model runs."""
        self._runner.settings = settings
        attach_encoder(self)

    def after_fork(self) -> None:
        """Abandon the parent process's engines; the first use opens new ones. Python calls this in a forked process."""
        self._runner.leave_to_parent()
