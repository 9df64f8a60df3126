"""TensorRT on a real GPU: tokens of the Hugging Face class, engines from the store, buffers that grow, failures that end well."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import BackendError, BuildConfig, StrictModeError, TRTT5ForConditionalGeneration
from t5_trt.compat import CACHE
from t5_trt.engine.store import EngineStore
from t5_trt.runtime.kernel_decoder import KernelDecoder
from t5_trt.runtime.step_buffers import Slot
from t5_trt.tools.verify import block_errors, verify
from tests.conftest import ROOT, SHIPPED
from tests.gpu.cases import LOGITS_ATOL, OVERFLOWING, on_gpu
from tests.tiny_models import KINDS, batch, large_logits, make_hugging_face, swollen


def test_runs_on_the_gpu(gpu_pair: Any) -> None:
    _, ours = gpu_pair("t5-v1.0")
    assert ours.device.type == "cuda" and ours.session.backend == "tensorrt"
    assert f"decode={ours.session.steps_by}" in repr(ours) and ours.session.steps_by == ours.runtime_config.decode


def test_kernels_are_what_auto_takes(store: Path) -> None:
    ours = TRTT5ForConditionalGeneration.from_model(
        make_hugging_face("t5-v1.0"), backend="tensorrt", precision="fp32", engine_cache_dir=store
    )
    assert ours.session.steps_by == "kernels"


def test_kernels_and_engine_give_equal_tokens(tmp_path: Path) -> None:
    """And where kernels decode, no engine of the decoder is built or loaded, whatever the request is."""
    requests: dict[str, dict[str, Any]] = {
        "greedy": {},
        "beams": {"num_beams": 4, "num_return_sequences": 2},
        "long": {"max_new_tokens": 150, "min_new_tokens": 150},
        "prompt": {"decoder_input_ids": torch.tensor([[0, 5, 6, 7]] * 3).cuda()},
        "prompt, beams": {"decoder_input_ids": torch.tensor([[0, 5, 6, 7]] * 3).cuda(), "num_beams": 4},
        "assisted": {"prompt_lookup_num_tokens": 3},
        "no cache": {"use_cache": False},
    }
    found: dict[str, Any] = {}
    for decode in ("kernels", "engine"):
        options: dict[str, Any] = {"backend": "tensorrt", "precision": "fp32", "decode": decode}
        ours = TRTT5ForConditionalGeneration.from_model(
            make_hugging_face("t5-v1.1"), **options, engine_cache_dir=tmp_path / decode
        )
        for name, arguments in requests.items():
            inputs = on_gpu(batch(1 if name == "assisted" else 3))
            tokens = ours.generate(**{**inputs, "max_new_tokens": 20, **arguments}).tolist()
            assert found.setdefault(name, tokens) == tokens, (decode, name)
        assert ours.session.steps_by == decode
        graphs = {entry.manifest.get("graph") for entry in EngineStore(tmp_path / decode).entries()}
        assert ("decoder_step" in graphs) == ("decoder_step" in ours.session.engines.graphs()) == (decode == "engine")
        assert "encoder" in graphs and ("decoder_queries" in graphs) == (decode == "engine")


def test_keys_and_values_go_from_kernels_to_an_engine_and_back(store: Path) -> None:
    """In half precision, of a checkpoint that needs factors: an engine decodes what has hidden tokens."""
    hugging_face = swollen(make_hugging_face("t5-v1.1"), 30.0, 1e3)
    options: dict[str, Any] = {"backend": "tensorrt", "precision": "fp16", "decode": "kernels"}
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, **options, engine_cache_dir=store)
    ids, cache, got = torch.randint(2, 200, (3, 8)), None, []
    with torch.no_grad():
        expected = hugging_face(**batch(), decoder_input_ids=ids).logits
        for start, end in ((0, 1), (1, 2), (2, 4), (4, 5), (5, 8)):
            if start == 2:  # as where tokens are hidden
                shown = torch.ones((3, end), dtype=torch.long).cuda()
                got.append(ours.session.decode(cache.state, ids[:, start:end].cuda(), shown).cpu())
                continue
            out = ours(**on_gpu(batch()), decoder_input_ids=ids[:, start:end].cuda(), **{CACHE: cache})
            cache = out[CACHE]
            got.append(out.logits.cpu())
    logits = torch.cat(got, 1)
    assert logits.isfinite().all() and (logits - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("kind", list(KINDS))
def test_greedy_equals_hugging_face(gpu_pair: Any, kind: str) -> None:
    hugging_face, ours = gpu_pair(kind)
    inputs = on_gpu(batch())
    expected = hugging_face.generate(**inputs, max_new_tokens=40, min_new_tokens=40)
    assert ours.generate(**inputs, max_new_tokens=40, min_new_tokens=40).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": -1.0},
        {"do_sample": True, "num_return_sequences": 2},
        {"decoder_input_ids": torch.tensor([[0, 5, 6, 7]] * 3)},
        {"max_new_tokens": 150, "min_new_tokens": 150},
    ],
    ids=["beams", "beams, several", "sampling", "prompt", "two buckets"],
)
def test_requests_equal_hugging_face(gpu_pair: Any, arguments: dict[str, Any]) -> None:
    hugging_face, ours = gpu_pair("t5-v1.1")
    request = {**on_gpu(batch()), "max_new_tokens": 12, **arguments}
    if "decoder_input_ids" in request:
        request["decoder_input_ids"] = request["decoder_input_ids"].cuda()
    results = []
    for model in (hugging_face, ours):
        torch.manual_seed(3)
        results.append(model.generate(**request).tolist())
    assert results[0] == results[1]


def test_logits_and_masks(gpu_pair: Any) -> None:
    hugging_face, ours = gpu_pair("t5-v1.1")
    ids = torch.randint(2, 200, (3, 9), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with torch.no_grad():
        expected = hugging_face(**on_gpu(batch()), decoder_input_ids=ids, decoder_attention_mask=mask).logits
    got = ours(**on_gpu(batch()), decoder_input_ids=ids, decoder_attention_mask=mask).logits
    assert got.is_cuda
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=LOGITS_ATOL, rtol=1e-4)


def test_inputs_on_the_cpu_are_taken(gpu_pair: Any) -> None:
    hugging_face, ours = gpu_pair("t5-v1.1")
    expected = hugging_face.generate(**on_gpu(batch()), max_new_tokens=6)
    assert ours.generate(**batch(), max_new_tokens=6).tolist() == expected.cpu().tolist()


def test_fp16_logits(gpu_pair: Any) -> None:
    hugging_face, ours = gpu_pair("t5-v1.1", "fp16")
    assert ours.dtype == torch.float16
    ids = torch.randint(2, 200, (3, 5), device="cuda")
    with torch.no_grad():
        expected = hugging_face(**on_gpu(batch()), decoder_input_ids=ids).logits
    got = ours(**on_gpu(batch()), decoder_input_ids=ids).logits
    error = (got - expected).norm() / expected.norm()
    assert got.dtype == torch.float32 and error < 0.02


@pytest.mark.parametrize("enlarge", OVERFLOWING.values(), ids=OVERFLOWING)
def test_fp16_of_overflowing_checkpoints(store: Path, enlarge: Any) -> None:
    hugging_face = enlarge(make_hugging_face("t5-v1.1"))
    ours = TRTT5ForConditionalGeneration.from_model(
        hugging_face, backend="tensorrt", precision="fp16", engine_cache_dir=store
    )
    ids = torch.randint(2, 200, (3, 5))
    with torch.no_grad():
        expected = hugging_face(**batch(), decoder_input_ids=ids).logits
    got = ours(**batch(), decoder_input_ids=ids).logits
    assert got.isfinite().all() and (got.cpu() - expected).norm() / expected.norm() < 0.02


def test_fp16_of_given_embeddings_out_of_range(store: Path) -> None:
    hugging_face = large_logits(make_hugging_face("t5-v1.1"), 2.0**18)
    ours = TRTT5ForConditionalGeneration.from_model(
        hugging_face, backend="tensorrt", precision="fp16", engine_cache_dir=store
    )
    inputs = batch(padding="none")
    with torch.no_grad():
        embeds = hugging_face.shared(inputs.pop("input_ids"))
        expected = hugging_face.encoder(inputs_embeds=embeds, **inputs).last_hidden_state
    got = ours.encoder(inputs_embeds=embeds, **inputs).last_hidden_state.float().cpu()
    assert not embeds.half().isfinite().all() and (got - expected).norm() / expected.norm() < 0.02


def test_two_models_in_two_threads(store: Path) -> None:
    """Both capture their steps while the other one runs."""
    kinds = ("t5-v1.0", "t5-v1.1")
    requests: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"max_new_tokens": 150, "min_new_tokens": 150}]
    fixed = {**on_gpu(batch()), "max_new_tokens": 12}
    hugging_face_models = [make_hugging_face(kind) for kind in kinds]  # not in the threads: they share torch's seed
    expected = [
        [make_hugging_face(kind).cuda().generate(**{**fixed, **more}).tolist() for more in requests] for kind in kinds
    ]

    def run(hugging_face: Any) -> list[Any]:
        ours = TRTT5ForConditionalGeneration.from_model(
            hugging_face, backend="tensorrt", precision="fp32", engine_cache_dir=store
        )
        return [[ours.generate(**{**fixed, **more}).tolist() for more in requests] for _ in range(3)]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, hugging_face_models)) == [[rows] * 3 for rows in expected]


def test_step_buffers_are_reused(gpu_pair: Any) -> None:
    """Two requests of one shape share buffers one after the other, and get their own when they overlap."""
    _, ours = gpu_pair("t5-v1.1")
    one = torch.zeros(3, 1, dtype=torch.long, device="cuda")
    inputs = on_gpu(batch())
    first = ours(**inputs, decoder_input_ids=one)
    address = first[CACHE].state.kv.data_ptr()
    second = ours(**inputs, decoder_input_ids=one)
    assert second[CACHE].state.kv.data_ptr() != address
    expected = first.logits.clone()
    del first
    third = ours(**inputs, decoder_input_ids=one)
    assert third[CACHE].state.kv.data_ptr() == address
    assert torch.equal(third.logits, expected) and torch.equal(second.logits, expected)


def test_deleted_model_is_freed_at_once(store: Path, decode: str) -> None:
    options: dict[str, Any] = {"backend": "tensorrt", "precision": "fp32", "decode": decode}
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1"), **options, engine_cache_dir=store)
    for beams in (1, 4):
        ours.generate(**on_gpu(batch()), max_new_tokens=5, num_beams=beams)
    gone = [weakref.ref(kept) for kept in (ours, ours.session, ours.session.engines.weights)]
    gc.collect()
    gc.disable()
    try:
        del ours
        assert [kept() for kept in gone] == [None] * 3
    finally:
        gc.enable()


def test_reference_runs_on_the_gpu(gpu_pair: Any) -> None:
    _, ours = gpu_pair("t5-v1.1")
    with torch.no_grad():
        out = ours(
            **on_gpu(batch()), decoder_input_ids=torch.zeros(3, 2, dtype=torch.long).cuda(), output_attentions=True
        )
    assert out.cross_attentions[0].is_cuda and next(ours.parameters()).device.type == "cpu"


def test_second_process_loads_from_the_store(tmp_path: Path) -> None:
    code = (
        "import json, sys, logging, time\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "from tests.tiny_models import make_hugging_face, batch\n"
        "from t5_trt import TRTT5ForConditionalGeneration as T\n"
        f"m = T.from_model(make_hugging_face('t5-v1.1'), backend='tensorrt', precision='fp32', engine_cache_dir={str(tmp_path / 'store')!r})\n"
        "s = time.time(); m.generate(**batch(), max_new_tokens=5)\n"
        "print(json.dumps(time.time() - s))\n"
    )
    logs = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ.copy()
        )
        assert run.returncode == 0, run.stderr
        logs.append(run.stderr)
        assert json.loads(run.stdout) > 0
    assert "building the engine" in logs[0] and "building the engine" not in logs[1]


def _generate_in_child(ours: Any, queue: Any) -> None:
    try:
        queue.put(ours.generate(**batch(), max_new_tokens=4).tolist())
    except (BackendError, RuntimeError) as error:  # torch's own words, if it is asked first
        queue.put(str(error))


def test_forked_after_the_gpu_was_used(gpu_pair: Any) -> None:
    """CUDA cannot go on in a forked process: the error says how to start workers, and the parent goes on."""
    _, ours = gpu_pair("t5-v1.1")
    expected = ours.generate(**on_gpu(batch()), max_new_tokens=8).tolist()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_generate_in_child, args=(ours, queue))
    child.start()
    said = queue.get(timeout=60)
    child.join(30)
    assert isinstance(said, str) and "spawn" in said and child.exitcode == 0
    assert ours.generate(**on_gpu(batch()), max_new_tokens=8).tolist() == expected


def test_beyond_the_configured_shapes(store: Path) -> None:
    build = BuildConfig(max_source_tokens=32)
    model = TRTT5ForConditionalGeneration.from_model(
        make_hugging_face("t5-v1.0"), backend="tensorrt", engine_cache_dir=store, strict=True, build=build
    )
    with pytest.raises(StrictModeError, match=r"needs max_source_tokens = 40.*for 32"):
        model.generate(**batch(1, 40), max_new_tokens=2)
    assert model.generate(**batch(1, 20), max_new_tokens=2).shape[0] == 1


def test_too_little_memory_then_smaller(gpu_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = gpu_pair("t5-v1.1")
    one = torch.zeros(3, 1, dtype=torch.long, device="cuda")
    gc.collect()
    ours.session._steps.forget()
    with monkeypatch.context() as patch:
        for owner, name in ((Slot, "allocate"), (KernelDecoder, "_allocate")):
            patch.setattr(owner, name, lambda *_: torch.empty(1 << 50, device="cuda"))
        with pytest.raises(BackendError, match="GPU memory ran out"):
            ours(**on_gpu(batch()), decoder_input_ids=one)
    assert ours(**on_gpu(batch()), decoder_input_ids=one).logits.isfinite().all()


@pytest.mark.whole_gpu
def test_too_little_memory_while_building(tmp_path: Path) -> None:
    options: dict[str, Any] = {"backend": "tensorrt", "precision": "fp32", "decode": "engine"}
    model = TRTT5ForConditionalGeneration.from_model(
        make_hugging_face("t5-v1.0"), **options, engine_cache_dir=tmp_path / "store"
    )
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - (200 << 20), dtype=torch.uint8, device="cuda")  # less than a CUDA context takes
    with pytest.raises(BackendError, match=r"building (encoder|decoder_step)"):
        model.generate(**on_gpu(batch()), max_new_tokens=3)
    assert not list((tmp_path / "store").glob(".building*"))
    del hog
    torch.cuda.empty_cache()
    expected = make_hugging_face("t5-v1.0").cuda().generate(**on_gpu(batch()), max_new_tokens=3)
    assert model.generate(**on_gpu(batch()), max_new_tokens=3).tolist() == expected.tolist()


def test_checkpoints_share_engines(tmp_path: Path) -> None:
    """Engines serve all checkpoints of one architecture, and each gives its own tokens."""
    store, keys = EngineStore(tmp_path / "store"), []
    options: dict[str, Any] = {"backend": "tensorrt", "precision": "fp32", "decode": "engine"}
    for seed in (7, 8):
        ours = TRTT5ForConditionalGeneration.from_model(
            make_hugging_face("t5-v1.1", seed=seed), **options, engine_cache_dir=store.root
        )
        expected = make_hugging_face("t5-v1.1", seed=seed).cuda().generate(**on_gpu(batch()), max_new_tokens=9)
        assert ours.generate(**on_gpu(batch()), max_new_tokens=9).tolist() == expected.tolist()
        keys.append({entry.key for entry in store.entries()})
    assert keys[0] == keys[1] and len(keys[0]) == 2


def test_saved_engines_are_used(tmp_path: Path, decode: str, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint saved with its engines runs from an empty store without a build; kernels are compiled into it."""
    options: dict[str, Any] = {"backend": "tensorrt", "precision": "fp32", "decode": decode}
    first = TRTT5ForConditionalGeneration.from_model(
        make_hugging_face("t5-v1.1"), **options, engine_cache_dir=tmp_path / "one"
    )
    expected = first.generate(**on_gpu(batch()), max_new_tokens=9).tolist()
    first.save_pretrained(tmp_path / "model", include_engines=True)
    with caplog.at_level(logging.INFO, "t5_trt"):
        second = TRTT5ForConditionalGeneration.from_pretrained(
            tmp_path / "model", **options, engine_cache_dir=tmp_path / "two"
        )
        assert second.generate(**on_gpu(batch()), max_new_tokens=9).tolist() == expected
    assert "building the engine" not in caplog.text and (tmp_path / "two").exists() == (decode == "kernels")
    assert all("kernels" in entry.manifest for entry in EngineStore(tmp_path / "two").entries())


