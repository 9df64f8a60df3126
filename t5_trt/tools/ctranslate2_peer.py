"""CTranslate2 as a model to compare with: converted from a Hugging Face model, called as one.

Token ids are CTranslate2's tokens, so no tokenizer takes part.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch

from t5_trt.errors import InputError
from t5_trt.tools.ctranslate2_library import open_translator

#: our precision -> CTranslate2's compute type; on GPUs what is not quantized is half precision in int8, too
_COMPUTE_TYPES = {
    "cpu": {"fp32": "float32", "int8": "int8"},
    "cuda": {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8_float16"},
}


class CTranslate2Model:
    """A translator of CTranslate2 with the weights of a Hugging Face model.

    The model is converted into a temporary folder, which is removed once it is loaded.

    Args:
        model: of T5, mT5 or UMT5, on any device.
        precision: "fp32", "int8" or, on a GPU, "fp16" or "bf16".
        device: on which the translator runs.
        threads: CPU threads; None takes torch's number.

    Raises:
        BackendError: ctranslate2 is not installed.
        InputError: it cannot compute in this precision, or has no converter for this model.
    """

    def __init__(self, model: Any, precision: str, device: torch.device, threads: int | None = None) -> None:
        compute_type = compute_type_of(precision, device.type)
        self._pad, self._start = model.config.pad_token_id, model.config.decoder_start_token_id
        with tempfile.TemporaryDirectory(prefix="t5_trt-") as folder:
            converted = convert(model, Path(folder), compute_type)
            self._translator = open_translator(
                str(converted),
                device=device.type,
                device_index=device.index or 0,
                compute_type=compute_type,
                inter_threads=1,
                intra_threads=threads or torch.get_num_threads(),
            )

    def generate(
        self,
        *,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_beams: int,
        do_sample: bool,
        min_new_tokens: int,
        max_new_tokens: int,
        **_: Any,
    ) -> torch.Tensor:
        """Greedy or beam search with the arguments of Hugging Face's ``generate()``; others are ignored.

        Args:
            input_ids: int64 [batch, source].
            attention_mask: 1 where a token is shown, [batch, source].
            num_beams: 1 is greedy search.
            do_sample: must be False.
            min_new_tokens: end-of-sequence is not chosen before.
            max_new_tokens: the largest number of tokens.

        Returns:
            Tokens with the start token, int64 [batch, tokens], on the CPU.

        Raises:
            InputError: `do_sample` is set: CTranslate2 draws other tokens.
        """
        if do_sample:
            raise InputError(
                "CTranslate2 draws other tokens than torch. Leave do_sample out, or do not compare with it."
            )
        shown = zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
        found = self._translator.translate_batch(
            [[str(token) for token, mask in zip(*row, strict=True) if mask] for row in shown],
            beam_size=num_beams,
            max_input_length=0,
            min_decoding_length=min_new_tokens,
            max_decoding_length=max_new_tokens,
        )
        rows = [[self._start, *map(int, result.hypotheses[0])] for result in found]
        longest = max(map(len, rows))
        return torch.tensor([row + [self._pad] * (longest - len(row)) for row in rows])


def compute_type_of(precision: str, device: str) -> str:
    """CTranslate2's name of a precision.

    Args:
        precision: a name of ours.
        device: "cpu" or "cuda".

    Raises:
        InputError: CTranslate2 does not have it there.
    """
    known = _COMPUTE_TYPES[device]
    if precision not in known:
        raise InputError(
            f"CTranslate2 does not compute in {precision!r} on {device}; it does in {', '.join(known)}. Choose one of them."
        )
    return known[precision]


class _Ids:
    """What a converter asks of a tokenizer, with decimal numbers as tokens."""

    def __init__(self, config: Any) -> None:
        self._size = config.vocab_size
        self.pad_token, self.eos_token = str(config.pad_token_id), str(_first(config.eos_token_id))
        # CTranslate2 wants one; it stands for tokens that are not in the vocabulary, and all ids are
        self.unk_token = "2"

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(self._size)}

    def convert_ids_to_tokens(self, number: int) -> str:
        return str(number)


def convert(model: Any, folder: Path, compute_type: str) -> Path:
    """Write a Hugging Face model in CTranslate2's format.

    Args:
        model: stays as it is.
        folder: exists; the result is a new folder in it.
        compute_type: see `compute_type_of`.

    Returns:
        The new folder.

    Raises:
        InputError: CTranslate2 cannot convert this model.
    """
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        """Takes the model from memory."""

        def load_model(self, *_: Any, **__: Any) -> Any:
            return copy.deepcopy(model).float().cpu()  # a copy, as the converter rounds matrices in place

        def load_tokenizer(self, *_: Any, **__: Any) -> Any:
            return _Ids(model.config)

    model.config.save_pretrained(folder)
    try:
        return Path(Converter(str(folder)).convert(str(folder / "converted"), quantization=compute_type))
    except (
        AttributeError,
        KeyError,
        ValueError,
    ) as error:  # of an architecture that it does not know, or knows in part
        raise InputError(
            f"CTranslate2 cannot convert a {type(model).__name__} ({error}). Leave the comparison with it out."
        ) from error


def _first(ids: int | list[int]) -> int:
    return ids[0] if isinstance(ids, list) else ids
