"""Loading a checkpoint through Transformers, and rejecting incomplete ones.

Transformers resolves hub ids and folders, prefers safetensors, maps them instead of reading them, and loads ``.bin``
files with torch's weights-only unpickler. This module adds the checks that it leaves to a warning (missing tensors),
takes the vocabulary size from the embedding's rows, and turns every failure into a `CheckpointError`.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import overrides
from torch.utils import _device
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from t5_trt.checkpoint.families import check_family, type_without_name
from t5_trt.checkpoint.files import EMBEDDING, TABLES, check_files, weights_message
from t5_trt.checkpoint.model_names import check_folder
from t5_trt.errors import CheckpointError, InputError, T5TRTError, UnsupportedModelError, causes, raise_hidden_interrupt

#: keyword arguments of from_pretrained that locate a checkpoint; the config's loader gets them too
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
#: further arguments that are not settings of the config, or are checked elsewhere
_NO_SETTINGS = {*HUB_ARGUMENTS, "attn_implementation", "state_dict", "variant", "use_safetensors"}
#: sizes of a model that runs only the embedding, the last norm and the head
_SMALLEST = {
    "vocab_size": 1, "d_model": 4, "d_kv": 1, "d_ff": 1, "num_heads": 1, "num_layers": 0, "num_decoder_layers": 0,
}  # fmt: skip
Loader = Callable[..., tuple[Any, dict[str, Any]]]


def load_config(
    name_or_path: str, *, encoder_only: bool = False, changes: dict[str, Any] | None = None, **hub_arguments: Any
) -> Any:
    """Load the config of a hub id or folder and check that its family can be run.

    Args:
        name_or_path: hub id or folder.
        encoder_only: an encoder is enough.
        changes: arguments of ``from_pretrained``; settings of the config are applied and removed.
        hub_arguments: see HUB_ARGUMENTS.

    Raises:
        CheckpointError: there is no readable config.
        UnsupportedModelError: it is of another family.
    """
    changes = {} if changes is None else changes
    if not Path(name_or_path).is_file() and check_folder(name_or_path, hub_arguments.get("subfolder", "")):
        check_files(Path(name_or_path) / hub_arguments.get("subfolder", ""))
    offered = {name: value for name, value in changes.items() if name not in _NO_SETTINGS}
    try:
        config, unused = _read_config(name_or_path, **hub_arguments, **offered)
    except T5TRTError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"cannot load {name_or_path!r}: {error} Expected a folder written by save_pretrained() or the id of a model "
            "on the Hugging Face hub."
        ) from error
    except Exception as error:  # damaged JSON, an unknown model_type, values of wrong types
        raise CheckpointError(
            f"the config of {name_or_path!r} cannot be used: {type(error).__name__}: {error} Repair config.json, or download or "
            "save the checkpoint again."
        ) from error
    for name in offered.keys() - unused.keys():
        del changes[name]
    check_family(config, encoder_only=encoder_only)
    # a name with a slash is a kernel on the hub: the checkpoint would choose code to run
    config._attn_implementation = None
    return config


def _read_config(name_or_path: str, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """The config, and the arguments that are not settings of it.

    Without ``model_type``, ``architectures`` decides the family, else it is a T5Config, as in the Hugging Face class.
    """
    try:
        # None would ask on the terminal whether to run the checkpoint's code
        return AutoConfig.from_pretrained(  # type: ignore[no-any-return]
            name_or_path, trust_remote_code=False, return_unused_kwargs=True, **arguments
        )
    except ValueError:
        stored, _ = PreTrainedConfig.get_config_dict(name_or_path, **arguments)
        if stored.get("model_type"):
            raise
    kind = type_without_name(stored)
    config, unused = kind.from_pretrained(name_or_path, return_unused_kwargs=True, **arguments)
    config.model_type = kind.model_type  # the file may contain null
    return config, unused


def _check_not_quantized(name_or_path: str, config: Any) -> None:
    """Refuse a checkpoint whose weights are quantized.

    Raises:
        UnsupportedModelError: naming the method.
    """
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        raise UnsupportedModelError(
            f"the config of {name_or_path!r} has a quantization_config (method {method!r}); expected weights in float32, float16 "
            "or bfloat16. Load the checkpoint that this one was made from, with precision='int8' for 8-bit matrices on a CPU."
        )


def load_tokenizer(name_or_path: str, **hub_arguments: Any) -> Any:
    """The tokenizer of a hub id or folder.

    Raises:
        CheckpointError: it is missing or cannot be used.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False, **hub_arguments)
    except Exception as error:  # of Transformers, tokenizers, sentencepiece and the hub
        raise CheckpointError(
            f"cannot load a tokenizer from {name_or_path!r}: {type(error).__name__}: {error} Expected the tokenizer's files beside "
            "config.json, as save_pretrained() writes them."
        ) from error


