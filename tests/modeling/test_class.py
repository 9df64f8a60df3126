"""The class itself: what it is an instance of, where its weights are, and how it behaves in other people's code."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationMixin, PreTrainedModel, T5Config, T5ForConditionalGeneration

import t5_trt
from t5_trt import BackendError, CheckpointError, InputError, StrictModeError, TRTT5ForConditionalGeneration
from t5_trt.compat import CACHE
from t5_trt.runtime.open_graph import SHARED_FROM_BYTES
from tests.tiny_models import batch, make_hugging_face

REQUEST = {**batch(), "max_new_tokens": 8}


def test_public_names() -> None:
    assert all(hasattr(t5_trt, name) for name in t5_trt.__all__)


def test_instance_checks(pair: tuple[Any, Any]) -> None:
    hugging_face, ours = pair
    for kind in (PreTrainedModel, GenerationMixin, torch.nn.Module, type(hugging_face), TRTT5ForConditionalGeneration):
        assert isinstance(ours, kind)
    assert ours.can_generate() and ours.config.is_encoder_decoder
    assert ours.device == torch.device("cpu") and ours.dtype == torch.float32 and not ours.training
    assert ours.num_parameters() == hugging_face.num_parameters()
    assert ours.main_input_name == "input_ids"


@pytest.mark.parametrize("decode", ["kernels", "engine"])
def test_weights_are_not_held_twice(decode: str) -> None:
    """Parameters, reference model, ONNX Runtime and the C code share memory, for every matrix that is large enough to matter."""
    hugging_face = make_hugging_face("t5-v1.1", d_model=256, d_ff=512)
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1, decode=decode)
    ours.generate(**REQUEST)
    parameters = dict(ours.named_parameters())
    assert {name: p.data_ptr() for name, p in parameters.items()} == {
        name: p.data_ptr() for name, p in ours.reference.named_parameters()
    }
    large = {name for name, p in parameters.items() if p.nbytes >= SHARED_FROM_BYTES and "relative" not in name}
    used = {name for name in large if "encoder.embed" not in name and "decoder.embed" not in name}
    found = {name: value.data_ptr() for name, value in ours.session._shared.items()}
    if decode == "kernels":
        kept = ours.session._steps._made.weights.kept | ours.session._steps._encoder_made._weights.kept
        found |= {name: tensor.data_ptr() for name, tensor in kept.items() if name in parameters}
    assert used <= set(found)
    assert found == {name: parameters[name].data_ptr() for name in found}


def test_engines_are_opened_lazily(fresh: Any) -> None:
    assert "engines=(none opened yet)" in repr(fresh)
    fresh.generate(**REQUEST)
    assert fresh.session.loaded_graphs() == ("encoder (C code)", "decoder (C code)")
    ours = TRTT5ForConditionalGeneration.from_model(fresh.reference, num_threads=1, decode="engine")
    ours.generate(**REQUEST)
    assert ours.session.loaded_graphs() == ("encoder", "decoder_step")
    ours(**batch(), decoder_input_ids=torch.zeros(3, 4, dtype=torch.long))
    assert "decoder_queries" in ours.session.loaded_graphs()


def test_encoder_module(fresh: Any) -> None:
    """model.encoder(...) runs the engine, and its parameters are those of the Hugging Face class."""
    with torch.no_grad():
        expected = fresh.reference.encoder(**batch()).last_hidden_state
        torch.testing.assert_close(fresh.encoder(**batch()).last_hidden_state, expected, atol=1e-4, rtol=1e-5)
        assert isinstance(fresh.encoder(**batch(), return_dict=False), tuple)
        assert len(fresh.encoder(**batch(), output_hidden_states=True).hidden_states) == 3
    assert fresh.get_encoder() is fresh.encoder


def test_moves(fresh: Any) -> None:
    assert fresh.to("cpu") is fresh and fresh.cpu() is fresh and fresh.eval() is fresh and fresh.float() is fresh
    for move in (lambda: fresh.to("cuda:0"), fresh.cuda, lambda: fresh.cuda(0)):
        with pytest.raises(BackendError, match=r"runs on cpu .*device="):
            move()
    assert fresh.generate(**REQUEST).shape[0] == 3


def test_strict_has_no_reference() -> None:
    strict = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0"), strict=True)
    with pytest.raises(StrictModeError, match="strict=False"):
        _ = strict.reference


def test_reference_is_no_part_of_the_model(fresh: Any, tmp_path: Path) -> None:
    names = set(fresh.state_dict())
    assert fresh.reference is fresh.reference and set(fresh.state_dict()) == names
    fresh.save_pretrained(tmp_path)
    again = type(fresh).from_pretrained(tmp_path)
    assert again.generate(**REQUEST).tolist() == fresh.generate(**REQUEST).tolist()


def test_copies(fresh: Any) -> None:
    expected = fresh.generate(**REQUEST).tolist()
    fresh.reference.eval()
    for twin in (copy.deepcopy(fresh), pickle.loads(pickle.dumps(fresh))):
        assert "engines=(none opened yet)" in repr(twin) and twin.encoder is not fresh.encoder
        assert twin.generate(**REQUEST).tolist() == expected
        assert twin.shared.weight.data_ptr() != fresh.shared.weight.data_ptr()


def test_changed_weights_change_the_result(fresh: Any) -> None:
    other = make_hugging_face("t5-v1.1", seed=77)
    before = fresh.generate(**REQUEST).tolist()
    fresh.load_state_dict(other.state_dict())
    after = fresh.generate(**REQUEST).tolist()
    assert after == other.generate(**REQUEST).tolist() != before


def test_resized_vocabulary(fresh: Any) -> None:
    fresh.generate(**REQUEST)
    fresh.resize_token_embeddings(250)
    assert fresh.architecture.vocab_size == 250
    assert fresh(**batch(), decoder_input_ids=torch.zeros(3, 1, dtype=torch.long)).logits.shape[-1] == 250


def test_from_config() -> None:
    config = T5Config(vocab_size=50, d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1, decoder_start_token_id=0)
    model = TRTT5ForConditionalGeneration(config)
    assert isinstance(model, T5ForConditionalGeneration)
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=3).shape[0] == 1


def test_from_model_refuses_other_weights() -> None:
    with pytest.raises(InputError, match=r"float64 on cpu.*expected float32, float16 or bfloat16 on cpu"):
        TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0").double())


def test_save_to_a_place_that_cannot_be(fresh: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises((OSError, AssertionError, CheckpointError)):
        fresh.save_pretrained(tmp_path / "file" / "below")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_prepacked_weights_and_threads() -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    packed = TRTT5ForConditionalGeneration.from_model(hugging_face, prepack_weights=True, num_threads=2)
    assert packed.session.num_threads == 2
    for beams in (1, 4):
        expected = hugging_face.generate(**REQUEST, num_beams=beams).tolist()
        assert packed.generate(**REQUEST, num_beams=beams).tolist() == expected


@pytest.mark.parametrize("spinning", [True, False])
def test_threads_spin_unless_the_setting_says_no(spinning: bool) -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    options = {} if spinning else {"thread_spinning": False}
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=2, **options)
    assert ours.generate(**REQUEST).tolist() == hugging_face.generate(**REQUEST).tolist()
    for graph in ours.session._sessions.values():
        chosen = graph.session.get_session_options()
        assert chosen.intra_op_num_threads == 2
        if spinning:
            with pytest.raises(RuntimeError, match="allow_spinning"):
                chosen.get_session_config_entry("session.intra_op.allow_spinning")
        else:
            assert chosen.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_several_rows_are_packed_when_they_come() -> None:
    """And a request of one row that began before goes on as it was."""
    hugging_face = make_hugging_face("t5-v1.1")
    fresh = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1, decode="engine")
    one, sources = torch.zeros(1, 1, dtype=torch.long), batch(1)
    first = fresh(**sources, decoder_input_ids=one)
    assert list(fresh.session._sessions) == [("encoder", False), ("decoder_step", False)]
    several = fresh.generate(**batch(), num_beams=2, max_new_tokens=6).tolist()
    assert several == hugging_face.generate(**batch(), num_beams=2, max_new_tokens=6).tolist()
    assert ("decoder_step", True) in fresh.session._sessions
    second = fresh(
        encoder_outputs=(first.encoder_last_hidden_state,),
        attention_mask=sources["attention_mask"],
        decoder_input_ids=one,
        **{CACHE: first[CACHE]},
    )
    with torch.no_grad():
        expected = hugging_face(**sources, decoder_input_ids=torch.zeros(1, 2, dtype=torch.long)).logits[:, -1:]
    torch.testing.assert_close(second.logits, expected, atol=1e-4, rtol=1e-4)
    assert fresh.session.loaded_graphs().count("decoder_step") == 1


def test_buffers_stay_where_they_are(fresh: Any) -> None:
    """Between two buckets the cache keeps its address and its binding: nothing of it is allocated per step."""
    out = fresh(**batch(), decoder_input_ids=torch.zeros(3, 1, dtype=torch.long))
    cache, hidden = out[CACHE], out.encoder_last_hidden_state
    mask = batch()["attention_mask"]
    seen = set()
    for _ in range(63):
        out = fresh(
            encoder_outputs=(hidden,),
            attention_mask=mask,
            decoder_input_ids=torch.ones(3, 1, dtype=torch.long),
            **{CACHE: cache},
        )
        seen.add((cache.state.kv.data_ptr(), cache.state.new.data_ptr(), id(cache.state.binding)))
    assert cache.state.length == cache.state.capacity == 64
    assert len(seen) <= 2  # the second mask object may renew the binding once


def test_seq2seq_trainer(tmp_path: Path) -> None:
    """`Seq2SeqTrainer.predict` with predict_with_generate: the loss and the tokens of the Hugging Face class."""
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

    class NoTokenizer:
        padding_side, pad_token_id = "right", 0

        def pad(self, features: Any, **_: Any) -> Any:
            width = max(len(f["input_ids"]) for f in features)
            rows = [f["input_ids"] + [0] * (width - len(f["input_ids"])) for f in features]
            mask = [[1] * len(f["input_ids"]) + [0] * (width - len(f["input_ids"])) for f in features]
            labels = torch.tensor([f["labels"] for f in features])
            return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask), "labels": labels}

    data = [{"input_ids": list(range(2, 6 + n)), "labels": [5, 6, 7, 1]} for n in range(5)]
    results = []
    hugging_face = make_hugging_face("t5-v1.1")
    for model in (hugging_face, TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)):
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), predict_with_generate=True, per_device_eval_batch_size=2, use_cpu=True,
            report_to=[], generation_max_length=9, disable_tqdm=True,
        )  # fmt: skip
        collate = NoTokenizer().pad
        results.append(Seq2SeqTrainer(model=model, args=arguments, data_collator=collate).predict(data))  # type: ignore[arg-type]
    assert DataCollatorForSeq2Seq is not None
    assert (results[0].predictions == results[1].predictions).all()
    assert results[0].metrics["test_loss"] == pytest.approx(results[1].metrics["test_loss"], abs=1e-4)


def test_repr_tells_how_the_model_runs(fresh: Any) -> None:
    assert "backend=onnxruntime, precision=fp32, decode=kernels, engines=(none opened yet)" in repr(fresh)
    fresh.generate(**batch(), max_new_tokens=2)
    assert "engines=(encoder (C code), decoder (C code)), weights=(the parameters' memory)" in repr(fresh)
