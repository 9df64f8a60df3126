"""`TRTT5EncoderModel`: Hugging Face's encoder classes on engines, from encoder-only and from complete checkpoints."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MT5EncoderModel, T5EncoderModel, UMT5EncoderModel

from t5_trt import InputError, StrictModeError, TRTT5EncoderModel, TRTT5ForConditionalGeneration, UnsupportedModelError
from t5_trt.engine.store import EngineStore
from tests.conftest import SHIPPED
from tests.rtx_plans import provider
from tests.stand_in_tensorrt import stand_in_session
from tests.tiny_models import KINDS, batch, make_hugging_face
from tests.tolerances import HIDDEN_ATOL

STOCK = {"mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}


def saved(kind: str, folder: Path, *, complete: bool) -> tuple[Any, Path]:
    """(Hugging Face encoder, folder of a checkpoint with or without decoder weights)."""
    make_hugging_face(kind).save_pretrained(folder / "complete")
    hugging_face = (
        STOCK.get(kind, T5EncoderModel).from_pretrained(folder / "complete", attn_implementation="eager").eval()
    )
    hugging_face.save_pretrained(folder / "encoder")
    return hugging_face, folder / ("complete" if complete else "encoder")


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "encoder only"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_states_equal_hugging_face(kind: str, complete: bool, tmp_path: Path) -> None:
    hugging_face, folder = saved(kind, tmp_path, complete=complete)
    ours = TRTT5EncoderModel.from_pretrained(folder, num_threads=1)
    assert isinstance(ours, type(hugging_face)) and ours.architecture.decoder_layers == 0
    for inputs in (batch(), batch(1, 40), {"input_ids": batch(2, 9, padding="none")["input_ids"]}):
        with torch.no_grad():
            expected = hugging_face(**inputs).last_hidden_state
        got = ours(**inputs)
        keep = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        torch.testing.assert_close(got.last_hidden_state[keep], expected[keep], atol=HIDDEN_ATOL, rtol=1e-5)
    assert got.to_tuple()[0] is got.last_hidden_state and isinstance(ours(**inputs, return_dict=False), tuple)
    assert set(ours.state_dict()) == set(hugging_face.state_dict())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_on_the_tensorrt_session(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded buffers, half precision, embeddings from outside; no decoder engine is asked for."""
    hugging_face, folder = saved("t5-v1.1", tmp_path, complete=False)
    ours = TRTT5EncoderModel.from_pretrained(folder, num_threads=1)
    ours.session = stand_in_session(ours, monkeypatch, precision=precision, scaling=ours.fp16_scaling(precision))
    inputs = batch()
    keep = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, embeds = hugging_face(**inputs).last_hidden_state, hugging_face.shared(inputs["input_ids"])
    for form in (inputs, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}):
        got = ours(**form).last_hidden_state.float()
        assert (got[keep] - expected[keep]).norm() / expected[keep].norm() < (0.02 if precision == "fp16" else 1e-5)
    assert {graph for graph, _ in ours.session.stand_in.asked} == {"encoder", "encoder_embeds"}


def test_int8_and_the_store(tmp_path: Path) -> None:
    hugging_face, folder = saved("t5-v1.0", tmp_path, complete=False)
    ours = TRTT5EncoderModel.from_pretrained(folder, precision="int8", engine_cache_dir=tmp_path / "store")
    with torch.no_grad():
        expected = hugging_face(**batch()).last_hidden_state
    assert 1e-4 < (ours(**batch()).last_hidden_state - expected).norm() / expected.norm() < 0.2
    assert len(EngineStore(tmp_path / "store").entries()) == 1


def test_engine_for_gpus(tmp_path: Path) -> None:
    ours = TRTT5EncoderModel.from_pretrained(SHIPPED, num_threads=1)
    from t5_trt.engine.profiles import Shapes

    for precision in ("fp32", "fp16"):
        assert len(provider(ours, tmp_path, precision).plan("encoder", Shapes(B=2, S=32))) > 10_000


def test_what_engines_cannot_give(tmp_path: Path) -> None:
    hugging_face, folder = saved("t5-v1.1", tmp_path, complete=True)
    ours = TRTT5EncoderModel.from_pretrained(folder, num_threads=1)
    with torch.no_grad():
        expected = hugging_face(**batch(), output_attentions=True, output_hidden_states=True)
        got = ours(**batch(), output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(got.attentions, expected.attentions, atol=HIDDEN_ATOL, rtol=1e-5)
    assert len(got.hidden_states) == 3
    strict = TRTT5EncoderModel.from_pretrained(folder, strict=True)
    with pytest.raises(StrictModeError, match="output_attentions"):
        strict(**batch(), output_attentions=True)
    with pytest.raises(InputError, match="input_ids"):
        ours(input_ids=torch.tensor([[1, 10_000]]))


def test_saved_copied_and_wrapped(tmp_path: Path) -> None:
    hugging_face, folder = saved("t5-v1.1", tmp_path, complete=True)
    ours = TRTT5EncoderModel.from_pretrained(folder, num_threads=1)
    expected = ours(**batch()).last_hidden_state
    ours.save_pretrained(tmp_path / "again")
    others = [
        TRTT5EncoderModel.from_pretrained(tmp_path / "again"),
        TRTT5EncoderModel.from_model(hugging_face),
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
    ]
    for other in others:
        torch.testing.assert_close(other(**batch()).last_hidden_state, expected, atol=HIDDEN_ATOL, rtol=1e-5)
    assert T5EncoderModel.from_pretrained(tmp_path / "again").num_parameters() == ours.num_parameters()


def test_each_class_names_the_other(tmp_path: Path) -> None:
    _, folder = saved("t5-v1.1", tmp_path, complete=False)
    with pytest.raises(UnsupportedModelError, match="TRTT5EncoderModel"):
        TRTT5ForConditionalGeneration.from_pretrained(folder)
