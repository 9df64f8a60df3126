"""Adapters on a GPU without TensorRT: the tokens of the Hugging Face class with peft, and switches in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")  # machines with a GPU may lack it, and the imports below need it

from t5_trt import TRTT5ForConditionalGeneration  # noqa: E402
from tests.adapters import CONFIGS, EVERYWHERE, QUIET, lora, peft_pair  # noqa: E402
from tests.tiny_models import batch, make_hugging_face, swollen  # noqa: E402

pytestmark = QUIET
TWO = {
    "default": lora(target_modules=EVERYWHERE, modules_to_save=["layer_norm", "final_layer_norm"]),
    "two": lora(use_dora=True),
}
MODES: tuple[dict[str, Any], ...] = ({}, {"num_beams": 4})


def on_gpu() -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in batch().items()}


def tokens(model: Any) -> list[Any]:
    return [model.generate(**on_gpu(), max_new_tokens=20, **mode).tolist() for mode in MODES]


@pytest.mark.parametrize("kind", ["t5-v1.0", "mt5", "umt5"])
@pytest.mark.parametrize("adapter", list(CONFIGS))
def test_every_kind_of_adapter_gives_equal_tokens(kind: str, adapter: str, store: Path) -> None:
    options = {"backend": "cuda", "precision": "fp32", "engine_cache_dir": store}
    theirs, mine, _ = peft_pair(make_hugging_face(kind), {"default": CONFIGS[adapter]}, **options)
    assert tokens(theirs.cuda()) == tokens(mine)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_switching_writes_where_captured_graphs_read(precision: str, store: Path) -> None:
    options = {"backend": "cuda", "precision": precision, "engine_cache_dir": store}
    theirs, mine, ours = peft_pair(make_hugging_face("t5-v1.1"), TWO, **options)
    theirs.cuda()
    seen: dict[str, Any] = {}
    for name in ("default", "two", "default", "two"):
        theirs.set_adapter(name), mine.set_adapter(name)
        found = tokens(mine)
        if precision == "fp32":
            assert found == tokens(theirs)
        assert seen.setdefault(name, found) == found
        if name == "two" and len(seen) == 2:
            session = ours.session
    assert ours.session is session and seen["default"] != seen["two"]


def test_an_adapter_that_needs_other_factors_stays_in_range(store: Path) -> None:
    base = TRTT5ForConditionalGeneration.from_model(
        swollen(make_hugging_face("t5-v1.1"), 30.0, 1e3), backend="cuda", precision="fp16", engine_cache_dir=store
    )
    mine = peft.get_peft_model(base, lora(target_modules=["wo"])).eval()
    with torch.no_grad():
        for name, parameter in mine.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 1e3)
        logits = mine(**on_gpu(), decoder_input_ids=torch.ones((3, 4), dtype=torch.int64, device="cuda")).logits
    assert bool(torch.isfinite(logits).all())
