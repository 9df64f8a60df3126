"""Several positions of every row by the kernels, on the backend "cuda": the bits of single steps, and Hugging Face's results."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt.compat import CACHE
from tests.gpu.cases import LOGITS_ATOL, cuda_model, on_gpu
from tests.tiny_models import KINDS, VOCAB, batch, make_hugging_face
from tests.tolerances import LOSS_ATOL

PRECISIONS = ("fp32", "fp16", "bf16")


@pytest.fixture(scope="module")
def pair_of(store: Path) -> Any:
    """(Hugging Face's model on the GPU, the same weights on the kernels) for a kind; made once."""

    @cache
    def make(kind: str, precision: str = "fp32") -> tuple[Any, Any]:
        return make_hugging_face(kind).cuda(), cuda_model(make_hugging_face(kind), store, precision)

    torch.backends.cuda.matmul.allow_tf32 = False
    return make


def tokens(rows: int, count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, count), generator=torch.Generator().manual_seed(seed)).cuda()


def opened(ours: Any, sources: int, beams: int, room: int = 8) -> Any:
    """A state without tokens over sources of several lengths."""
    inputs = on_gpu(batch(sources, 40))
    _, cross = ours.session.encode(inputs["input_ids"], None, inputs["attention_mask"])
    return ours.session.start(cross.for_beams(beams), room, inputs["attention_mask"])


def filled(state: Any) -> torch.Tensor:
    """Keys and values of a state's tokens."""
    return state.kv[:, :, : state.rows, :, : state.length].clone()  # type: ignore[no-any-return]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("sources", "beams", "counts"),
    [
        (1, 1, (2, 64, 1, 5)), (3, 1, (17, 90, 40)), (8, 1, (64, 64, 3)), (2, 3, (1, 11, 30)), (1, 4, (64, 70)), (40, 4, (2, 3, 7)),
        (300, 1, (2,)), (1, 300, (2, 2)),
    ],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_bits_are_those_of_single_steps(
    pair_of: Any, precision: str, sources: int, beams: int, counts: tuple[int, ...]
) -> None:
    """Logits, keys and values; and again by captured steps. Caches grow on the way, and more than 128 keys are added up by parts."""
    ours = pair_of("t5-v1.1", precision)[1]
    fed = tokens(sources * beams, sum(counts))
    single = opened(ours, sources, beams)
    expected = torch.cat([ours.session.decode(single, ids) for ids in fed.split(1, 1)], 1)
    assert expected.isfinite().all()
    for _ in range(3):
        state = opened(ours, sources, beams)
        got = torch.cat([ours.session.decode(state, ids) for ids in fed.split(counts, 1)], 1)
        assert torch.equal(got, expected)
        assert state.length == single.length and torch.equal(filled(state), filled(single))
        del state  # its buffers serve the next round


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_and_loss_of_labels_equal_hugging_face(pair_of: Any, kind: str) -> None:
    labels = tokens(3, 70)
    labels[1, 12:] = -100
    results = [model(**on_gpu(batch()), labels=labels) for model in pair_of(kind)]
    torch.testing.assert_close(results[1].logits, results[0].logits, atol=LOGITS_ATOL, rtol=1e-4)
    torch.testing.assert_close(results[1].loss, results[0].loss, atol=LOSS_ATOL, rtol=1e-4)


@pytest.mark.parametrize("kind", ["t5-v1.0", "mt5", "umt5"])
@torch.no_grad()
def test_cache_is_extended_and_cropped(pair_of: Any, kind: str) -> None:
    fed, results = tokens(3, 200), []
    for model in pair_of(kind):
        kept, cache = [], None
        for start, end in ((0, 7), (7, 8), (8, 40), (40, 41), (41, 200)):
            out = model(**on_gpu(batch()), decoder_input_ids=fed[:, start:end], **{CACHE: cache})
            cache = out[CACHE]
            kept.append(out.logits)
        cache.crop(-195)
        for ids in (tokens(3, 4, seed=2), tokens(3, 1, seed=3), tokens(3, 2, seed=4)):
            kept.append(model(**on_gpu(batch()), decoder_input_ids=ids, **{CACHE: cache}).logits)
        results.append(torch.cat(kept, 1))
    torch.testing.assert_close(results[1], results[0], atol=LOGITS_ATOL, rtol=1e-4)


@pytest.mark.parametrize("kind", ["t5-v1.0", "t5-v1.1", "umt5"])
@pytest.mark.parametrize("arguments", [{}, {"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 3}], ids=str)
def test_prompts_equal_hugging_face(pair_of: Any, kind: str, arguments: dict[str, Any]) -> None:
    for count in (2, 9, 80):
        request = {**on_gpu(batch()), "decoder_input_ids": tokens(3, count), "max_new_tokens": 16, **arguments}
        expected, got = (model.generate(**request) for model in pair_of(kind))
        assert torch.equal(got, expected), count
    assert pair_of(kind)[1].last_generation_path.loop == "device"


@pytest.mark.parametrize("kind", ["t5-v1.0", "t5-v1.1", "umt5"])
def test_verified_drafts_equal_hugging_face(pair_of: Any, kind: str) -> None:
    """Of prompt lookup and of an assistant, twice: captured when a number of positions comes again."""
    hugging_face, ours = pair_of(kind)
    other = make_hugging_face(kind, seed=3).cuda()
    request = {**on_gpu(batch(1)), "max_new_tokens": 60, "min_new_tokens": 60}
    expected = hugging_face.generate(**request)
    for _ in range(2):
        assert torch.equal(ours.generate(**request, prompt_lookup_num_tokens=5), expected)
        assert torch.equal(ours.generate(**request, assistant_model=other), expected)


@torch.no_grad()
def test_half_precision_is_as_close_to_float32_as_hugging_face(pair_of: Any) -> None:
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        hugging_face, ours = pair_of("t5-v1.1", precision)
        given = on_gpu(batch()) | {"decoder_input_ids": tokens(3, 50)}
        expected = hugging_face(**given).logits
        theirs, got = copy.deepcopy(hugging_face).to(dtype)(**given).logits, ours(**given).logits
        assert float((got - expected).norm()) < 1.25 * float((theirs - expected).norm()), precision


@torch.no_grad()
def test_hidden_tokens_of_the_decoder(pair_of: Any) -> None:
    """They go to torch, over keys and values that kernels made, and kernels go on over its own."""
    fed, mask = tokens(3, 9), torch.ones((3, 9), dtype=torch.long).cuda()
    mask[1, 3] = mask[2, 5] = 0
    results = []
    for model in pair_of("t5-v1.1"):
        kept, cache = [], None
        for start, end in ((0, 3), (3, 6), (6, 9)):
            masked = {"decoder_attention_mask": mask[:, :end]}
            out = model(**on_gpu(batch()), decoder_input_ids=fed[:, start:end], **masked, **{CACHE: cache})
            cache = out[CACHE]
            kept.append(out.logits)
        results.append(torch.cat(kept, 1)[mask.bool()])
    torch.testing.assert_close(results[1], results[0], atol=LOGITS_ATOL, rtol=1e-4)
