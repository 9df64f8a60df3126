"""Configs: every setting that Hugging Face's classes take gives their results, or an error that names the setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MT5ForConditionalGeneration, T5ForConditionalGeneration, UMT5ForConditionalGeneration
from transformers.activations import ACT2FN

from t5_trt import (
    CheckpointError,
    InputError,
    TRTT5EncoderModel,
    TRTT5ForConditionalGeneration,
    UnsupportedModelError,
)
from t5_trt.checkpoint.families import activation_of
from t5_trt.graph.architecture import ACTIVATIONS
from tests.tiny_models import SIZES, VOCAB, batch, make_hugging_face

FAMILIES = {
    "t5-v1.0": T5ForConditionalGeneration,
    "mt5": MT5ForConditionalGeneration,
    "umt5": UMT5ForConditionalGeneration,
}
WEIGHTS = "model.safetensors"
TARGET = batch(tokens=5, seed=8, padding="none")["input_ids"]


def assert_same_logits(ours: Any, hugging_face: Any) -> None:
    with torch.no_grad():
        expected = hugging_face(**batch(), decoder_input_ids=TARGET).logits
        torch.testing.assert_close(ours(**batch(), decoder_input_ids=TARGET).logits, expected, atol=1e-3, rtol=1e-3)


def edit(folder: Path, **changes: Any) -> None:
    """Change entries of config.json; ... removes one."""
    path = folder / "config.json"
    kept = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in kept.items() if value is not ...}))


def load(folder: Path, **options: Any) -> Any:
    return TRTT5ForConditionalGeneration.from_pretrained(folder, num_threads=1, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A T5 v1.1 model, saved."""
    make_hugging_face("t5-v1.1").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# --- the scale of the head ----------------------------------------------------------------------------------------------

SCALES: list[dict[str, Any]] = [
    {}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}, {"scale_decoder_outputs": False},
    {"scale_decoder_outputs": True, "tie_word_embeddings": False}, {"scale_decoder_outputs": False, "tie_word_embeddings": True},
]  # fmt: skip


@pytest.mark.parametrize("kind", list(FAMILIES))
@pytest.mark.parametrize("settings", SCALES)
def test_the_installed_class_says_whether_the_head_is_scaled(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """In a config made in Python, saved and loaded, and edited in the file."""
    hugging_face = make_hugging_face(kind, attention="eager", **settings)
    assert_same_logits(TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1), hugging_face)
    hugging_face.save_pretrained(tmp_path)
    names = ("tie_word_embeddings", "scale_decoder_outputs")
    for changes in ({}, {name: settings.get(name, ...) for name in names}):
        edit(tmp_path, **changes)
        again = FAMILIES[kind].from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
        assert_same_logits(load(tmp_path), again)


@pytest.mark.parametrize("kind", list(FAMILIES))
@pytest.mark.parametrize("value", [False, True])
def test_settings_of_the_scale_that_are_set_later(kind: str, value: bool) -> None:
    hugging_face = make_hugging_face(kind, attention="eager")
    for name in ("tie_word_embeddings", "scale_decoder_outputs"):
        setattr(hugging_face.config, name, value)
        assert_same_logits(TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1), hugging_face)


def test_asking_the_class_leaves_the_random_state_alone() -> None:
    model = TRTT5ForConditionalGeneration.from_model(make_hugging_face("umt5"), num_threads=1)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert model.architecture.output_scale and torch.equal(torch.rand(1), expected)


# --- activations --------------------------------------------------------------------------------------------------------


def config_with(activation: str) -> Any:
    config = make_hugging_face("t5-v1.0").config
    config.dense_act_fn = activation
    return config


def test_activations_are_recognised_by_what_they_compute() -> None:
    """Every name that Transformers knows is either one of ours on a dense grid, or refused."""
    grid = torch.linspace(-30, 30, 20001)
    served = set()
    for name in ACT2FN:
        try:
            known = activation_of(config_with(name))
        except UnsupportedModelError:
            continue
        served.add(name)
        with torch.no_grad():
            torch.testing.assert_close(ACT2FN[name](grid), ACT2FN[known](grid), atol=1e-5, rtol=1e-4)
    assert {*ACTIVATIONS, "swish", "gelu_pytorch_tanh", "gelu_fast", "gelu_python"} <= served
    assert served.isdisjoint(
        {"quick_gelu", "gelu_10", "relu6", "relu2", "mish", "tanh", "sigmoid", "linear", "leaky_relu"}
    )


@pytest.mark.parametrize("projection", ["gated-gelu_pytorch_tanh", "gelu_fast", "swish", "gated-swish", "gated-relu"])
def test_other_names_of_activations(projection: str, tmp_path: Path) -> None:
    hugging_face = make_hugging_face("t5-v1.0", feed_forward_proj=projection)
    hugging_face.save_pretrained(tmp_path)
    assert_same_logits(load(tmp_path), hugging_face)


