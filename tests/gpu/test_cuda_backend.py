"""The backend "cuda" against Hugging Face's model on the same GPU. No TensorRT is needed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.cases import cuda_model, on_gpu
from tests.tiny_models import KINDS, VOCAB, batch, make_hugging_face, swollen

ARGUMENTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 4},
    {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True},
    {"do_sample": True, "temperature": 0.8, "top_k": 20},
    {"do_sample": True, "num_beams": 2},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    {"return_dict_in_generate": True, "output_scores": True},
)


def inputs_on_gpu(rows: int = 3, tokens: int = 11) -> dict[str, torch.Tensor]:
    return on_gpu(batch(rows, tokens))


def tokens_of(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result.sequences  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_hugging_face_in_float32(kind: str, store: Path) -> None:
    hugging_face, ours = make_hugging_face(kind).cuda(), cuda_model(make_hugging_face(kind), store)
    for rows in (1, 3):
        for arguments in (*ARGUMENTS, {"decoder_input_ids": torch.tensor([[0, 5, 9]] * rows).cuda()}):
            torch.manual_seed(3)
            expected = hugging_face.generate(**inputs_on_gpu(rows), max_new_tokens=20, **arguments)
            torch.manual_seed(3)
            got = ours.generate(**inputs_on_gpu(rows), max_new_tokens=20, **arguments)
            assert torch.equal(tokens_of(got), tokens_of(expected)), arguments
            assert ours.last_generation_path.loop == "device"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_forward_equals_hugging_face(kind: str, store: Path) -> None:
    hugging_face, ours = make_hugging_face(kind).cuda(), cuda_model(make_hugging_face(kind), store)
    inputs = inputs_on_gpu() | {"decoder_input_ids": torch.randint(2, VOCAB, (3, 9)).cuda()}
    expected, got = hugging_face(**inputs).logits, ours(**inputs).logits
    assert float((got - expected).norm() / expected.norm()) < 1e-4


def test_long_output_grows_its_cache(store: Path) -> None:
    hugging_face, ours = make_hugging_face("t5-v1.0").cuda(), cuda_model(make_hugging_face("t5-v1.0"), store)
    options = {"max_new_tokens": 300, "min_new_tokens": 300}
    assert torch.equal(
        ours.generate(**inputs_on_gpu(2), **options), hugging_face.generate(**inputs_on_gpu(2), **options)
    )


def test_all_is_captured_and_sizes_need_no_build(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = cuda_model(
        make_hugging_face("t5-v1.1"), tmp_path
    )  # a store of its own: other files of tests fill the shared one
    with caplog.at_level(logging.WARNING, "t5_trt"):
        for rows in range(1, 12):
            for arguments in ({}, {"num_beams": 2}):
                ours.generate(**inputs_on_gpu(rows, 5 + 3 * rows), max_new_tokens=4, **arguments)
    assert "captured" not in caplog.text
    assert {stored.manifest["kernels"] for stored in _entries(tmp_path)} == {"decode_step.cu"}


def test_half_precision_of_an_overflowing_checkpoint(store: Path) -> None:
    hugging_face = swollen(make_hugging_face("t5-v1.1"), 30.0, 1e3)
    ours = cuda_model(hugging_face, store, "fp16")
    with torch.no_grad():
        inputs = batch(3) | {"decoder_input_ids": torch.randint(2, VOCAB, (3, 9))}
        expected, got = (
            hugging_face(**inputs).logits,
            ours(**{name: tensor.cuda() for name, tensor in inputs.items()}).logits.cpu(),
        )
    assert got.isfinite().all() and float((got - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_gives_equal_bits_in_every_run(precision: str, store: Path) -> None:
    ours = cuda_model(make_hugging_face("t5-v1.1"), store, precision)
    results = [ours.generate(**inputs_on_gpu(), max_new_tokens=20, num_beams=3) for _ in range(3)]
    assert all(torch.equal(result, results[0]) for result in results)


def _entries(store: Path) -> Any:
    from t5_trt.engine.store import EngineStore

    return [entry for entry in EngineStore(store).entries() if "kernels" in entry.manifest]


def test_graphs_survive_a_capture_of_torch_compile(store: Path) -> None:
    """It frees the workspaces of cuBLAS in all streams."""
    ours, inputs = cuda_model(make_hugging_face("t5-v1.0"), store, "fp16"), inputs_on_gpu()
    expected = [ours.generate(**inputs, max_new_tokens=20) for _ in range(3)]  # captured at the second use
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    taken = [torch.full((2**20,), 7, device="cuda") for _ in range(64)]
    for _ in range(3):
        assert torch.equal(ours.generate(**inputs, max_new_tokens=20), expected[0])
    torch.cuda.synchronize()
    assert all(bool((each == 7).all()) for each in taken)
