"""Transformers' Auto classes and reports, and what other libraries save and load: pipelines, sentence encoders."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    ByT5Tokenizer,
    MT5Config,
    MT5EncoderModel,
    MT5ForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
    UMT5ForConditionalGeneration,
    pipeline,
)

from t5_trt import CheckpointError, TRTT5EncoderModel, TRTT5ForConditionalGeneration, modeling
from tests.tiny_models import batch, make_hugging_face
from tests.tolerances import HIDDEN_ATOL

FAMILIES = {
    "t5-v1.1": (T5Config, T5ForConditionalGeneration, T5EncoderModel),
    "mt5": (MT5Config, MT5ForConditionalGeneration, MT5EncoderModel),
    "umt5": (UMT5Config, UMT5ForConditionalGeneration, UMT5EncoderModel),
}


@pytest.fixture(autouse=True)
def _registrations() -> Iterator[None]:
    """Forget what a test registers."""
    autos = (AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding)
    before = [dict(auto._model_mapping._extra_content) for auto in autos]
    yield
    for auto, content in zip(autos, before, strict=True):
        auto._model_mapping._extra_content = content


def register(auto: Any, config: Any, model: Any) -> None:
    auto.register(config, model, exist_ok=True)
    if config not in auto._model_mapping._extra_content:
        pytest.skip("this version of Transformers ignores what is registered for its own configs")


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_registered_with_auto_classes(kind: str, tmp_path: Path) -> None:
    config, whole, encoder = FAMILIES[kind]
    hugging_face = make_hugging_face(kind)
    hugging_face.save_pretrained(tmp_path)
    register(AutoModelForSeq2SeqLM, config, TRTT5ForConditionalGeneration)
    ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert isinstance(ours, TRTT5ForConditionalGeneration) and isinstance(ours, whole) and ours.config_class is config
    assert (
        ours.generate(**batch(), max_new_tokens=5).tolist()
        == hugging_face.generate(**batch(), max_new_tokens=5).tolist()
    )
    assert isinstance(AutoModelForSeq2SeqLM.from_config(hugging_face.config), TRTT5ForConditionalGeneration)
    with torch.no_grad():
        expected = hugging_face.encoder(**batch())[0]
    for auto in (AutoModel, AutoModelForTextEncoding):
        register(auto, config, TRTT5EncoderModel)
        ours = auto.from_pretrained(tmp_path)
        assert isinstance(ours, TRTT5EncoderModel) and isinstance(ours, encoder)
        torch.testing.assert_close(ours(**batch())[0], expected, atol=HIDDEN_ATOL, rtol=1e-4)


class Mine(TRTT5ForConditionalGeneration):
    """A user's own class."""


def test_derived_class_is_registered(tmp_path: Path) -> None:
    make_hugging_face("mt5").save_pretrained(tmp_path)
    register(AutoModelForSeq2SeqLM, MT5Config, Mine)
    assert isinstance(AutoModelForSeq2SeqLM.from_pretrained(tmp_path), Mine)


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_report_about_the_loading(kind: str, tmp_path: Path) -> None:
    make_hugging_face(kind).save_pretrained(tmp_path)
    for ours, theirs in zip((TRTT5ForConditionalGeneration, TRTT5EncoderModel), FAMILIES[kind][1:], strict=True):
        hugging_face, expected = theirs.from_pretrained(tmp_path, output_loading_info=True)
        model, info = ours.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(model, ours) and info == expected
        assert set(model.state_dict()) == set(hugging_face.state_dict())


def test_report_names_what_is_missing(tmp_path: Path) -> None:
    """Without the report such a checkpoint is refused."""
    hugging_face = make_hugging_face("t5-v1.1")
    state = {name: tensor for name, tensor in hugging_face.state_dict().items() if "block.1.layer.0" not in name}
    hugging_face.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match="lacks 10 of the model's tensors"):
        TRTT5ForConditionalGeneration.from_pretrained(tmp_path)
    _, expected = T5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    ours, info = TRTT5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert info == expected and len(info["missing_keys"]) == 10
    assert ours.generate(**batch(), max_new_tokens=3).shape[0] == 3