@pytest.mark.parametrize(("gated", "name"), [(True, "relu"), (True, "gelu"), (True, "swish")])
def test_dense_act_fn_goes_before_feed_forward_proj(gated: bool, name: str, folder: Path) -> None:
    edit(folder, dense_act_fn=name, is_gated_act=gated)
    hugging_face = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    assert_same_logits(load(folder), hugging_face)


@pytest.mark.parametrize("name", ["quick_gelu", "nothing", ["relu"], None])
def test_errors_name_the_setting_of_the_activation(name: Any, folder: Path) -> None:
    edit(folder, dense_act_fn=name)
    with pytest.raises(
        UnsupportedModelError, match=r"dense_act_fn is .*, which goes before feed_forward_proj \('gated-gelu'\)"
    ):
        load(folder)
    edit(folder, dense_act_fn=..., feed_forward_proj="gated-mish")
    with pytest.raises(UnsupportedModelError, match="feed_forward_proj is 'gated-mish'"):
        load(folder)


# --- families and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"model_type": ...}, {"model_type": ..., "architectures": ...}, {"model_type": None}]
)
def test_a_config_without_model_type(changes: dict[str, Any], folder: Path) -> None:
    edit(folder, **changes)
    hugging_face = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load(folder, dropout_rate=0.3)
    assert ours.config.model_type == "t5" and ours.config.dropout_rate == 0.3
    assert_same_logits(ours, hugging_face)


@pytest.mark.parametrize("kind", ["mt5", "umt5"])
def test_a_config_without_model_type_is_of_its_architecture(kind: str, tmp_path: Path) -> None:
    hugging_face = make_hugging_face(kind)
    hugging_face.save_pretrained(tmp_path)
    edit(tmp_path, model_type=...)
    ours = load(tmp_path)
    assert isinstance(ours, FAMILIES[kind])
    assert_same_logits(ours, hugging_face)


def test_a_config_of_another_architecture_without_model_type(folder: Path) -> None:
    edit(folder, model_type=..., architectures=["BertModel"])
    with pytest.raises(UnsupportedModelError, match=r"without model_type whose architectures are \['BertModel'\]"):
        load(folder)


@pytest.mark.parametrize(
    "changes", [{"num_decoder_layers": ...}, {"num_decoder_layers": 1}, {"is_gated_act": "yes"}, {"more": {"a": 1}}]
)
def test_configs_that_work(changes: dict[str, Any], folder: Path) -> None:
    edit(folder, **changes)
    hugging_face = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    assert_same_logits(load(folder), hugging_face)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 0}, {"num_heads": -1}, {"num_layers": 0}, {"num_decoder_layers": 0}, {"relative_attention_num_buckets": 3},
        {"relative_attention_max_distance": 0}, {"layer_norm_epsilon": -1.0}, {"num_heads": "4"}, {"d_kv": 16.5},
        {"layer_norm_epsilon": "1e-6"},
    ],
)  # fmt: skip
def test_errors_name_the_setting(changes: dict[str, Any], folder: Path) -> None:
    edit(folder, **changes)
    with pytest.raises((UnsupportedModelError, CheckpointError), match=next(iter(changes))):
        load(folder)


def test_a_config_in_memory_is_checked(folder: Path) -> None:
    config = make_hugging_face("t5-v1.1").config
    config.num_layers = 0
    for make in (TRTT5ForConditionalGeneration, lambda c: load(folder, config=c)):
        with pytest.raises(UnsupportedModelError, match="num_layers is 0; expected an integer of at least 1"):
            make(config)


@pytest.mark.parametrize("quantized", [{"quant_method": "gptq", "bits": 4}, {"load_in_8bit": True}])
def test_quantized_checkpoints_are_refused(quantized: dict[str, Any], folder: Path) -> None:
    edit(folder, quantization_config=quantized)
    with pytest.raises(UnsupportedModelError, match=r"has a quantization_config \(method .*precision='int8'"):
        load(folder)
    config = make_hugging_face("t5-v1.1").config
    config.quantization_config = quantized
    with pytest.raises(UnsupportedModelError, match="has a quantization_config"):
        load(folder, config=config)


