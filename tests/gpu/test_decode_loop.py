"""The captured decode loop on a real GPU: the CPU suite's argument sets, draws, and no waiting for the GPU."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from t5_trt.generation.processors import CapturableProcessors, capturable_processors, fingerprint
from t5_trt.generation.request import GenerationPath
from t5_trt.generation.sampling import draw
from tests.cases import CORE, MORE, OTHER_LOOP, OTHER_NUMBERS, PROCESSORS, assert_same, same_values
from tests.gpu.cases import LOGITS_ATOL, idle_slots, on_gpu
from tests.tiny_models import VOCAB, batch


@pytest.mark.parametrize("name", [*CORE, *MORE])
def test_generates_as_hugging_face(gpu_pair: Any, name: str) -> None:
    """Draws too: the captured step draws what torch.multinomial does for the same seed."""
    hugging_face, ours = gpu_pair("t5-v1.1")
    results = []
    for model in (ours, hugging_face):
        torch.manual_seed(11)
        results.append(model.generate(**on_gpu({**batch(), "max_new_tokens": 12, **{**CORE, **MORE}[name]})))
    assert_same(*results, atol=LOGITS_ATOL)
    reason = OTHER_LOOP.get(name, "")
    assert ours.last_generation_path == GenerationPath("transformers" if reason else "device", reason)


def test_generator_is_left_in_the_state_of_transformers_loop(gpu_pair: Any) -> None:
    """Steps beyond the end draw numbers; they are taken back, so that the next request draws the same in both."""
    hugging_face, ours = gpu_pair("t5-v1.1")
    results = []
    for model in (hugging_face, ours):
        torch.manual_seed(5)
        inputs = on_gpu(batch())
        ends = {"eos_token_id": list(range(1, 211, 6)), "pad_token_id": 3}
        first = model.generate(**inputs, do_sample=True, max_new_tokens=60, **ends)
        results.append([first.tolist(), model.generate(**inputs, do_sample=True, max_new_tokens=9).tolist()])
    assert len(results[0][0][0]) < 61 and results[0] == results[1]


def test_captured_draws_equal_multinomial() -> None:
    scores = torch.randn(5, 1000, device="cuda")
    for count in (1, 4):
        torch.manual_seed(8)
        expected = draw(scores, count, capturable=False)
        torch.manual_seed(8)
        assert torch.equal(draw(scores, count, capturable=True), expected)


@pytest.mark.parametrize("processor", [*PROCESSORS, *OTHER_NUMBERS], ids=lambda p: type(p).__name__)
def test_device_form_equals_the_processor_of_transformers(processor: Any) -> None:
    """Also after it was made from one with other numbers."""
    first = next(p for p in PROCESSORS if fingerprint(p) == fingerprint(processor))
    forms = capturable_processors([first], VOCAB, 32, torch.device("cuda"))
    assert forms is not None
    process = CapturableProcessors(forms)
    process.load([processor])
    (moved,) = on_gpu({"logits_processor": [processor]})["logits_processor"]
    same_values(process, moved, "cuda")


def test_other_numbers_in_a_captured_step(gpu_pair: Any) -> None:
    """Nothing is captured anew for them, and what is drawn is what the Hugging Face class draws."""
    hugging_face, ours = gpu_pair("t5-v1.1")
    captured = set()
    for numbers in ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.3, "top_p": 0.5}):
        request = {**on_gpu(batch()), **numbers, "do_sample": True, "repetition_penalty": numbers["temperature"]}
        results = []
        for model in (ours, hugging_face):
            torch.manual_seed(3)
            results.append(model.generate(**request, max_new_tokens=20).tolist())
        assert results[0] == results[1]
        gc.collect()
        captured.add(frozenset(id(step) for slot in idle_slots(ours.session) for step in slot.steps.values()))
    assert len(captured) == 1


@pytest.mark.parametrize("name", ["greedy", "sampling", "sampling, several", "beams", "beam sampling", "temperature"])
def test_repeated_request_reuses_its_preparation(gpu_pair: Any, name: str) -> None:
    """Not prepared again from the second one on."""
    hugging_face, ours = gpu_pair("t5-v1.1")
    for seed in (5, 6, 7):
        results = []
        for model in (hugging_face, ours):
            torch.manual_seed(seed)
            request = {**batch(seed=seed), "max_new_tokens": 12, **{**CORE, **MORE}[name]}
            results.append(model.generate(**on_gpu(request)).tolist())
        assert results[0] == results[1]
    assert ours._prepared._kept


def test_steps_do_not_wait_for_the_gpu(gpu_pair: Any) -> None:
    """Torch raises where something synchronizes inside the loop; reading a report waits for an event, which it allows."""
    _, ours = gpu_pair("t5-v1.1")
    inputs = on_gpu(batch())
    session = ours.session
    for arguments in ({}, {"num_beams": 3}, {"do_sample": True, "top_p": 0.9}):
        ours.generate(**inputs, max_new_tokens=9, **arguments)
        programs, make = [], session.generation_step
        session.generation_step = lambda *args, make=make, kept=programs: kept.append(make(*args)) or kept[-1]
        try:
            ours.generate(**inputs, max_new_tokens=9, return_dict_in_generate=True, **arguments)
        finally:
            session.generation_step = make
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                programs[-1].launch()
        finally:
            torch.cuda.set_sync_debug_mode("default")
