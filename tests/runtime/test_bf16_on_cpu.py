"""``precision="bf16"`` on a CPU: the C code's decoder multiplies by matrices rounded to bfloat16; all else is as in float32."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import BackendError, InputError, TRTT5EncoderModel, TRTT5ForConditionalGeneration
from t5_trt.graph.parameters import EMBEDDING, step_matrices
from t5_trt.kernels.cpu_decoder import CpuDecoder
from t5_trt.runtime import open_session as opening
from t5_trt.serving import Engine
from t5_trt.tools.verify import block_errors
from tests.adapters import MODES, QUIET, logits, lora, peft_pair, tokens
from tests.conftest import SHIPPED
from tests.serving_requests import PATIENCE_S, alone, source
from tests.tiny_models import KINDS, batch, make_hugging_face
from tests.tolerances import LOGITS_ATOL

pytestmark = QUIET
#: relative L2 of logits: a rounding of bfloat16 is 0.1 to 0.2%, and layers add up
LEAST_ERROR, MOST_ERROR = 1e-3, 0.03
WO = "decoder.block.0.layer.2.DenseReluDense.wo.weight"


def in_bf16(model: Any, **options: Any) -> Any:
    return TRTT5ForConditionalGeneration.from_model(
        copy.deepcopy(model), num_threads=1, precision="bf16", backend="onnxruntime", **options
    )


def rounded(hugging_face: Any, ours: Any) -> Any:
    """The Hugging Face model with the decoder's matrices rounded, in float32; embeddings keep their values."""
    model = copy.deepcopy(hugging_face)
    with torch.no_grad():
        for key in step_matrices(ours.architecture):
            matrix = model.get_parameter(key)
            if key == EMBEDDING:
                model.lm_head.weight = torch.nn.Parameter(matrix.bfloat16().float())
            else:
                matrix.copy_(matrix.bfloat16())
    return model


def decoder_of(ours: Any) -> CpuDecoder:
    decoder: CpuDecoder = ours.session._steps._decoder()
    return decoder


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_is_that_of_rounded_matrices(kind: str) -> None:
    hugging_face = make_hugging_face(kind)
    ours = in_bf16(hugging_face)
    reference = rounded(hugging_face, ours)
    found = logits(ours)
    assert torch.allclose(found, logits(reference), rtol=0, atol=LOGITS_ATOL)
    assert LEAST_ERROR < error(found, logits(hugging_face)) < MOST_ERROR
    for mode in MODES:
        assert tokens(ours, mode) == tokens(reference, mode)
    assert ours.session.precision == "bf16" and ours.session.loaded_graphs() == ("encoder (C code)", "decoder (C code)")
    with torch.no_grad():
        states = (model(**batch(), decoder_input_ids=batch()["input_ids"]) for model in (ours, hugging_face))
        mine, theirs = (output.encoder_last_hidden_state for output in states)
    assert torch.allclose(mine, theirs, rtol=0, atol=LOGITS_ATOL)


def test_step_for_the_best_token_has_no_rough_head() -> None:
    """It saves bytes of a head in float32."""
    for kind in ("t5-v1.0", "t5-v1.1"):
        hugging_face = make_hugging_face(kind)
        full = TRTT5ForConditionalGeneration.from_model(copy.deepcopy(hugging_face), num_threads=1)
        for ours, rough in ((full, True), (in_bf16(hugging_face), False)):
            tokens(ours)
            assert (decoder_of(ours)._rough is not None) == rough


def test_head_that_is_the_embedding_is_rounded_and_the_embedding_is_not() -> None:
    ours = in_bf16(make_hugging_face("t5-v1.0"))
    decoder, table = decoder_of(ours), ours.shared.weight
    assert decoder.weights.kept[EMBEDDING].data_ptr() == table.data_ptr()
    assert torch.equal(decoder.weights.rounded[EMBEDDING], table.bfloat16())
    memory = [matrix.untyped_storage().data_ptr() for matrix in decoder.weights.rounded.values()]
    assert len(memory) > 10 and len(set(memory)) == 1


@pytest.mark.parametrize("kind", ["t5-v1.0", "t5-v1.1"])
def test_parameters_in_bfloat16_are_read_in_place(kind: str) -> None:
    """They are exact, so that the results are those of the same values in float32."""
    half = make_hugging_face(kind).bfloat16()
    ours, wide = in_bf16(half), in_bf16(copy.deepcopy(half).float())
    assert torch.equal(logits(ours), logits(wide).bfloat16())
    assert tokens(ours) == tokens(wide) and tokens(ours, "beams") == tokens(wide, "beams")
    decoder = decoder_of(ours)
    assert decoder.weights.rounded.keys() == ({EMBEDDING} if kind == "t5-v1.0" else set())
    read = step_matrices(ours.architecture) - {EMBEDDING}
    assert all(decoder.weights.kept[key].data_ptr() == ours.get_parameter(key).data_ptr() for key in read)


def by_operation(model: Any) -> None:
    with torch.no_grad():
        model.get_parameter(WO).mul_(1.7)


def by_load_state_dict(model: Any) -> None:
    model.load_state_dict({key: tensor * 1.1 for key, tensor in model.state_dict().items()})


def by_assignment(model: Any) -> None:
    model.decoder.block[0].layer[2].DenseReluDense.wo.weight = torch.nn.Parameter(model.get_parameter(WO) * 1.7)


