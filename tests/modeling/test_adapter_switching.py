"""Switching between adapters, and other changes of them, are followed by the open engines."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.runtime import onnxruntime_session
from t5_trt.serving import Engine
from tests.adapters import BATCH, LABELS, QUIET, compare, logits, lora, peft_pair, tokens
from tests.tiny_models import make_hugging_face, swollen
from tests.tolerances import LOGITS_ATOL

pytestmark = QUIET
TWO = {"default": lora(), "two": lora(lora_alpha=3)}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of graphs that were given to ONNX Runtime."""
    found: list[str] = []
    load = onnxruntime_session.OrtSession._load

    def noted(self: Any, graph: str, *args: Any, **options: Any) -> Any:
        found.append(graph)
        return load(self, graph, *args, **options)

    monkeypatch.setattr(onnxruntime_session.OrtSession, "_load", noted)
    return found


@pytest.mark.parametrize("kind", ["t5-v1.0", "mt5"])
def test_switching_back_gives_the_first_bits_again_without_a_new_graph(kind: str, loads: list[str]) -> None:
    configs = {
        "default": lora(target_modules=["q", "wo", "lm_head"]),
        "two": lora(target_modules=["q", "lm_head"], use_dora=True),
    }
    theirs, mine, ours = peft_pair(make_hugging_face(kind), configs)
    seen: dict[str, Any] = {}
    session, loaded = None, 0
    for name in ("default", "two", "default", "two"):
        for model in (theirs, mine):
            model.set_adapter(name)
        found = [logits(mine), *(tokens(mine, mode) for mode in ("greedy", "beams", "sampling"))]
        assert torch.allclose(found[0], logits(theirs), rtol=0, atol=LOGITS_ATOL)
        assert found[2] == tokens(theirs, "beams")
        if name in seen:
            assert torch.equal(found[0], seen[name][0]) and found[1:] == seen[name][1:]
            assert ours.session is session and len(loads) == loaded
        seen[name], session, loaded = found, ours.session, len(loads)
    assert seen["default"][1] != seen["two"][1]


def test_without_its_adapters_a_model_writes_what_it_wrote_before() -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    theirs, mine, ours = peft_pair(hugging_face, TWO)
    compare(theirs, mine)
    with theirs.disable_adapter(), mine.disable_adapter():
        compare(theirs, mine)
        assert tokens(mine) == tokens(hugging_face)
    compare(theirs, mine)
    session = ours.session
    for model in (theirs, mine):
        model.add_weighted_adapter(["default", "two"], [0.5, 0.7], "mix", combination_type="linear")
        model.set_adapter("mix")
    compare(theirs, mine)
    for model in (theirs, mine):
        model.delete_adapter("mix")
        model.base_model.set_adapter(["default", "two"])
    compare(theirs, mine)
    assert ours.session is session


def test_memory_is_taken_for_adapted_matrices_only() -> None:
    _, mine, ours = peft_pair(make_hugging_face("t5-v1.1"), TWO)
    tokens(mine), tokens(mine, "beams")
    own = {parameter.data_ptr() for parameter in mine.parameters()}
    read = ours.session._weights
    apart = {key: tensor for key, tensor in read.items() if tensor.data_ptr() not in own}
    attentions = [2, 2 * 2]  # of encoder and decoder
    assert len(apart) == 2 * sum(attentions) and all(key.endswith((".q.weight", ".v.weight")) for key in apart)
    places = {key: tensor.data_ptr() for key, tensor in apart.items()}
    mine.set_adapter("two")
    tokens(mine)
    assert {key: ours.session._weights[key].data_ptr() for key in places} == places  # the same memory again


@pytest.mark.parametrize(
    "optimizer", [{"cls": torch.optim.SGD}, {"cls": torch.optim.AdamW, "fused": True}], ids=["sgd", "fused"]
)
def test_changes_of_adapters_are_followed(optimizer: dict[str, Any]) -> None:
    theirs, mine, ours = peft_pair(make_hugging_face("t5-v1.0"), TWO)
    compare(theirs, mine)
    session = ours.session
    options = dict(optimizer)
    kind = options.pop("cls")
    for model in (theirs, mine):  # trained
        steps = kind([p for p in model.parameters() if p.requires_grad], lr=0.05, **options)
        model(**BATCH, labels=LABELS).loss.backward()
        steps.step()
    compare(theirs, mine)
    for model in (theirs, mine):  # loaded
        state = {key: 0.5 * value for key, value in model.state_dict().items() if "lora_B" in key}
        model.load_state_dict(state, strict=False)
    compare(theirs, mine)
    for model in (theirs, mine):  # scaled
        for layer in model.modules():
            if hasattr(layer, "scale_layer"):
                layer.scale_layer(0.3)
    compare(theirs, mine)
    assert ours.session is session


def test_engines_that_were_opened_in_inference_mode_follow_outside_of_it() -> None:
    theirs, mine, ours = peft_pair(make_hugging_face("t5-v1.0"), TWO)
    with torch.inference_mode():
        tokens(mine)
    session = ours.session
    theirs.set_adapter("two"), mine.set_adapter("two")
    compare(theirs, mine)
    with torch.inference_mode():
        theirs.set_adapter("default"), mine.set_adapter("default")
        assert tokens(theirs) == tokens(mine)
    assert ours.session is session