@pytest.mark.parametrize("name", ["decoder_start_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [..., None])
def test_tokens_that_only_the_generation_config_has(name: str, value: Any, folder: Path) -> None:
    """generate() needs none in the config; labels do, as in the Hugging Face class."""
    edit(folder, **{name: value})
    hugging_face = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load(folder)
    assert torch.equal(ours.generate(**batch(), max_new_tokens=5), hugging_face.generate(**batch(), max_new_tokens=5))
    assert_same_logits(ours, hugging_face)
    if getattr(hugging_face.config, name, None) is not None:  # a default
        return
    for model in (hugging_face, ours):
        with pytest.raises((ValueError, AttributeError), match=name):
            model(**batch(), labels=TARGET)
    with pytest.raises(InputError, match=f"the config has no {name}.*or pass decoder_input_ids"):
        ours(**batch(), labels=TARGET)
    with torch.no_grad():
        assert ours(**batch(), labels=TARGET, decoder_input_ids=TARGET).loss.isfinite()


# --- embeddings and heads -----------------------------------------------------------------------------------------------


def tables(vocabulary: int, key: str) -> dict[str, torch.Tensor]:
    return {key: torch.randn(vocabulary, SIZES["d_model"])}


@pytest.mark.parametrize("key", ["lm_head.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight"])
@pytest.mark.parametrize("stored", ["safetensors", "shards", "bin", "variant"])
def test_other_rows_in_head_and_embedding(key: str, stored: str, folder: Path) -> None:
    state = {**load_file(folder / WEIGHTS), **tables(200, key)}
    (folder / WEIGHTS).unlink()
    variant = "fp16" if stored == "variant" else None
    if stored == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif stored == "shards":
        split = {
            f"part{number}.safetensors": [name for name in state if (name == key) == bool(number)] for number in (0, 1)
        }
        for name, keys in split.items():
            save_file({each: state[each] for each in keys}, folder / name, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {each: name for name, keys in split.items() for each in keys}}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    else:
        save_file(state, folder / ("model.fp16.safetensors" if variant else WEIGHTS), {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"{key} of .* has shape \(200, 64\); expected \({VOCAB}, 64\).*as shared.weight has"
    ):
        load(folder, variant=variant)


def test_a_bin_file_with_another_vocabulary_than_the_config(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    edit(folder, vocab_size=300)
    with pytest.raises(CheckpointError, match=rf"shared.weight of .* has shape \({VOCAB}, 64\); expected \(300, 64\)"):
        load(folder)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_an_embedding_of_its_own_is_refused_when_loading(stack: str, folder: Path) -> None:
    """The Hugging Face class keeps it apart; without the tensor results would change, so that is no advice."""
    key = f"{stack}.embed_tokens.weight"
    save_file({**load_file(folder / WEIGHTS), **tables(VOCAB, key)}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(
        UnsupportedModelError, match=f"{key} has other values than shared.weight.*Use the Hugging Face class"
    ):
        load(folder)
    hugging_face = make_hugging_face("t5-v1.1")
    getattr(hugging_face, stack).embed_tokens = nn.Embedding(VOCAB, SIZES["d_model"])
    with pytest.raises(UnsupportedModelError, match=f"{key} has other values"):
        TRTT5ForConditionalGeneration.from_model(hugging_face)


def test_an_encoder_model_ignores_tables_of_the_decoder(folder: Path) -> None:
    more = {**tables(200, "lm_head.weight"), **tables(150, "decoder.embed_tokens.weight")}
    save_file({**load_file(folder / WEIGHTS), **more}, folder / WEIGHTS, {"format": "pt"})
    states = TRTT5EncoderModel.from_pretrained(folder, num_threads=1)(**batch()).last_hidden_state
    torch.testing.assert_close(states, make_hugging_face("t5-v1.1").encoder(**batch())[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            nn.Linear(64, 32, bias=False),
            rf"lm_head.weight has shape \(32, 64\); expected \({VOCAB}, 64\), as shared.weight has",
        ),
        (nn.Linear(64, VOCAB + 5, bias=False), rf"lm_head.weight has shape \({VOCAB + 5}, 64\)"),
        (nn.Linear(64, VOCAB, bias=True), "1 more .first 'lm_head.bias'"),
    ],
)
def test_exchanged_heads_are_named(head: nn.Module, message: str) -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    ours.generate(**batch(), max_new_tokens=3)
    hugging_face.lm_head = ours.lm_head = head
    for use in (
        lambda: ours.generate(**batch(), max_new_tokens=3),
        lambda: ours(**batch(), decoder_input_ids=TARGET),
        lambda: TRTT5ForConditionalGeneration.from_model(hugging_face),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            use()


def test_embedding_and_head_that_were_exchanged_together() -> None:
    """The Hugging Face class goes by the matrices, not by vocab_size."""
    hugging_face = make_hugging_face("t5-v1.1")
    hugging_face.set_input_embeddings(nn.Embedding(300, 64))
    hugging_face.lm_head = nn.Linear(64, 300, bias=False)
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    assert_same_logits(ours, hugging_face)
    assert ours.architecture.vocab_size == ours.config.vocab_size == 300


def test_weights_without_data_are_refused() -> None:
    """As accelerate.cpu_offload() leaves them."""
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1"), num_threads=1)
    ours.decoder.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"decoder\..* has no data here \(device meta\)"):
        ours.generate(**batch(), max_new_tokens=3)
