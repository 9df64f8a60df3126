"""Models on two GPUs in one process: each works on its own, whichever GPU the thread has as its current one. No TensorRT is needed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt.serving import Engine
from tests.gpu.cases import cuda_model
from tests.tiny_models import VOCAB, batch, make_hugging_face

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it takes two GPUs")

DEVICES = ("cuda:0", "cuda:1")
ARGUMENTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 4},
    {"do_sample": True, "top_k": 20},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"decoder_input_ids": [[0, 5, 9]] * 3},
)


def moved(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    made = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in arguments.items()}
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in made.items()}


def generated(model: Any, device: str, **arguments: Any) -> torch.Tensor:
    torch.cuda.manual_seed_all(3)
    made: torch.Tensor = model.generate(**moved(batch(3, 11) | arguments, device), max_new_tokens=30, min_new_tokens=30)
    assert made.device == torch.device(device)
    return made.cpu()


def used(device: str) -> tuple[int, int]:
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)


@pytest.mark.parametrize(("device", "other"), [DEVICES, DEVICES[::-1]])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_model_works_on_its_gpu_while_the_other_one_is_current(
    device: str, other: str, precision: str, store: Path
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    hugging_face = make_hugging_face("t5-v1.1").to(device)
    expected = [generated(hugging_face, device, **arguments) for arguments in ARGUMENTS]
    with torch.no_grad():
        logits = hugging_face(**moved(batch(3, 11) | {"decoder_input_ids": [[0, 5, 9, 2]] * 3}, device)).logits
    torch.cuda.synchronize(other)
    torch.cuda.empty_cache()  # a capture does it, too
    torch.cuda.reset_peak_memory_stats(other)
    before = used(other)
    with torch.cuda.device(other):
        ours = cuda_model(make_hugging_face("t5-v1.1"), store, precision, device)
        got = [generated(ours, device, **arguments) for arguments in ARGUMENTS]
        with torch.no_grad():
            own = ours(**moved(batch(3, 11) | {"decoder_input_ids": [[0, 5, 9, 2]] * 3}, device)).logits
        state = {name: value + 0.05 * value.abs().mean() for name, value in ours.state_dict().items()}
        ours.load_state_dict(state)
        changed = generated(ours, device)
        assert torch.cuda.current_device() == torch.device(other).index
    assert used(other) == before and torch.cuda.max_memory_allocated(other) == before[0]
    assert own.device == torch.device(device)
    if precision == "fp32":
        assert all(map(torch.equal, got, expected))
        assert float((own - logits).norm() / logits.norm()) < 1e-4
        hugging_face.load_state_dict(state)
        assert torch.equal(changed, generated(hugging_face, device))


@pytest.mark.parametrize(("device", "other"), [DEVICES, DEVICES[::-1]])
def test_all_kernels_and_copies_run_on_the_gpu_of_the_model(device: str, other: str, store: Path) -> None:
    with torch.cuda.device(other):
        ours = cuda_model(make_hugging_face("t5-v1.1"), store, "fp16", device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            for arguments in ARGUMENTS:
                ours.generate(**moved(batch(3, 11) | arguments, device), max_new_tokens=8)
            torch.cuda.synchronize(device)
            torch.cuda.synchronize(other)
    events = [event for event in profile.events() or [] if event.device_type.name == "CUDA"]
    assert len(events) > 100
    assert {event.device_index for event in events} == {torch.device(device).index}


def test_threads_use_both_gpus_at_once(store: Path) -> None:
    models = {device: cuda_model(make_hugging_face("t5-v1.0"), store, device=device) for device in DEVICES}
    expected = {device: generated(model, device, num_beams=3) for device, model in models.items()}
    assert torch.equal(*expected.values())

    def calls(device: str) -> list[torch.Tensor]:  # a thread's current GPU is the first one
        return [generated(models[device], device, num_beams=3) for _ in range(30)]

    with ThreadPoolExecutor(4) as threads:
        for made, device in zip(threads.map(calls, DEVICES * 2), DEVICES * 2, strict=True):
            assert all(torch.equal(each, expected[device]) for each in made)


def test_engines_serve_from_both_gpus_at_once(store: Path) -> None:
    models = [cuda_model(make_hugging_face("t5-v1.0"), store, device=device) for device in DEVICES]
    sources = [torch.randint(2, VOCAB, (1, 3 + 5 * i), generator=torch.Generator().manual_seed(i)) for i in range(12)]
    settings: dict[str, Any] = {"max_new_tokens": 20, "min_new_tokens": 20}
    expected = [models[0].generate(ids.to(DEVICES[0]), **settings)[0].cpu() for ids in sources]
    with Engine(models[0], max_rows=8) as first, Engine(models[1], max_rows=8) as second:
        handles = [engine.submit(ids[0], **settings) for ids in sources for engine in (first, second)]
        results = [torch.as_tensor(handle.result(60)).cpu() for handle in handles]
    for i, wanted in enumerate(expected):
        for got in results[2 * i : 2 * i + 2]:
            assert got.flatten().tolist() == wanted.tolist()


@pytest.mark.parametrize(("device", "other"), [DEVICES, DEVICES[::-1]])
def test_a_served_seed_leaves_the_generators_of_both_gpus_alone(device: str, other: str, store: Path) -> None:
    model = cuda_model(make_hugging_face("t5-v1.0"), store, device=device)
    ids = torch.tensor([[5, 9, 2, 44]], device=device)
    drawn: dict[str, Any] = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 12}
    torch.manual_seed(3)
    expected = model.generate(ids, **drawn).cpu()
    torch.manual_seed(8)
    before = [torch.cuda.get_rng_state(each) for each in DEVICES]
    with torch.cuda.device(other), Engine(model) as engine:
        assert torch.equal(engine.submit(ids[0].cpu(), seed=3, **drawn).result(60), expected)
    assert all(map(torch.equal, [torch.cuda.get_rng_state(each) for each in DEVICES], before))
