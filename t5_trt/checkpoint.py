"""Loading a checkpoint through Transformers, and refusing what is not whole.

Transformers resolves hub ids and folders, prefers safetensors, maps them instead of reading them, and loads ``.bin``
files with torch's weights-only unpickler. This module adds the checks that it leaves to a warning (missing tensors),
takes the vocabulary size from the embedding's rows, and turns every failure into a `CheckpointError`.
"""

from __future__ import annotations

import copy
import json
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import overrides
from torch.utils import _device
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, cached_file

from t5_trt.architecture import check_family
from t5_trt.errors import CheckpointError, InputError, T5TRTError, UnsupportedModelError, causes, raise_hidden_interrupt
from t5_trt.model_names import check_folder

logger = logging.getLogger("t5_trt")
#: keyword arguments of from_pretrained that let a checkpoint run code, and the values with which it cannot
_SAFE = {"trust_remote_code": False, "weights_only": True}
#: keyword arguments of from_pretrained that say where a checkpoint is, and so go to the config's loader as well
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
#: more of its arguments that are no settings of the config, or are checked elsewhere
_NO_SETTINGS = {*HUB_ARGUMENTS, "attn_implementation", "state_dict", "variant", "use_safetensors"}
_EMBEDDING = "shared.weight"
_READ = {".json", ".safetensors", ".bin", ".model", ".txt"}
Loader = Callable[..., tuple[Any, dict[str, Any]]]


def load_config(
    name_or_path: str, *, encoder_only: bool = False, changes: dict[str, Any] | None = None, **hub_arguments: Any
) -> Any:
    """Load the config of a hub id or folder and check that its family can be run.

    Args:
        name_or_path: hub id or folder.
        encoder_only: an encoder is enough.
        changes: arguments of ``from_pretrained``; those that are settings of the config are taken out and set.
        hub_arguments: see HUB_ARGUMENTS.

    Raises:
        CheckpointError: there is no readable config.
        UnsupportedModelError: it is of another family.
    """
    changes = {} if changes is None else changes
    if not Path(name_or_path).is_file() and check_folder(name_or_path, hub_arguments.get("subfolder", "")):
        check_files(Path(name_or_path) / hub_arguments.get("subfolder", ""))
    try:
        # None would ask on the terminal whether to run the checkpoint's code
        offered = {name: value for name, value in changes.items() if name not in _NO_SETTINGS}
        config, unused = AutoConfig.from_pretrained(
            name_or_path, trust_remote_code=False, return_unused_kwargs=True, **hub_arguments, **offered
        )
    except T5TRTError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"cannot load {name_or_path!r}: {error} Expected a folder written by save_pretrained() or the id of a model "
            "on the Hugging Face hub."
        ) from error
    except Exception as error:  # damaged JSON, an unknown model_type, values of types that the class refuses
        raise CheckpointError(
            f"the config of {name_or_path!r} cannot be used: {type(error).__name__}: {error} Repair config.json, or download or "
            "save the checkpoint again."
        ) from error
    for name in offered.keys() - unused.keys():
        del changes[name]
    check_family(config, encoder_only=encoder_only)
    # a name with a slash in it is a kernel on the hub: code, which the checkpoint would choose
    config._attn_implementation = None
    return config


def drop_unsafe(arguments: dict[str, Any]) -> None:
    """Take arguments that would let the checkpoint run code out of those for Transformers, and say so."""
    for name, safe in _SAFE.items():
        given = arguments.pop(name, None)
        if given is not None and given != safe:
            logger.warning("%s=%s is not used: no code of a checkpoint is run. The stock class can do it.", name, given)