def load_checked(load: Loader, name_or_path: str, config: Any, *model_args: Any, **arguments: Any) -> Any:
    """Load a model and check that every weight came from the checkpoint.

    Args:
        load: a Hugging Face ``from_pretrained``.
        name_or_path: hub id or folder.
        config: of the model.
        model_args: for `load`.
        arguments: for `load`.

    Returns:
        The model.

    Raises:
        CheckpointError: files are missing or damaged, or tensors are missing or of other shapes than the config says.
        UnsupportedModelError: the weights are quantized, or the stacks have different embeddings.
        InputError: an argument is not known.
    """
    _check_not_quantized(name_or_path, config)
    try:
        with _torch_modes_kept():
            model, info = load(
                name_or_path,
                *model_args,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **arguments,
            )
    except T5TRTError:
        raise
    except Exception as error:  # safetensors, torch, hub and OS errors share no base class
        if isinstance(error, TypeError) and "keyword argument" in str(error):
            raise InputError(
                f"from_pretrained got an argument that is not known: {error}. Expected those of this class, of Transformers' "
                "from_pretrained, or settings of the config."
            ) from error
        if isinstance(error, RuntimeError) and "meta device" in str(
            error
        ):  # caused by the caller's device context, not by the files
            raise
        raise CheckpointError(weights_message(name_or_path, error)) from error
    _check_complete(model, info, name_or_path)
    return model


def _check_complete(model: Any, report: Mapping[str, Any], name_or_path: str) -> None:
    """Refuse a loaded model with weights that did not come from the checkpoint; raises as `load_checked`."""
    mismatched, missing = sorted(report["mismatched_keys"]), sorted(report["missing_keys"])
    if mismatched:
        key, found, expected = mismatched[0]
        raise CheckpointError(
            f"{len(mismatched)} tensor(s) of {name_or_path!r} do not fit its config: {key} has shape {tuple(found)}, the "
            f"config says {tuple(expected)}. Check that config.json and the weights belong together."
        )
    if missing:
        raise CheckpointError(
            f"{name_or_path!r} lacks {len(missing)} of the model's tensors (first {missing[0]!r}); expected all weights of "
            f"{type(model)._hf_class.__name__}. Load a complete checkpoint."
        )
    if not getattr(model, "_hf_peft_config_loaded", False):  # with an adapter the tensors have other names
        check_tables(model.state_dict())


