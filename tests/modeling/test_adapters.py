"""Adapters of peft give the tokens, logits and losses that the Hugging Face class gives with them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import (
    LNTuningConfig,
    LoHaConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import T5EncoderModel

from t5_trt import TRTT5EncoderModel, TRTT5ForConditionalGeneration
from t5_trt.errors import InputError, StrictModeError, UnsupportedModelError
from tests.adapters import BATCH, CONFIGS, LABELS, QUIET, compare, logits, lora, peft_pair, randomize, tokens
from tests.tiny_models import KINDS, make_hugging_face

pytestmark = QUIET


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("adapter", list(CONFIGS))
def test_every_kind_of_adapter_gives_equal_results_in_every_family(kind: str, adapter: str) -> None:
    hugging_face = make_hugging_face(kind)
    theirs, mine, ours = peft_pair(hugging_face, {"default": CONFIGS[adapter]})
    compare(theirs, mine)
    assert ours.last_generation_path.loop == "device"
    assert tokens(theirs) != tokens(hugging_face)  # the adapter matters
    if adapter in ("lora", "ia3"):
        for mode in ("beams", "sampling"):
            assert tokens(theirs, mode) == tokens(mine, mode)
    with torch.no_grad():
        wanted, found = (model(**BATCH, labels=LABELS) for model in (theirs, mine))
    assert torch.allclose(wanted.loss, found.loss, atol=1e-4)
    assert torch.allclose(wanted.encoder_last_hidden_state, found.encoder_last_hidden_state, atol=1e-4)


@pytest.mark.parametrize("kind", ["t5-v1.0", "umt5"])
@pytest.mark.parametrize(
    "config",
    [
        lora(modules_to_save=["lm_head", "final_layer_norm", "relative_attention_bias"]),
        lora(trainable_token_indices=[5, 6, 7]),
        lora(target_modules=["relative_attention_bias"]),
        lora(target_modules=["shared"]),  # has no effect in the Hugging Face class either: stacks look up elsewhere
        LoHaConfig(r=4, target_modules=["q", "wo"]),
        LNTuningConfig(target_modules=["layer_norm", "final_layer_norm"]),
        PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4),
        PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4),
    ],
    ids=["modules_to_save", "token_indices", "bias", "shared", "loha", "norms", "prompt", "prefix"],
)
def test_what_else_peft_trains_gives_equal_results(kind: str, config: Any) -> None:
    theirs, mine, _ = peft_pair(make_hugging_face(kind), {"default": config})
    compare(theirs, mine)
    assert tokens(theirs, "beams") == tokens(mine, "beams")


def test_adapters_in_half_precision_are_added_in_float32() -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    theirs, _, _ = peft_pair(hugging_face, {"default": lora()})
    ours = TRTT5ForConditionalGeneration.from_model(copy.deepcopy(hugging_face).half(), num_threads=1)
    mine = get_peft_model(ours, lora()).eval()
    mine.load_state_dict(theirs.half().state_dict())
    found = logits(mine)
    assert found.dtype == torch.float16
    assert torch.allclose(logits(theirs.float()), found.float(), rtol=0, atol=0.05)


def test_encoder_only_models_run_adapters() -> None:
    whole = make_hugging_face("t5-v1.1")
    hugging_face = T5EncoderModel(copy.deepcopy(whole.config)).eval()
    hugging_face.load_state_dict(whole.state_dict(), strict=False)
    ours = TRTT5EncoderModel.from_model(copy.deepcopy(hugging_face), num_threads=1)
    theirs, mine = (
        get_peft_model(model, lora(task_type="FEATURE_EXTRACTION")).eval() for model in (hugging_face, ours)
    )
    mine.load_state_dict(randomize(theirs, 1).state_dict())
    with torch.no_grad():
        wanted, found = (model(**BATCH).last_hidden_state for model in (theirs, mine))
    assert torch.allclose(wanted, found, atol=1e-4)
    with mine.disable_adapter(), torch.no_grad():
        assert not torch.allclose(mine(**BATCH).last_hidden_state, found, atol=1e-2)


def test_encoder_that_was_taken_out_keeps_its_adapter() -> None:
    theirs, _, ours = peft_pair(make_hugging_face("t5-v1.0"), {"default": lora()})
    encoder = copy.deepcopy(ours.encoder)
    with torch.no_grad():
        wanted = theirs.get_base_model().encoder(**BATCH).last_hidden_state
        assert torch.allclose(encoder(**BATCH).last_hidden_state, wanted, atol=1e-4)


def test_copies_and_pickles_keep_their_adapters() -> None:
    theirs, mine, ours = peft_pair(make_hugging_face("t5-v1.0"), {"default": lora(), "two": lora(target_modules=["k"])})
    compare(theirs, mine)
    for made in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), copy.deepcopy(ours)):
        compare(theirs, made)
    copied = copy.deepcopy(mine)
    for model in (theirs, copied):
        model.set_adapter("two")
    compare(theirs, copied)


def test_a_model_that_has_adapters_can_be_wrapped() -> None:
    theirs, _, _ = peft_pair(make_hugging_face("mt5"), {"default": lora(), "two": lora(target_modules=["k"])})
    inner = theirs.get_base_model()
    ours = TRTT5ForConditionalGeneration.from_model(inner, num_threads=1)
    compare(theirs, ours)
    with pytest.raises(InputError, match="get_base_model"):
        TRTT5ForConditionalGeneration.from_model(theirs)
    theirs.set_adapter("two")  # the layers are shared
    compare(theirs, ours)


def test_each_row_may_have_an_adapter_of_its_own() -> None:
    """By the Hugging Face model, which the layers' hooks reach."""
    theirs, mine, ours = peft_pair(
        make_hugging_face("t5-v1.0"), {"default": lora(), "two": lora(target_modules=["k", "wo"])}
    )
    names = ["two", "default", "__base__"]
    compare(theirs, mine, adapter_names=names)
    assert ours.last_generation_path.reason == "adapter_names"
    assert tokens(theirs, "beams", adapter_names=names) == tokens(mine, "beams", adapter_names=names)
    compare(theirs, mine)
    assert ours.last_generation_path.loop == "device"
    strict = get_peft_model(TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0"), strict=True), lora())
    with pytest.raises(StrictModeError, match="adapter_names"):
        logits(strict.eval(), adapter_names=["default"] * 3)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lora(lora_bias=True), r"SelfAttention\.q got peft\.tuners\.lora\.layer\.Linear with adapter default: peft cannot merge"),
        (lora(target_modules=["embed_tokens"]), "embed_tokens got adapters that make different embeddings"),
        (lora(modules_to_save=["DenseReluDense"]), r"DenseReluDense got an adapter \(ModulesToSaveWrapper\)"),
    ],
    ids=["bias", "embeddings", "block"],
)  # fmt: skip
def test_adapters_that_are_more_than_other_weights_are_refused_by_name(config: Any, words: str) -> None:
    _, mine, _ = peft_pair(make_hugging_face("t5-v1.0"), {"default": config})
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=words):
            tokens(mine)


def test_layers_whose_forward_pass_is_no_product_are_refused() -> None:
    _, mine, ours = peft_pair(make_hugging_face("t5-v1.0"), {"default": lora()})
    layer = ours.encoder.block[0].layer[0].SelfAttention.q
    layer.forward = lambda states: layer.base_layer(states).tanh()
    with pytest.raises(UnsupportedModelError, match="forward pass was exchanged"):
        tokens(mine)