def load_tokenizer(name_or_path: str, **hub_arguments: Any) -> Any:
    """The tokenizer of a hub id or folder.

    Raises:
        CheckpointError: there is none that can be used.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False, **hub_arguments)
    except Exception as error:  # of Transformers, tokenizers, sentencepiece and the hub
        raise CheckpointError(
            f"cannot load a tokenizer from {name_or_path!r}: {type(error).__name__}: {error} Expected the tokenizer's files beside "
            "config.json, as save_pretrained() writes them."
        ) from error


def check_files(folder: Path) -> None:
    """Refuse a folder whose files are pipes or devices: reading one may never end.

    Raises:
        CheckpointError: it has such a file.
    """
    for path in folder.iterdir():
        if path.suffix in _READ and path.exists() and not path.is_file() and not path.is_dir():
            raise CheckpointError(f"{str(path)!r} is a pipe, a socket or a device; expected an ordinary file.")


def check_indexes(name_or_path: str, config: Any, variant: str | None = None, **hub_arguments: Any) -> None:
    """Refuse a checkpoint whose config or whose indexes of weights lead to files that are not beside them.

    Args:
        name_or_path: hub id or folder.
        config: of the model.
        variant: of the weights, as in ``model.safetensors.index.fp16.json``.
        hub_arguments: see HUB_ARGUMENTS.

    Raises:
        CheckpointError: one of them does.
    """
    folder = Path(name_or_path) / hub_arguments.get("subfolder", "")
    if folder.is_dir():
        check_files(folder)  # the config may have been given
    chosen = getattr(config, "transformers_weights", None)
    if chosen is not None and not _is_name(chosen):
        raise CheckpointError(
            f"the config of {name_or_path!r} names the weights {chosen!r}; expected the name of a file beside it. Do not use "
            "this checkpoint."
        )
    names = [SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME]
    names += [f"{name.removesuffix('json')}{variant}.json" for name in names if variant]
    for name in (*names, *([chosen] if chosen is not None and chosen.endswith(".json") else [])):
        if (path := _find(name_or_path, name, hub_arguments)) is not None:
            shards_of(Path(path))


def _is_name(value: Any) -> bool:
    """Whether it is the name of a file and leads nowhere else."""
    return isinstance(value, str) and Path(value).name == value and "\\" not in value and value not in ("", "..")


def shards_of(index: Path) -> dict[str, str]:
    """Tensor -> file beside it, out of the index of a checkpoint in several files.

    Raises:
        CheckpointError: it is no such index, or names files elsewhere.
    """
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name) for name in shards.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the index {str(index)!r} cannot be read ({type(error).__name__}: {error}); expected JSON with a weight_map. "
            "Download or save the checkpoint again."
        ) from error
    outside = sorted(name for name in names if not _is_name(name))
    if outside:
        raise CheckpointError(
            f"the index {str(index)!r} names {outside[0]!r}; expected names of files beside it. Do not use this checkpoint."
        )
    return shards  # type: ignore[no-any-return]


def correct_vocabulary(name_or_path: str, config: Any, **hub_arguments: Any) -> None:
    """Set the config's vocab_size to the number of rows of the embedding, where a safetensors header tells it.

    Published configs disagree with their weights now and then (sonoisa's name 32128 or 32000, the tokenizer 32100); the
    matrix is what is looked up.
    """
    path = _find(name_or_path, SAFE_WEIGHTS_NAME, hub_arguments)
    if path is None:
        index = _find(name_or_path, SAFE_WEIGHTS_INDEX_NAME, hub_arguments)
        shards = {} if index is None else shards_of(Path(index))
        path = _find(name_or_path, shards[_EMBEDDING], hub_arguments) if _EMBEDDING in shards else None
    if path is None:
        return
    try:
        with safe_open(path, framework="pt") as tensors:
            if _EMBEDDING in tensors.keys():  # noqa: SIM118 - a file handle, not a mapping
                config.vocab_size = tensors.get_slice(_EMBEDDING).get_shape()[0]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(_weights_message(name_or_path, error)) from error


def load_checked(load: Loader, name_or_path: str, config: Any, *model_args: Any, **arguments: Any) -> Any:
    """Load a model and make sure that every weight came from the checkpoint.

    Args:
        load: a stock ``from_pretrained``.
        name_or_path: hub id or folder.
        config: of the model.
        model_args: for `load`.
        arguments: for `load`.

    Returns:
        The model.

    Raises:
        CheckpointError: files are missing or damaged, or tensors are missing or of other shapes than the config says.
        InputError: an argument is not known.
    """
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
        raise CheckpointError(_weights_message(name_or_path, error)) from error
    mismatched, missing = sorted(info["mismatched_keys"]), sorted(info["missing_keys"])
    if mismatched:
        key, found, expected = mismatched[0]
        raise CheckpointError(
            f"{len(mismatched)} tensor(s) of {name_or_path!r} do not fit its config: {key} has shape {tuple(found)}, the "
            f"config says {tuple(expected)}. Check that config.json and the weights belong together."
        )
    if missing:
        raise CheckpointError(
            f"{name_or_path!r} lacks {len(missing)} of the model's tensors (first {missing[0]!r}); expected all weights of "
            f"{type(model)._stock_class.__name__}. Load a complete checkpoint."
        )
    return model


def share_weights(
    target: type[PreTrainedModel], source: Any, attention: str | None = None, device: torch.device | None = None
) -> Any:
    """A model of class `target` with the very parameters of `source`; on another device, with float32 copies of them.

    Eager attention is the only kind that returns attention maps. It is set before the stacks copy the config: Transformers
    5.17 does not reach them afterwards.

    Raises:
        UnsupportedModelError: `source` has not the tensors of that class.
    """
    config = source.config
    if attention is not None:
        config = copy.deepcopy(config)
        config._attn_implementation = attention
    model = without_data(target, config)
    state = source.state_dict(keep_vars=True)
    check_tensors(state, model.state_dict(), target)
    frozen = [key for key, tensor in state.items() if not tensor.requires_grad]
    if device is not None and device.type != "cpu":
        state = {key: tensor.detach().to(device, torch.float32) for key, tensor in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    made = model.state_dict(keep_vars=True)
    for key in frozen:  # loading has made them trainable, in both models
        made[key].requires_grad_(False)
    if hasattr(source, "lm_head") and source.lm_head.weight is source.shared.weight:
        model.lm_head.weight = model.shared.weight
    return model.eval()


def without_data(kind: type[PreTrainedModel], config: Any) -> Any:
    """A model whose tensors have shapes only."""
    with _torch_modes_kept(), torch.device("meta"):
        return kind(config)


def check_tensors(found: Iterable[str], expected: Iterable[str], kind: type) -> None:
    """Refuse a model whose module tree was changed.

    Raises:
        UnsupportedModelError: tensors are missing, or there are others.
    """
    missing, more = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or more:
        named = [
            f"{len(keys)} {what} (first {keys[0]!r})" for keys, what in ((missing, "missing"), (more, "more")) if keys
        ]
        raise UnsupportedModelError(
            f"the model's tensors are not those of {kind.__name__}: {', '.join(named)}. Engines run that class's modules only: merge "
            "adapters (merge_and_unload()), and run other changes with the stock class."
        )


@contextmanager
def _torch_modes_kept() -> Iterator[None]:
    """Leave torch's modes as they were when Ctrl-C comes while ``torch.device("meta")`` is at work, here or in Transformers.

    Every torch function under it takes it off a stack and puts it back. An interrupt in between leaves the process without
    it, which ends in a RuntimeError that hides the interrupt; one while it is left leaves a process whose tensors have no data.
    An interrupted context manager of torch's puts it back when it is freed, with the error's frames: so those go first.
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


def _find(name_or_path: str, filename: str, hub_arguments: dict[str, Any]) -> str | None:
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        path: str | None = cached_file(name_or_path, filename, **hub_arguments, **quiet)
    except OSError:  # the weights' own loader gives the better message
        return None
    return path


def _weights_message(name_or_path: str, error: Exception) -> str:
    return (
        f"cannot load the weights of {name_or_path!r}: {type(error).__name__}: {error} Expected model.safetensors (or its "
        "shards, or pytorch_model.bin) beside config.json, complete. Download or save the checkpoint again."
    )