def test_new_engines_are_checked(tmp_path: Path, decode: str, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"backend": "tensorrt", "precision": "fp16", "decode": decode}
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0"), **options, engine_cache_dir=tmp_path)
    with caplog.at_level(logging.DEBUG, "t5_trt"):
        prompt = torch.tensor([[0, 5, 6]] * 3).cuda()
        ours.generate(**on_gpu(batch()), num_beams=2, max_new_tokens=3, decoder_input_ids=prompt)
    errors = [float(r.args[2]) for r in caplog.records if "is off by" in r.message]  # type: ignore[index, arg-type]
    assert len(errors) == (1 if decode == "kernels" else 3) and all(0 < error < 0.02 for error in errors)


def test_error_after_every_block(gpu_pair: Any) -> None:
    _, ours = gpu_pair("t5-v1.1")
    errors = block_errors(ours, batch(), torch.tensor([[0, 4, 5, 6]] * 3))
    assert [e.name for e in errors] == ["encoder.block.0", "encoder output", "decoder.block.0", "logits"]
    assert all(e.relative_error < 1e-4 for e in errors)
    assert verify(ours, [batch()], max_new_tokens=9).equal == 3


def test_shipped_model(store: Path, decode: str) -> None:
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    hugging_face = T5ForConditionalGeneration.from_pretrained(SHIPPED).cuda().eval()
    ours = TRTT5ForConditionalGeneration.from_pretrained(
        SHIPPED, backend="tensorrt", precision="fp32", decode=decode, engine_cache_dir=store
    )
    lines = (ROOT / "examples" / "data" / "kana.txt").read_text(encoding="utf-8").split("\n")[:-1]
    inputs = tokenizer(lines[:7], return_tensors="pt", padding=True).to("cuda")
    for beams in (1, 4):
        expected = hugging_face.generate(**inputs, num_beams=beams, max_new_tokens=96).tolist()
        assert ours.generate(**inputs, num_beams=beams, max_new_tokens=96).tolist() == expected
