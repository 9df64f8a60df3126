"""Compares a model's tokens and logits with Hugging Face's class, and finds the block where they diverge.

Used by `t5-trt verify` and the GPU tests, not by requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from t5_trt.checkpoint.load import load_tokenizer
from t5_trt.checkpoint.tokenizing import Batch, text_batches
from t5_trt.engine.profiles import SMALLEST, bucket
from t5_trt.errors import BackendError
from t5_trt.generation.search_settings import only_tokens
from t5_trt.graph.fp16_scaling import find_scaling
from t5_trt.graph.signature import ENCODER, QUERIES
from t5_trt.modeling import TRTT5ForConditionalGeneration
from t5_trt.modeling.calibration import observe
from t5_trt.runtime.kv_buffers import layer_views
from t5_trt.validation import check_texts


@dataclass(frozen=True)
class Activation:
    """The largest values at one place of the model.

    Attributes:
        name: what it is: the output of an ``o`` or ``wo`` (added to the residual stream) or the input of a ``wo`` (the inside of a
            feed-forward layer).
        largest: absolute value in float32.
        half_share: share of float16's largest value (65504) that engines in half precision reach; above 1 would overflow.
    """

    name: str
    largest: float
    half_share: float


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        sequences: number of compared sequences.
        equal: number of them with equal tokens.
        first_difference: (sequence, position) of the first token that differs, or None.
        max_logit_error: largest absolute difference, decoder fed with the reference's tokens.
        mean_logit_error: mean absolute difference.
        relative_logit_error: L2 of the difference over L2 of the logits.
        kl_divergence: of the model's from the reference's next-token distribution, in nats, mean over tokens.
        activations: places where values come near the limit of half precision, if requested.
    """

    sequences: int
    equal: int
    first_difference: tuple[int, int] | None
    max_logit_error: float
    mean_logit_error: float
    relative_logit_error: float
    kl_divergence: float
    activations: tuple[Activation, ...] = ()

    @property
    def share(self) -> float:
        """Share of equal sequences, 0 to 1."""
        return self.equal / self.sequences


@dataclass(frozen=True)
class BlockError:
    """The error of the residual stream after one block.

    Attributes:
        name: such as "decoder.block.3".
        max_error: largest absolute difference.
        mean_error: mean absolute difference.
        relative_error: L2 of the difference over L2 of the Hugging Face class's values.
    """

    name: str
    max_error: float
    mean_error: float
    relative_error: float


def compare(
    model: TRTT5ForConditionalGeneration,
    reference: Any,
    texts: Iterable[str] | Iterable[Batch],
    *,
    tokenizer: Any = None,
    batch_size: int = 8,
    activations: bool = False,
    **generate: Any,
) -> Comparison:
    """Compare a model's tokens and logits with those of another, such as ``model.reference``.

    Both generate with the same seed before every batch. All results of a source are compared.

    Args:
        model: under test.
        reference: a Hugging Face model of the same checkpoint, or this library's in another precision.
        texts: strings, or batches of ``input_ids`` and ``attention_mask``, int64 [B, S], anywhere.
        tokenizer: for strings, and for ``stop_strings``; None takes the checkpoint's.
        batch_size: strings in a batch.
        activations: also look for values near the limit of half precision, on the Hugging Face model.
        generate: arguments of ``generate()``, such as ``max_new_tokens`` or ``num_beams``.

    Raises:
        InputError: there are no texts, or they are one string.
        StrictModeError: `activations` with a model that was loaded with ``strict=True``.
    """
    config = generate.get("generation_config") or model.generation_config
    batches = _as_batches(model, check_texts(texts), tokenizer, batch_size)
    if tokenizer is None and (generate.get("stop_strings") or config.stop_strings):
        tokenizer = load_tokenizer(model.name_or_path)
    settings = only_tokens(config, generate, tokenizer)
    filler = next((token for token in (config.pad_token_id, model.config.pad_token_id) if token is not None), 0)
    sums = _Sums()
    for batch in batches:
        with torch.no_grad():
            expected, got = (_generated(each, batch, settings) for each in (reference, model))
            width = max(expected.shape[1], got.shape[1])
            expected, got = (_padded(rows, width, filler) for rows in (expected, got))
            sums.add_tokens(expected, got)
            sums.add_logits(*(_logits(each, batch, expected[:, :-1]) for each in (reference, model)))
    return sums.comparison(_activations(model, batches) if activations else ())


