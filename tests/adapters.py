"""Models with adapters of peft in pairs: Hugging Face's and ours, with equal random adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    get_peft_model,
)

from t5_trt import TRTT5ForConditionalGeneration
from tests.tiny_models import VOCAB, batch, make_hugging_face
from tests.tolerances import LOGITS_ATOL

#: names that peft's parameters have, of layers and of copies of modules
_OF_ADAPTERS = ("lora_", "ia3_", "modules_to_save.", "trainable_tokens", "hada_", "ln_tuning", "prompt_encoder")
#: what peft 0.21 causes with Transformers 5.24, and says about every adapter of a tied head
QUIET = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Both .past_key_values. and .cache. are set:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
]
EVERYWHERE = ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo", "lm_head"]


def lora(**options: Any) -> LoraConfig:
    """LoRA on q and v unless `options` say otherwise."""
    return LoraConfig(**{"r": 4, "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM", **options})


CONFIGS: dict[str, Any] = {
    "lora": lora(target_modules=EVERYWHERE),
    "rslora": lora(use_rslora=True, target_modules=["q", "wo"]),
    "dora": lora(use_dora=True, target_modules=["v", "wo", "lm_head"]),
    "ia3": IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"], task_type="SEQ_2_SEQ_LM"),
}


def randomize(model: Any, seed: int) -> Any:
    """Give all adapters of a model random weights, which change what it writes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in _OF_ADAPTERS):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def peft_pair(hugging_face: Any, configs: dict[str, Any], **options: Any) -> tuple[Any, Any, Any]:
    """A Hugging Face model with adapters, ours with the same, and the model on engines in ours.

    Args:
        hugging_face: is left as it is.
        configs: by name of the adapter; the first one is active.
        options: of ``from_model``.
    """
    ours = TRTT5ForConditionalGeneration.from_model(copy.deepcopy(hugging_face), **{"num_threads": 1, **options})
    wrapped = []
    for model in (copy.deepcopy(hugging_face), ours):
        (first, config), *more = configs.items()
        made = get_peft_model(model, copy.deepcopy(config), adapter_name=first)
        for name, each in more:
            made.add_adapter(name, copy.deepcopy(each))
        wrapped.append(made.eval())
    theirs, mine = wrapped
    randomize(theirs, seed=1)
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine, ours


def save_adapters(folder: Path, kind: str, configs: dict[str, Any]) -> Path:
    """Write a model to ``folder/base`` and an adapter of it to ``folder/NAME`` for each config; returns the first's folder."""
    hugging_face = make_hugging_face(kind)
    hugging_face.config.tie_word_embeddings = hugging_face.lm_head.weight is hugging_face.shared.weight
    hugging_face.save_pretrained(folder / "base")
    for seed, (name, config) in enumerate(configs.items()):
        model = type(hugging_face).from_pretrained(folder / "base")
        randomize(get_peft_model(model, copy.deepcopy(config)), seed).save_pretrained(folder / name)
    return folder / next(iter(configs))


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20},
}
BATCH = batch()
LABELS = torch.randint(2, VOCAB, (3, 6), generator=torch.Generator().manual_seed(3))


def tokens(model: Any, mode: str = "greedy", **options: Any) -> list[Any]:
    torch.manual_seed(0)
    return model.generate(**BATCH, **{"max_new_tokens": 12, **MODES[mode], **options}).tolist()  # type: ignore[no-any-return]


@torch.no_grad()
def logits(model: Any, **options: Any) -> torch.Tensor:
    return model(**BATCH, decoder_input_ids=LABELS, **options).logits  # type: ignore[no-any-return]


def compare(theirs: Any, mine: Any, **options: Any) -> None:
    assert torch.allclose(logits(theirs, **options), logits(mine, **options), rtol=0, atol=LOGITS_ATOL)
    assert tokens(theirs, **options) == tokens(mine, **options)
