"""The supported models: checks a Hugging Face config and reads it into an `Architecture`.

No other module reads sizes from a config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import MT5Config, T5Config, UMT5Config
from transformers.activations import ACT2FN

from t5_trt.errors import UnsupportedModelError
from t5_trt.graph.architecture import ACTIVATIONS, Architecture

#: supported model_type -> models
SUPPORTED_FAMILIES = {
    "t5": "T5 v1.0, T5 v1.1, Flan-T5, ByT5, UL2 and their fine-tuned forms",
    "mt5": "mT5",
    "umt5": "UMT5",
}
#: model_type of similar but unsupported models -> what they add to T5
KNOWN_RELATIVES = {
    "switch_transformers": "mixture-of-experts layers",
    "longt5": "local and transient-global attention",
    "t5gemma": "a Gemma decoder stack with rotary positions",
    "t5gemma2": "a Gemma decoder stack with rotary positions",
    "pop2piano": "audio inputs",
    "udop": "layout and image inputs",
}


def check_family(config: Any, *, encoder_only: bool = False) -> str:
    """Return the config's model type if this library can run it.

    Raises:
        UnsupportedModelError: naming the family that was got and those that work.
    """
    model_type = str(getattr(config, "model_type", "") or type(config).__name__)
    works = _works()
    if model_type not in SUPPORTED_FAMILIES:
        reason = KNOWN_RELATIVES.get(model_type)
        because = f", which adds {reason}" if reason else ""
        raise UnsupportedModelError(
            f"got a checkpoint of model type {model_type!r}{because}; t5_trt runs encoder-decoder models of the types "
            f"{works}. Use the Transformers class of that model instead."
        )
    listed = getattr(config, "architectures", None)
    names = [str(name) for name in listed] if isinstance(listed, list | tuple) else []
    lacks_decoder = any(name.endswith("EncoderModel") for name in names) or not getattr(
        config, "is_encoder_decoder", True
    )
    if lacks_decoder and not encoder_only:
        raise UnsupportedModelError(
            f"got an encoder-only checkpoint (architectures {names}); expected an encoder-decoder model of the types "
            f"{works}. Load a checkpoint that has decoder weights, or use TRTT5EncoderModel for this one."
        )
    _check_sizes(config, encoder_only)
    activation_of(config)
    return model_type


def type_without_name(stored: Mapping[str, Any]) -> Any:
    """The config class of a config.json without ``model_type``: that of its ``architectures``, else T5Config.

    Raises:
        UnsupportedModelError: its architectures are of another family.
    """
    listed = stored.get("architectures")
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    for prefix, kind in (("UMT5", UMT5Config), ("MT5", MT5Config), ("T5", T5Config)):
        if not names or names[0] in (f"{prefix}ForConditionalGeneration", f"{prefix}EncoderModel", f"{prefix}Model"):
            return kind if names else T5Config
    raise UnsupportedModelError(
        f"got a config without model_type whose architectures are {names}; t5_trt runs {_works()}. Use the Transformers class of "
        "that model instead."
    )


def _works() -> str:
    return "; ".join(f"{name} ({text})" for name, text in SUPPORTED_FAMILIES.items())


def _check_sizes(config: Any, encoder_only: bool) -> None:
    """Check that all sizes are valid.

    Raises:
        UnsupportedModelError: naming the setting.
    """
    least = dict.fromkeys(("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers"), 1)
    least |= {} if encoder_only else {"num_decoder_layers": 1}
    # an encoder halves the buckets, and half of those are exact
    least |= {"relative_attention_num_buckets": 4, "relative_attention_max_distance": 1}
    for name, smallest in least.items():
        value = getattr(config, name, None)
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise UnsupportedModelError(
                f"the config's {name} is {value!r}; expected an integer of at least {smallest}. Correct config.json, or the config "
                "that was given."
            )
    epsilon = config.layer_norm_epsilon
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not epsilon >= 0:
        raise UnsupportedModelError(
            f"the config's layer_norm_epsilon is {epsilon!r}; expected a number of at least 0, such as 1e-6."
        )


def activation_of(config: Any) -> str:
    """The one of `ACTIVATIONS` that the config's ``dense_act_fn`` computes, whatever its name.

    Raises:
        UnsupportedModelError: none of them.
    """
    name = config.dense_act_fn
    if name in ACTIVATIONS:
        return str(name)
    if isinstance(name, str) and name in ACT2FN:
        values = torch.cat([torch.linspace(-12.0, 12.0, 481), torch.tensor([-1e4, -100.0, 100.0, 1e4])])
        with torch.no_grad():
            found = ACT2FN[name](values)
            for known in ACTIVATIONS:
                if torch.allclose(found, ACT2FN[known](values), atol=1e-5, rtol=1e-5):
                    return known
    implied = str(config.feed_forward_proj).split("-")[-1]
    setting = (
        f"feed_forward_proj is {config.feed_forward_proj!r}"
        if name == implied
        else f"dense_act_fn is {name!r}, which goes before feed_forward_proj ({config.feed_forward_proj!r})"
    )
    raise UnsupportedModelError(
        f"the config's {setting}; t5_trt has graphs for the activations {', '.join(ACTIVATIONS)} and their other names, plain or "
        "gated. Use the Hugging Face class."
    )


def read_architecture(
    config: Any,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    tied_head: bool,
    scaled_head: bool,
    encoder_only: bool = False,
) -> Architecture:
    """Build the `Architecture` of a model from its config and the shapes of its loaded tensors.

    Args:
        config: a T5Config, MT5Config or UMT5Config (of Transformers 4 or 5).
        shapes: state-dict key -> shape.
        tied_head: whether ``lm_head.weight`` is the same tensor as ``shared.weight``.
        scaled_head: whether the decoder's output is multiplied by d_model**-0.5 before the head.
        encoder_only: there is no decoder, whatever the config says.

    Raises:
        UnsupportedModelError: the family or its activation has no graph.
    """
    model_type = check_family(config, encoder_only=encoder_only)
    query = shapes["encoder.block.0.layer.0.SelfAttention.q.weight"]
    return Architecture(
        vocab_size=shapes["shared.weight"][0],
        d_model=shapes["shared.weight"][1],
        d_kv=query[0] // config.num_heads,
        num_heads=config.num_heads,
        d_ff=shapes["encoder.block.0.layer.1.DenseReluDense.wo.weight"][1],
        encoder_layers=config.num_layers,
        decoder_layers=0 if encoder_only else config.num_decoder_layers,
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
        activation=activation_of(config),
        gated=bool(config.is_gated_act),
        epsilon=float(config.layer_norm_epsilon),
        tied_head=tied_head,
        output_scale=float(config.d_model) ** -0.5 if scaled_head else 1.0,
        bias_per_layer=model_type == "umt5",
    )