@dataclass
class _Sums:
    """Sums over the batches of `compare`."""

    sequences: int = 0
    equal: int = 0
    first_difference: tuple[int, int] | None = None
    tokens: int = 0
    values: int = 0
    largest: float = 0.0
    absolute: float = 0.0
    squared: float = 0.0
    total: float = 0.0
    divergence: float = 0.0

    def add_tokens(self, expected: torch.Tensor, got: torch.Tensor) -> None:
        """Compare sequences, int64 [rows, tokens] each."""
        same = (expected == got).all(dim=1)
        if self.first_difference is None and not same.all():
            row = int((~same).nonzero()[0])
            self.first_difference = (self.sequences + row, int((expected[row] != got[row]).nonzero()[0]))
        self.sequences, self.equal = self.sequences + len(same), self.equal + int(same.sum())

    def add_logits(self, wanted: torch.Tensor, found: torch.Tensor) -> None:
        """Compare logits, float32 [rows, tokens, V] each."""
        difference = (found - wanted).abs().nan_to_num(nan=torch.inf)
        self.largest = max(self.largest, float(difference.max()))
        self.absolute, self.values = self.absolute + float(difference.sum()), self.values + difference.numel()
        self.squared += float(difference.square().sum())
        self.total += float(wanted.square().sum())
        odds, other = (torch.log_softmax(logits, -1) for logits in (wanted, found))
        self.divergence += float((odds.exp() * (odds - other)).sum().nan_to_num(nan=torch.inf))
        self.tokens += wanted.shape[0] * wanted.shape[1]

    def comparison(self, activations: tuple[Activation, ...]) -> Comparison:
        """The means of all batches."""
        return Comparison(
            self.sequences,
            self.equal,
            self.first_difference,
            self.largest,
            self.absolute / self.values,
            (self.squared / max(self.total, 1e-30)) ** 0.5,
            self.divergence / self.tokens,
            activations,
        )


def verify(model: TRTT5ForConditionalGeneration, batches: Iterable[Batch], **generate: Any) -> Comparison:
    """`compare` with ``model.reference``.

    Raises:
        StrictModeError: the model was loaded with ``strict=True``: it has no reference.
    """
    return compare(model, model.reference, batches, **generate)


def _as_batches(model: Any, texts: list[Any], tokenizer: Any, size: int) -> list[Batch]:
    if texts and isinstance(texts[0], Mapping):
        return [{name: batch[name] for name in ("input_ids", "attention_mask") if name in batch} for batch in texts]
    if tokenizer is None and texts:
        tokenizer = load_tokenizer(model.name_or_path)
    return list(text_batches(tokenizer, texts, size, pad_token_id=model.config.pad_token_id))


def _generated(model: Any, batch: Batch, arguments: dict[str, Any]) -> torch.Tensor:
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # equal draws for both
        return model.generate(**inputs, **arguments).cpu()  # type: ignore[no-any-return]