@pytest.mark.parametrize("change", [by_operation, by_load_state_dict, by_assignment])
def test_changed_weights_are_rounded_again(change: Any) -> None:
    ours = in_bf16(make_hugging_face("t5-v1.1"))
    before = logits(ours)
    change(ours)
    found = logits(ours)
    assert torch.equal(found, logits(in_bf16(ours))) and error(found, before) > MOST_ERROR


@pytest.mark.parametrize("kind", ["t5-v1.0", "t5-v1.1"])
def test_matrices_are_rounded_with_the_active_adapter_in_them(kind: str) -> None:
    parts = ["q", "v", "wo"] + ["lm_head"] * (kind == "t5-v1.1")
    configs = {"default": lora(target_modules=parts), "two": lora(target_modules=parts, lora_alpha=3)}
    hugging_face = make_hugging_face(kind)
    hugging_face.config.tie_word_embeddings = kind == "t5-v1.0"
    theirs, mine, ours = peft_pair(hugging_face, configs, precision="bf16")
    session, seen = None, {}
    for name in ("default", "two", "default", "two"):
        theirs.set_adapter(name), mine.set_adapter(name)
        found = [logits(mine), *(tokens(mine, mode) for mode in MODES)]
        assert LEAST_ERROR < error(found[0], logits(theirs)) < MOST_ERROR
        merged = in_bf16(copy.deepcopy(theirs).merge_and_unload())
        for key, matrix in decoder_of(merged).weights.rounded.items():  # sums in another order may round the other way
            assert torch.allclose(decoder_of(ours).weights.rounded[key], matrix, rtol=2**-7, atol=1e-6), key
        if name in seen:
            assert torch.equal(found[0], seen[name][0]) and found[1:] == seen[name][1:] and ours.session is session
        seen[name], session = found, ours.session
    assert error(seen["default"][0], seen["two"][0]) > MOST_ERROR


def test_copies_and_saved_models(tmp_path: Path) -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    hugging_face.config.tie_word_embeddings = False
    ours = in_bf16(hugging_face)
    expected = tokens(ours)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert "precision=bf16, decode=kernels" in repr(again) and tokens(again) == expected
    ours.save_pretrained(tmp_path)
    load = TRTT5ForConditionalGeneration.from_pretrained
    assert torch.equal(load(tmp_path).get_parameter(WO), hugging_face.get_parameter(WO))  # which were not rounded
    assert tokens(load(tmp_path, precision="bf16", num_threads=1)) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_checkpoint_in_half_precision(tmp_path: Path, dtype: Any) -> None:
    """Its parameters have the dtype that is asked for, and precision "auto" stays float32 on a CPU."""
    half = make_hugging_face("t5-v1.1").bfloat16()
    half.config.tie_word_embeddings = False
    half.save_pretrained(tmp_path)
    load = TRTT5ForConditionalGeneration.from_pretrained
    ours = load(tmp_path, precision="bf16", dtype=dtype, num_threads=1)
    assert ours.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    found, expected = logits(ours).float(), logits(in_bf16(half.float()))
    assert error(found, expected) < 0.005  # the results' own dtype
    assert load(tmp_path, dtype=dtype).session.precision == "fp32"


def test_rows_of_the_serving_engine_are_those_of_generate() -> None:
    ours = in_bf16(make_hugging_face("t5-v1.1"))
    settings = [{}, {"do_sample": True, "seed": 3, "top_k": 20}, {"repetition_penalty": 1.3}, {"num_beams": 2}]
    requests = [(source(seed, 3 + 7 * seed), {"max_new_tokens": 12, **each}) for seed, each in enumerate(settings)]
    with Engine(ours, max_rows=3) as engine:
        handles = [engine.submit(ids, **each) for ids, each in requests]
        for (ids, each), handle in zip(requests, handles, strict=True):
            assert torch.equal(handle.result(PATIENCE_S), alone(ours, ids, **each)), each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_of_layers_are_those_of_rounded_matrices(dtype: torch.dtype) -> None:
    pytest.importorskip("polygraphy")
    ours = in_bf16(make_hugging_face("t5-v1.1").to(dtype))
    rows = block_errors(ours, batch(), torch.tensor([[0, 5, 6]] * 3))
    errors = {each.name: each.relative_error for each in rows}
    if dtype == torch.float32:
        assert errors["encoder output"] < 1e-5
        assert all(LEAST_ERROR < errors[name] < MOST_ERROR for name in ("decoder.block.0", "logits"))
    else:  # Hugging Face's class computes in bfloat16, too
        assert max(errors.values()) < 0.1


def test_encoder_has_no_matrices_for_it() -> None:
    ours = TRTT5EncoderModel.from_pretrained(SHIPPED, precision="bf16", backend="onnxruntime")
    with pytest.raises(InputError, match=r"precision got 'bf16'; .*this model has no decoder\. Use 'fp32' or 'int8'"):
        ours(**batch())


def test_code_that_does_not_compile_is_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where ONNX Runtime has the precision, it decodes."""

    def refuse(store: Any) -> Any:
        raise BackendError("the C compiler cannot compile it")

    monkeypatch.setattr(opening, "load_library", refuse)
    hugging_face = make_hugging_face("t5-v1.1")
    with pytest.raises(BackendError, match="the C compiler cannot compile it"):
        tokens(in_bf16(hugging_face))
    assert (
        tokens(TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)) and "ONNX Runtime" in caplog.text
    )