def share_weights(
    target: type[PreTrainedModel], source: Any, attention: str | None = None, device: torch.device | None = None
) -> Any:
    """A model of class `target` that shares the parameters of `source`; on another device it has float32 copies.

    Only eager attention returns attention maps. It is set before the stacks copy the config, because Transformers 5.17 does not update
    the copies afterwards.

    Raises:
        UnsupportedModelError: `source` does not have the tensors of that class.
    """
    config = source.config
    if attention is not None:
        config = copy.deepcopy(config)
        config._attn_implementation = attention
    state = source.state_dict(keep_vars=True)
    rows = len(state[EMBEDDING]) if EMBEDDING in state else config.vocab_size
    if rows != config.vocab_size:  # the matrix was replaced, and the config has the old size
        config = copy.deepcopy(config)
        config.vocab_size = rows
    model = without_data(target, config)
    check_tensors(state, model.state_dict(), target)
    frozen = [key for key, tensor in state.items() if not tensor.requires_grad]
    if device is not None and device.type != "cpu":
        state = {key: tensor.detach().to(device, torch.float32) for key, tensor in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    made = model.state_dict(keep_vars=True)
    for key in frozen:  # loading has made the parameters of both models trainable
        made[key].requires_grad_(False)
    if hasattr(source, "lm_head") and source.lm_head.weight is source.shared.weight:
        model.lm_head.weight = model.shared.weight
    return model.eval()


def without_data(kind: type[PreTrainedModel], config: Any) -> Any:
    """A model whose tensors have shapes but no data."""
    with _torch_modes_kept(), torch.device("meta"):
        return kind(config)


def scales_decoder_output(kind: type[PreTrainedModel], config: Any) -> bool:
    """Whether a class multiplies the decoder's output by d_model**-0.5 before the head.

    The setting that decides differs by family and by version of Transformers. So a model of the class with this config, but without layers
    and with four dimensions, is run; its decoder output and its head are ones. Takes about 4 ms.

    Args:
        kind: a Hugging Face ForConditionalGeneration class.
        config: of the model.
    """
    config = copy.deepcopy(config)
    for name, size in _SMALLEST.items():
        setattr(config, name, size)
    config.layer_norm_epsilon = 1e-6
    model = without_data(kind, config).to_empty(device="cpu").eval()
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        states = torch.ones((1, 1, _SMALLEST["d_model"]))
        token = torch.zeros((1, 1), dtype=torch.int64, device="cpu")
        logit = model(
            encoder_outputs=(states.cpu(),), decoder_input_ids=token, use_cache=False, return_dict=True
        ).logits
    return float(logit) < 0.75 * _SMALLEST["d_model"]


def check_tensors(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], kind: type) -> None:
    """Refuse a model whose tensors are not those of its class, which engines run.

    The number of rows of the embedding may differ.

    Args:
        found: the model's.
        expected: those of a model of class `kind` with the model's config; shapes are enough.
        kind: a Hugging Face class.

    Raises:
        UnsupportedModelError: a tensor is missing, is not of the class, or has another shape or no data.
    """
    missing, more = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or more:
        named = [
            f"{len(keys)} {what} (first {keys[0]!r})" for keys, what in ((missing, "missing"), (more, "more")) if keys
        ]
        raise UnsupportedModelError(
            f"the model's tensors are not those of {kind.__name__}: {', '.join(named)}. Engines run that class's modules, "
            "and adapters of peft in their places; run other changes with the Hugging Face class."
        )
    rows = len(found[EMBEDDING])
    for key, tensor in expected.items():
        if found[key].is_meta:
            raise UnsupportedModelError(
                f"{key} has no data here (device meta), as after accelerate.cpu_offload(); expected all weights in memory. Load the "
                "model without offloading."
            )
        shape = (rows, *tensor.shape[1:]) if key in TABLES else tuple(tensor.shape)
        if tuple(found[key].shape) != shape:
            what_to_do = (
                f"as {EMBEDDING} has. Engines look up and score one vocabulary: use resize_token_embeddings(), which changes both "
                "matrices and the config, or the Hugging Face class."
                if key in TABLES
                else "as the config says. Use the Hugging Face class."
            )
            raise UnsupportedModelError(f"{key} has shape {tuple(found[key].shape)}; expected {shape}, {what_to_do}")
    check_tables(found)


def check_tables(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a model whose encoder or decoder has its own embedding.

    Args:
        tensors: of the model's state dict.

    Raises:
        UnsupportedModelError: naming it.
    """
    shared = tensors[EMBEDDING]
    for key in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        table = tensors.get(key, shared)
        if table.data_ptr() != shared.data_ptr() and not torch.equal(table, shared):
            raise UnsupportedModelError(
                f"{key} has other values than {EMBEDDING}; expected one matrix for both: engines look tokens up in a single one. Use "
                "the Hugging Face class."
            )


@contextmanager
def _torch_modes_kept() -> Iterator[None]:
    """Restore torch's modes if Ctrl-C interrupts code under ``torch.device("meta")``, here or in Transformers.

    Every torch function under that mode pops it from a stack and pushes it again. An interrupt in between ends in a RuntimeError that
    hides the interrupt; one during the exit from the mode leaves it active, so that new tensors have no data. An interrupted context
    manager of torch restores the mode when it is freed with the error's frames: so those are cleared first.
    """
    modes, device = overrides._get_current_function_mode_stack(), _device.CURRENT_DEVICE  # type: ignore[no-untyped-call]
    try:
        yield
    except BaseException as error:
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes(error)):
            for cause in causes(error):
                traceback.clear_frames(cause.__traceback__)
        while overrides._get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            overrides._pop_mode()  # type: ignore[no-untyped-call]
        for mode in modes:
            overrides._push_mode(mode)  # type: ignore[no-untyped-call]
        _device.CURRENT_DEVICE = device
        raise_hidden_interrupt(error)
        raise