def _logits(model: Any, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
    """For decoder tokens of one or more sequences for each source."""
    results = len(tokens) // len(batch["input_ids"])
    inputs = {name: tensor.repeat_interleave(results, dim=0).to(model.device) for name, tensor in batch.items()}
    return model(**inputs, decoder_input_ids=tokens.to(model.device)).logits.float().cpu()  # type: ignore[no-any-return]


def _activations(model: TRTT5ForConditionalGeneration, batches: list[Batch]) -> tuple[Activation, ...]:
    """Largest values in float32, and their size in engines of half precision."""
    arch, reference = model.architecture, model.reference
    on_device = ({name: tensor.to(reference.device) for name, tensor in batch.items()} for batch in batches)
    scaling = model.session.scaling or find_scaling(arch, model.state_dict())
    seen = observe(reference, on_device)
    found = [
        (f"{layer}.DenseReluDense.wo, input", most, scaling.inner.get(layer, 1.0)) for layer, most in seen.inner.items()
    ]
    found += [(f"{name}, output", most, scaling.branches.get(name, 1.0)) for name, most in seen.branches.items()]
    limit = torch.finfo(torch.float16).max
    rows = [Activation(name, most, most * factor / limit) for name, most, factor in found]
    return tuple(sorted(rows, key=lambda row: -row.half_share))


def block_errors(
    model: TRTT5ForConditionalGeneration, batch: dict[str, torch.Tensor], decoder_input_ids: torch.Tensor
) -> list[BlockError]:
    """The error after every block against ``model.reference``, for one padded batch.

    Args:
        model: under test.
        batch: ``input_ids`` and ``attention_mask``, int64 [B, S].
        decoder_input_ids: int64 [B, Q], starting with the decoder's start token.

    Returns:
        One entry a block, encoder first; the last entry of the encoder is its output and that of the decoder its logits.

    Raises:
        BackendError: Polygraphy, which compares, is not installed.
    """
    device, arch = model.device, model.architecture
    reference, session = model.reference, model.session
    ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
    tokens = decoder_input_ids.to(device)
    with torch.no_grad():
        expected = reference(
            input_ids=ids, attention_mask=mask, decoder_input_ids=tokens, output_hidden_states=True, use_cache=False
        )
    rows, source = bucket("B", len(ids)), bucket("S", ids.shape[1])
    count, cached = bucket("Q", tokens.shape[1]), SMALLEST["T"]
    wide_ids, wide_mask = _grown(ids, rows, source), _grown(mask, rows, source)
    encoder = session.layer_outputs(ENCODER, {"input_ids": wide_ids, "attention_mask": wide_mask})
    _, cross = session.encode(wide_ids, None, wide_mask)
    heads, width = arch.num_heads, arch.d_kv
    zeros = {"device": device, "dtype": session.dtype}
    past = torch.zeros((arch.decoder_layers, 2, rows, heads, cached, width), **zeros)  # type: ignore[call-overload]
    inputs = {
        "decoder_input_ids": _grown(tokens, rows, count),
        "position": torch.zeros(1, dtype=torch.int64, device=device),
        "cross_bias": session.cross_bias(wide_mask, cross),
        "key_bias": torch.zeros((rows, 1, 1, cached + count), **zeros),  # type: ignore[call-overload]
    }
    decoder = session.layer_outputs(QUERIES, inputs | layer_views("past", past) | layer_views("cross", cross.kv))
    keep = mask.bool()
    found, wanted = {}, {}
    for layer in range(arch.encoder_layers - 1):  # Hugging Face returns the last state only after the last norm
        name = f"encoder.block.{layer}"
        found[name] = encoder[name].view(rows, source, -1)[: len(ids), : ids.shape[1]][keep]
        wanted[name] = expected.encoder_hidden_states[layer + 1][keep]
    found["encoder output"] = encoder["encoder_hidden_states"].view(rows, source, -1)[: len(ids), : ids.shape[1]][keep]
    wanted["encoder output"] = expected.encoder_last_hidden_state[keep]
    for layer in range(arch.decoder_layers - 1):
        name = f"decoder.block.{layer}"
        found[name] = decoder[name].view(rows, count, -1)[: len(ids), : tokens.shape[1]]
        wanted[name] = expected.decoder_hidden_states[layer + 1]
    found["logits"] = decoder["logits"].view(rows, count, -1)[: len(ids), : tokens.shape[1]]
    wanted["logits"] = expected.logits
    return _compare(found, wanted)


def import_polygraphy() -> tuple[Any, Any]:
    """Polygraphy's comparator and logger, which `block_errors` needs.

    Raises:
        BackendError: it is not installed.
    """
    try:
        from polygraphy import comparator
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise BackendError(f"comparing layers needs Polygraphy ({error}): pip install 't5-trt[verify]'.") from error
    return comparator, G_LOGGER


def _compare(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[BlockError]:
    """Polygraphy's comparison of the outputs of two runs."""
    comparator, logger = import_polygraphy()
    simple = getattr(comparator, "SimpleCompareFunc", None) or comparator.CompareFunc.simple  # renamed in 0.50
    results = []
    for runner, tensors in (("t5_trt", found), ("transformers", wanted)):
        arrays = {name: t.float().cpu().flatten(0, -2).contiguous().numpy() for name, t in tensors.items()}
        results.append(comparator.IterationResult(arrays, runner_name=runner))
    with logger.verbosity(logger.CRITICAL):
        compared = simple(fail_fast=False)(*results)
    errors = []
    for name, tensor in wanted.items():
        stats = compared[name]
        relative = (found[name].float() - tensor.float()).norm() / tensor.float().norm().clamp_min(1e-30)
        errors.append(BlockError(name, float(stats.max_absdiff), float(stats.mean_absdiff), float(relative)))
    return errors


def _padded(tokens: torch.Tensor, width: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(tokens, (0, width - tokens.shape[1]), value=value)


def _grown(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Pad rows and columns with zeros."""
    grown = tensor.new_zeros((rows, columns))
    grown[: tensor.shape[0], : tensor.shape[1]] = tensor
    return grown