def test_merged_adapters_are_followed() -> None:
    theirs, mine, _ = peft_pair(make_hugging_face("t5-v1.0"), TWO)
    both = (theirs, mine)
    compare(theirs, mine)
    for model in both:
        model.merge_adapter()
    compare(theirs, mine)
    for model in both:
        model.set_adapter("two")  # what is merged stays
    compare(theirs, mine)
    with theirs.disable_adapter(), mine.disable_adapter():  # unmerges
        compare(theirs, mine)
    compare(theirs, mine)
    for model in both:
        model.merge_adapter()
        model.unmerge_adapter()
    compare(theirs, mine)
    alone = [model.merge_and_unload() for model in both]
    compare(*alone)
    assert type(alone[1]).__name__ == "TRTT5" and not hasattr(alone[1].lm_head, "base_layer")


def test_adapters_of_other_layers_can_come_later() -> None:
    theirs, mine, _ = peft_pair(make_hugging_face("t5-v1.0"), {"default": lora()})
    compare(theirs, mine)
    for model in (theirs, mine):
        torch.manual_seed(5)
        model.add_adapter("two", lora(target_modules=["wo", "lm_head"], init_lora_weights=False))
        model.set_adapter("two")
    compare(theirs, mine)
    for model in (theirs, mine):
        model.set_adapter("default")
    compare(theirs, mine)


def test_encoder_output_of_another_adapter_gets_the_keys_of_the_active_one() -> None:
    theirs, mine, _ = peft_pair(make_hugging_face("t5-v1.0"), TWO)
    with torch.no_grad():
        kept = [model.get_encoder()(**BATCH) for model in (theirs, mine)]
        for model in (theirs, mine):
            model.set_adapter("two")
        results = [
            model(encoder_outputs=states, attention_mask=BATCH["attention_mask"], decoder_input_ids=LABELS).logits
            for model, states in zip((theirs, mine), kept, strict=True)
        ]
    assert torch.allclose(*results, rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["t5-v1.0", "t5-v1.1"])
def test_matrices_are_rounded_with_the_active_adapter_in_them(kind: str, precision: str, tmp_path: Path) -> None:
    options = {"precision": precision, "engine_cache_dir": tmp_path}
    hugging_face = make_hugging_face(kind)
    theirs, mine, ours = peft_pair(hugging_face, TWO, **options)
    for name in ("two", "default"):
        theirs.set_adapter(name), mine.set_adapter(name)
        merged = copy.deepcopy(theirs).merge_and_unload()
        expected = TRTT5ForConditionalGeneration.from_model(merged, num_threads=1, **options)
        tokens(expected), tokens(mine)
        for matrix, wanted in expected.session._quantized.items():
            if matrix.endswith(".int8") and matrix in ours.session._quantized:
                found = ours.session._quantized[matrix]
                assert (found.int() - wanted.int()).abs().max() <= 1  # sums in another order
        if precision == "int4":  # layers that change are in 8 bits
            block = "decoder.block.0.layer"
            stored = {
                f"{block}.0.SelfAttention.qkv.int8",
                f"{block}.0.SelfAttention.o.int4",
                f"{block}.1.EncDecAttention.q.int8",
            }
            assert (
                stored < ours.session._quantized.keys()
                and f"{block}.0.SelfAttention.qkv.int4" not in ours.session._quantized
            )
        found, wanted = logits(mine), logits(expected)
        assert (found - wanted).norm() < (0.02 if precision == "int8" else 0.5) * wanted.norm()


def test_fp16_factors_go_by_the_active_adapter() -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    theirs, mine, ours = peft_pair(
        swollen(hugging_face, 30.0, 10.0), {"default": lora(target_modules=["wo"]), "two": lora(target_modules=["wo"])}
    )
    for model in (theirs, mine):
        for name, parameter in model.named_parameters():
            if "lora_B.two" in name:
                parameter.data.mul_(1e5)
    found = []
    for name in ("default", "two"):
        theirs.set_adapter(name), mine.set_adapter(name)
        merged = TRTT5ForConditionalGeneration.from_model(copy.deepcopy(theirs).merge_and_unload())
        found.append(ours.fp16_scaling("fp16"))
        assert found[-1] == merged.fp16_scaling("fp16")
    assert found[0] != found[1]


def test_a_serving_engine_runs_the_active_adapter() -> None:
    theirs, mine, ours = peft_pair(make_hugging_face("t5-v1.0"), TWO)
    for name in ("two", "default"):
        theirs.set_adapter(name), mine.set_adapter(name)
        with Engine(ours, max_rows=4) as engine:
            handles = [engine.submit(BATCH["input_ids"][:1], max_new_tokens=12) for _ in range(3)]
            wanted = theirs.generate(input_ids=BATCH["input_ids"][:1], max_new_tokens=12)[0].tolist()
            assert [handle.result()[0].tolist() for handle in handles] == [wanted] * 3