@pytest.mark.parametrize(
    ("kind", "changes"), [("t5-v1.0", {"d_ff": 128, "vocab_size": 250}), ("t5-v1.1", {"d_ff": 128})]
)
def test_mismatched_tensors_are_newly_initialised(
    kind: str, changes: dict[str, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_hugging_face(kind).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="do not fit its config"):
        TRTT5ForConditionalGeneration.from_pretrained(tmp_path, **changes)
    results = []
    logging.getLogger("transformers").propagate = True
    for loaded in (T5ForConditionalGeneration, TRTT5ForConditionalGeneration):
        torch.manual_seed(0)
        caplog.clear()
        model, info = loaded.from_pretrained(
            tmp_path, ignore_mismatched_sizes=True, output_loading_info=True, attn_implementation="eager", **changes
        )
        results.append((model.eval(), info, "MISMATCH" in caplog.text))
    (hugging_face, expected, _), (ours, info, warned) = results
    assert info == expected and info["mismatched_keys"] and warned
    for name, parameter in hugging_face.named_parameters():
        assert torch.equal(dict(ours.named_parameters())[name], parameter), name
    assert (
        ours.generate(**batch(), max_new_tokens=5).tolist()
        == hugging_face.generate(**batch(), max_new_tokens=5).tolist()
    )


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_random_weights_of_a_seed_are_equal(kind: str) -> None:
    config = make_hugging_face(kind).config
    for ours, theirs in zip((TRTT5ForConditionalGeneration, TRTT5EncoderModel), FAMILIES[kind][1:], strict=True):
        states = []
        for made in (ours, theirs):
            torch.manual_seed(0)
            states.append(made(copy.deepcopy(config)).state_dict())
        torch.testing.assert_close(*states, rtol=0, atol=0)


def test_transformers_pipeline_is_saved_and_loaded(tmp_path: Path) -> None:
    make_hugging_face("t5-v1.1", vocab_size=384).save_pretrained(tmp_path / "model")
    hugging_face = T5EncoderModel.from_pretrained(tmp_path / "model")
    ours = TRTT5EncoderModel.from_pretrained(tmp_path / "model")
    pipes = [pipeline("feature-extraction", model=model, tokenizer=ByT5Tokenizer()) for model in (hugging_face, ours)]
    expected = torch.tensor(pipes[0]("a text"))
    torch.testing.assert_close(torch.tensor(pipes[1]("a text")), expected, atol=HIDDEN_ATOL, rtol=1e-4)
    pipes[1].save_pretrained(tmp_path / "pipe")
    saved = T5EncoderModel.from_pretrained(tmp_path / "pipe"), ByT5Tokenizer.from_pretrained(tmp_path / "pipe")
    loaded = pipeline("feature-extraction", model=saved[0], tokenizer=saved[1])
    torch.testing.assert_close(torch.tensor(loaded("a text")), expected, atol=HIDDEN_ATOL, rtol=1e-4)


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_classes_are_found_where_earlier_pipelines_name_them(kind: str, tmp_path: Path) -> None:
    """diffusers writes a class's module into ``model_index.json``; `t5_trt.modeling` was one and is a package now."""
    make_hugging_face(kind).save_pretrained(tmp_path)
    saved = type(TRTT5EncoderModel.from_pretrained(tmp_path))
    assert getattr(modeling, saved.__name__) is saved and issubclass(saved, modeling.PreTrainedModel)


@pytest.mark.parametrize("kind", list(FAMILIES))
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_diffusion_pipeline_is_saved_and_loaded(kind: str, dtype: Any, tmp_path: Path) -> None:
    diffusers: Any = pytest.importorskip("diffusers", reason="not in the set of oldest versions")
    make_hugging_face(kind, vocab_size=384).save_pretrained(tmp_path / "model")
    ours = TRTT5EncoderModel.from_pretrained(tmp_path / "model", num_threads=1)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=64,
        in_channels=4, cross_attention_dim=24, out_channels=8, num_embeds_ada_norm=1000, use_additional_conditions=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=32)
    scheduler = diffusers.DDIMScheduler()
    pipe = diffusers.PixArtAlphaPipeline(ByT5Tokenizer(), ours, vae, transformer, scheduler)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "pipe", **({} if dtype is None else {"dtype": dtype})
    )
    assert type(loaded.text_encoder) is type(ours) and loaded.text_encoder.dtype is (dtype or torch.float32)
    expected = FAMILIES[kind][2].from_pretrained(tmp_path / "pipe", subfolder="text_encoder", dtype=torch.float32)
    for given in ({}, {"text_encoder": ours}, {"text_encoder": expected}):
        loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe", **given)
        with torch.no_grad():
            states = [model(**batch()).last_hidden_state for model in (loaded.text_encoder, expected)]
        torch.testing.assert_close(*states, atol=HIDDEN_ATOL, rtol=1e-4)
    loaded = pipe.to(dtype or torch.float32)
    loaded.set_progress_bar_config(disable=True)
    image = loaded(
        "a",
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="np",
        height=16,
        width=16,
        use_resolution_binning=False,
    )
    assert image.images.shape[-1] == 3


@pytest.mark.parametrize("half", [False, True])
def test_sentence_encoder_is_saved_and_loaded(half: bool, tmp_path: Path) -> None:
    library: Any = pytest.importorskip("sentence_transformers", reason="not in the set of oldest versions")
    parts: Any = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    make_hugging_face("t5-v1.1", vocab_size=384).save_pretrained(tmp_path / "model")
    ByT5Tokenizer().save_pretrained(tmp_path / "model")

    def made(model: Any) -> Any:
        transformer = parts.Transformer(str(tmp_path / "model"))
        transformer.auto_model = model
        modules = [transformer, parts.Pooling(64), parts.Dense(64, 8)]
        return library.SentenceTransformer(modules=modules, device="cpu")

    ours = made(TRTT5EncoderModel.from_pretrained(tmp_path / "model", num_threads=1))
    hugging_face = made(T5EncoderModel.from_pretrained(tmp_path / "model", dtype=torch.float32))
    hugging_face[2].load_state_dict(ours[2].state_dict())
    texts, tolerance = ["a text", "another one"], 0.02 if half else HIDDEN_ATOL
    if half:
        ours, hugging_face = ours.bfloat16(), hugging_face.bfloat16()
    expected = hugging_face.encode(texts, convert_to_tensor=True)
    got = ours.encode(texts, convert_to_tensor=True)
    assert got.dtype is expected.dtype
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    ours.save(str(tmp_path / "saved"))
    loaded = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(loaded.encode(texts, convert_to_tensor=True), expected, atol=tolerance, rtol=tolerance)
