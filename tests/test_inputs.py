"""Bad input is answered with an error that says what was got and what was expected, and the model stays usable."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from t5_trt import BackendError, InputError, T5TRTError, TRTT5ForConditionalGeneration
from t5_trt.compat import CACHE
from tests.tiny_models import VOCAB, batch, make_hugging_face

IDS = batch()["input_ids"]
ONE = torch.zeros(3, 1, dtype=torch.long)

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "empty batch": ({"input_ids": torch.zeros(0, 5, dtype=torch.long)}, r"shape \(0, 5\), which is empty"),
    "no tokens": ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"shape \(2, 0\), which is empty"),
    "id too large": ({"input_ids": IDS + VOCAB}, "ids from 0 to 210"),
    "id negative": ({"input_ids": IDS - 500}, "got the id -"),
    "float ids": ({"input_ids": IDS.float()}, "float32; expected integer token ids"),
    "list of ids": ({"input_ids": [[1, 2]]}, "got list; expected a torch.Tensor"),
    "flat ids": ({"input_ids": IDS[0]}, r"shape \(11,\); expected \[batch, tokens\]"),
    "mask of another shape": ({"input_ids": IDS, "attention_mask": torch.ones(3, 4)}, r"shape \(3, 4\); expected \[3, 11\]"),
    "mask of another batch": ({"input_ids": IDS, "attention_mask": torch.ones(2, 11)}, r"expected \[3, 11\]"),
    "mask that is a list": ({"input_ids": IDS, "attention_mask": [1]}, "attention_mask got list"),
    "nothing": ({}, "neither of input_ids and inputs_embeds"),
    "both inputs": ({"input_ids": IDS, "inputs_embeds": torch.ones(3, 11, 64)}, "both of input_ids"),
    "embeds of another size": ({"inputs_embeds": torch.ones(3, 11, 63)}, r"\(3, 11, 63\); expected \[batch, tokens, 64\]"),
    "integer embeds": ({"inputs_embeds": torch.ones(3, 11, 64).long()}, "expected a floating-point tensor"),
    "no decoder input": ({"input_ids": IDS, "decoder_input_ids": None}, "neither decoder_input_ids nor labels"),
    "decoder id too large": ({"input_ids": IDS, "decoder_input_ids": ONE + VOCAB}, "decoder_input_ids got the id 211"),
    "decoder float": ({"input_ids": IDS, "decoder_input_ids": ONE.float()}, "decoder_input_ids got dtype torch.float32"),
    "decoder rows": ({"input_ids": IDS, "decoder_input_ids": torch.zeros(2, 1).long()}, "has 2 rows and the encoder's output 3"),
    "decoder mask": ({"input_ids": IDS, "decoder_attention_mask": torch.ones(2, 7)}, r"decoder_attention_mask got shape \(2,"),
    "labels float": ({"input_ids": IDS, "labels": torch.ones(3, 2), "decoder_input_ids": None}, "labels got torch.float32"),
    "label too large": ({"input_ids": IDS, "labels": ONE + VOCAB, "decoder_input_ids": None}, "labels got the id 211"),
    "labels of another shape": ({"input_ids": IDS, "labels": torch.zeros(3, 2).long()}, r"labels got shape \(3, 2\)"),
    "labels in a list": ({"input_ids": IDS, "labels": [[5], [6], [7]]}, "labels got list; expected int64"),
    "states of another size": ({"encoder_outputs": (torch.ones(3, 5, 8),)}, r"\(3, 5, 8\); expected \[batch, tokens, 64\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_bad_forward(v11: tuple[Any, Any], name: str) -> None:
    _, ours = v11
    arguments, message = CASES[name]
    with pytest.raises(InputError, match=message) as caught:
        ours(**{"decoder_input_ids": ONE, **arguments})
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, T5TRTError)
    assert ours(input_ids=IDS, decoder_input_ids=ONE).logits.isfinite().all()


def test_bad_generate(v11: tuple[Any, Any]) -> None:
    _, ours = v11
    for ids, message in ((IDS + VOCAB, "ids from 0 to"), (torch.zeros(0, 4, dtype=torch.long), "empty")):
        with pytest.raises(InputError, match=message):
            ours.generate(ids, max_new_tokens=3)
    with pytest.raises(ValueError, match="not_an_argument"):
        ours.generate(IDS, not_an_argument=3)


def test_cache_of_other_rows(v11: tuple[Any, Any]) -> None:
    _, ours = v11
    out = ours(input_ids=IDS, decoder_input_ids=ONE)
    with pytest.raises(InputError, match="has 2 rows; the cache was made for 3"):
        ours(
            encoder_outputs=(out.encoder_last_hidden_state,),
            decoder_input_ids=ONE[:2],
            **{CACHE: out[CACHE]},
        )


def test_configured_lengths() -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    short = TRTT5ForConditionalGeneration.from_model(hugging_face, max_source_tokens=8, max_target_tokens=5)
    with pytest.raises(InputError, match="got 11 source tokens; expected at most 8"):
        short.generate(IDS)
    with pytest.raises(InputError, match="got 6 target tokens; expected at most 5"):
        short.generate(IDS[:, :8], max_new_tokens=9, min_new_tokens=9)
    assert short.generate(IDS[:, :8], max_new_tokens=5).shape[1] <= 6


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"backend": "tpu"},
            InputError,
            "backend got 'tpu'; expected one of 'auto', 'tensorrt', 'cuda', 'onnxruntime'",
        ),
        ({"precision": "fp8"}, InputError, "precision got 'fp8'"),
        ({"precision": "fp16"}, InputError, "computes in 'fp32', 'bf16', 'int8' or 'int4' on the CPU"),
        (
            {"precision": "tf32"},
            InputError,
            r"got 'tf32'; .*computes in 'fp32', 'bf16', 'int8' or 'int4' on the CPU\. Use one of",
        ),
        ({"num_threads": 0}, InputError, "num_threads got 0"),
        ({"num_threads": True}, InputError, "num_threads got True"),
        ({"max_source_tokens": "9"}, InputError, "max_source_tokens got '9'"),
        ({"device": "cuda:0"}, InputError, "runs on the CPU"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0"), **{"backend": "onnxruntime", **options})


def test_environment_variable(monkeypatch: pytest.MonkeyPatch, shipped_folder: Any) -> None:
    monkeypatch.setenv("T5_TRT_BACKEND", "nonsense")
    with pytest.raises(InputError, match="environment variable T5_TRT_BACKEND got 'nonsense'"):
        TRTT5ForConditionalGeneration.from_pretrained(shipped_folder)
    model = TRTT5ForConditionalGeneration.from_pretrained(shipped_folder, backend="onnxruntime")
    assert model.runtime_config.backend == "onnxruntime"


def test_onnxruntime_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match="pip install onnxruntime"):
        TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0"), backend="onnxruntime")


def test_failing_run_is_reported_and_survived() -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    fresh = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1, decode="engine")
    expected = fresh.generate(IDS, max_new_tokens=4).tolist()
    graph = fresh.session._session("decoder_step", several_rows=True)

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(graph.session, name)

        def run_with_iobinding(self, binding: Any) -> None:
            raise RuntimeError("out of memory")

    fresh.session._sessions["decoder_step", True] = replace(graph, session=Broken())
    with pytest.raises(BackendError, match="out of memory"):
        fresh.generate(IDS, max_new_tokens=4)
    fresh.session._sessions["decoder_step", True] = graph
    assert fresh.generate(IDS, max_new_tokens=4).tolist() == expected


def test_decoder_without_memory_is_reported_and_survived(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fresh.generate(IDS, max_new_tokens=4).tolist()
    team = fresh.session._steps._made._team
    library = team.library

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(library, name)

        def t5_decode(self, decoder: Any, step: Any) -> int:
            return 0

    with monkeypatch.context() as patch:
        patch.setattr(team, "library", Full())
        with pytest.raises(BackendError, match="memory ran out in the decoder on the CPU"):
            fresh.generate(IDS, max_new_tokens=4)
    assert fresh.generate(IDS, max_new_tokens=4).tolist() == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"decoder_attention_mask": torch.ones(3)}, "decoder_attention_mask"),
        ({"decoder_attention_mask": torch.tensor(1)}, "decoder_attention_mask"),
        ({"decoder_attention_mask": torch.ones(3, 1, 2)}, "decoder_attention_mask"),
        ({"decoder_attention_mask": torch.zeros(3, 1, 3, 2)}, "decoder_attention_mask"),
        ({"attention_mask": torch.zeros(3, 5, 1, 4)}, "attention_mask"),
        ({"decoder_input_ids": torch.ones(2, 2, dtype=torch.long)}, "decoder_input_ids"),
    ],
)
def test_the_hugging_face_model_gets_what_it_can_broadcast(pair: tuple[Any, Any], changes: Any, named: str) -> None:
    """Beside a mask of four axes, which the Hugging Face model serves; these used to end in errors of torch."""
    _, ours = pair
    right = {
        "input_ids": torch.ones(3, 4, dtype=torch.long),
        "decoder_input_ids": torch.ones(3, 2, dtype=torch.long),
        "attention_mask": torch.zeros(1, 1, 1, 4),
    }
    assert ours(**right).logits.isfinite().all()
    with pytest.raises(InputError, match=f"^{named}"):
        ours(**{**right, **changes})
