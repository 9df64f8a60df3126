"""The parity suite's argument sets on the backend "cuda", against Hugging Face's class on the same GPU; and what the kernels promise
beyond it: the same bits in every run, whatever rows share the batch."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt.compat import CACHE
from t5_trt.generation.request import GenerationPath
from t5_trt.runtime.kv_buffers import CrossStates
from tests.cases import (
    CORE,
    MORE,
    OTHER_LOOP,
    Recorder,
    assert_same,
    exchange_head,
    load_decoder,
    scale_row,
    scale_weights,
    training_step,
    write_data_of_head,
)
from tests.gpu.cases import LOGITS_ATOL, OVERFLOWING, cuda_model, on_gpu
from tests.tiny_models import KINDS, batch, make_hugging_face

ALL = {**CORE, **MORE}


@pytest.fixture(scope="module")
def pair_of(store: Path) -> Any:
    """(Hugging Face's model on the GPU, the same weights on the kernels) for a kind; made once."""

    @cache
    def make(kind: str) -> tuple[Any, Any]:
        return make_hugging_face(kind).cuda(), cuda_model(make_hugging_face(kind), store)

    torch.backends.cuda.matmul.allow_tf32 = False
    return make


def both(pair: tuple[Any, Any], seed: int = 11, **request: Any) -> tuple[Any, Any]:
    """Results of Hugging Face's class and ours, for one seed."""
    results = []
    for model in pair:
        torch.manual_seed(seed)
        results.append(model.generate(**on_gpu({**batch(), "max_new_tokens": 12, **request})))
    return results[0], results[1]


@pytest.mark.parametrize("name", ALL)
def test_generates_as_hugging_face(pair_of: Any, name: str) -> None:
    """Draws too, and a second time, when the request is prepared and captured already."""
    for _ in range(2):
        expected, got = both(pair_of("t5-v1.1"), **ALL[name])
        assert_same(got, expected, atol=LOGITS_ATOL)
        reason = OTHER_LOOP.get(name, "")
        assert pair_of("t5-v1.1")[1].last_generation_path == GenerationPath(
            "transformers" if reason else "device", reason
        )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "t5-v1.1"])
@pytest.mark.parametrize("name", CORE)
def test_family_generates_as_hugging_face(pair_of: Any, kind: str, name: str) -> None:
    expected, got = both(pair_of(kind), **CORE[name])
    assert_same(got, expected, atol=LOGITS_ATOL)


def test_streamer_sees_every_token(pair_of: Any) -> None:
    seen = []
    for model in pair_of("t5-v1.1"):
        recorder = Recorder()
        model.generate(**on_gpu(batch(1)), streamer=recorder, max_new_tokens=9)
        seen.append((recorder.pieces, recorder.ended))
    assert seen[0] == seen[1] and len(seen[0][0]) > 3


@pytest.mark.parametrize("sample", [False, True])
def test_assistants(pair_of: Any, store: Path, sample: bool) -> None:
    """A smaller Hugging Face model beside ours, ours beside a Hugging Face model, and both ours."""
    hugging_face, ours = pair_of("t5-v1.1")
    small = make_hugging_face("t5-v1.1", num_layers=1)
    theirs, mine = copy.deepcopy(small).cuda(), cuda_model(small, store)
    results = []
    for model, assistant in ((hugging_face, theirs), (ours, theirs), (hugging_face, mine), (ours, mine)):
        torch.manual_seed(4)
        request = {**on_gpu(batch(1)), "max_new_tokens": 15, "do_sample": sample}
        results.append(model.generate(**request, assistant_model=assistant).tolist())
    assert results == results[:1] * 4


def test_prompt_lookup(pair_of: Any) -> None:
    hugging_face, ours = pair_of("t5-v1.1")
    request = {**on_gpu(batch(1)), "prompt_lookup_num_tokens": 3, "max_new_tokens": 15, "min_new_tokens": 15}
    assert ours.generate(**request).tolist() == hugging_face.generate(**request).tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_outputs_given(pair_of: Any, beams: int) -> None:
    hugging_face, ours = pair_of("t5-v1.1")
    inputs = on_gpu(batch())
    expected = hugging_face.generate(**inputs, num_beams=beams, max_new_tokens=9).tolist()
    with torch.no_grad():
        for encoder in (ours.get_encoder(), hugging_face.get_encoder()):
            given = {"encoder_outputs": encoder(**inputs), "attention_mask": inputs["attention_mask"]}
            assert ours.generate(**given, num_beams=beams, max_new_tokens=9).tolist() == expected


@torch.no_grad()
def test_returned_cache_goes_on(pair_of: Any) -> None:
    """It holds every token but the last, on both sides, and gives the same logits for the next one."""
    logits = []
    for model in pair_of("t5-v1.1"):
        inputs = on_gpu(batch())
        out = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, return_dict_in_generate=True)
        assert out[CACHE].get_seq_length() == 8
        again = model(**inputs, decoder_input_ids=out.sequences[:, -1:], **{CACHE: out[CACHE]})
        logits.append(again.logits)
    torch.testing.assert_close(logits[1], logits[0], atol=LOGITS_ATOL, rtol=1e-5)


@torch.no_grad()
def test_cached_pieces_equal_one_pass(pair_of: Any) -> None:
    """One token at a time, by the kernels, and several, by torch, over one cache that grows."""
    hugging_face, ours = pair_of("t5-v1.1")
    inputs, ids = on_gpu(batch()), torch.randint(2, 200, (3, 75), device="cuda")
    expected = hugging_face(**inputs, decoder_input_ids=ids).logits
    encoded, cache, made, place = ours.get_encoder()(**inputs), None, [], 0
    for count in (1, 1, 4, 1, 57, 1, 1, 9):
        piece = ids[:, place : place + count]
        out = ours(
            encoder_outputs=encoded, attention_mask=inputs["attention_mask"], decoder_input_ids=piece, **{CACHE: cache}
        )
        cache, place = out[CACHE], place + count
        made.append(out.logits)
    torch.testing.assert_close(torch.cat(made, 1), expected, atol=LOGITS_ATOL, rtol=1e-4)


@pytest.mark.parametrize("kind", ["t5-v1.0", "t5-v1.1"])
@pytest.mark.parametrize("enlarge", OVERFLOWING.values(), ids=OVERFLOWING)
@torch.no_grad()
def test_steps_of_overflowing_checkpoints_in_float16(store: Path, kind: str, enlarge: Any) -> None:
    hugging_face, ids = enlarge(make_hugging_face(kind)), torch.randint(2, 200, (3, 6), device="cuda")
    ours, inputs, cache, made = cuda_model(copy.deepcopy(hugging_face), store, "fp16"), on_gpu(batch()), None, []
    encoded = ours.get_encoder()(**inputs)
    for place in range(6):  # one token at a time: the kernels
        piece, mask = ids[:, place : place + 1], inputs["attention_mask"]
        out = ours(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=piece, **{CACHE: cache})
        cache = out[CACHE]
        made.append(out.logits)
    got, expected = torch.cat(made, 1), hugging_face.cuda()(**inputs, decoder_input_ids=ids).logits
    assert got.isfinite().all() and float((got - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize(
    "change",
    [scale_weights, exchange_head, write_data_of_head, scale_row, load_decoder, training_step],
    ids=lambda change: change.__name__,
)
def test_changed_weights_are_followed(store: Path, change: Any) -> None:
    hugging_face, ours = make_hugging_face("t5-v1.1"), cuda_model(make_hugging_face("t5-v1.1"), store)
    texts = []
    for _ in range(2):
        expected, got = both((copy.deepcopy(hugging_face).cuda(), ours))
        beams = both((copy.deepcopy(hugging_face).cuda(), ours), num_beams=3)
        assert got.tolist() == expected.tolist() and beams[1].tolist() == beams[0].tolist()
        texts.append((got.tolist(), beams[1].tolist()))
        change(hugging_face)
        ours.load_state_dict(hugging_face.state_dict()) if change is training_step else change(ours)
    assert texts[0] != texts[1]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_row_does_not_depend_on_its_batch(store: Path, precision: str) -> None:
    """Logits of ten steps, alone and in batches of 2 to 40, with one beam and with several: equal bits."""
    session = cuda_model(make_hugging_face("t5-v1.1"), store, precision).session
    inputs = on_gpu(batch(40, 37))
    # the encoder's products are cuBLAS's, which chooses by the batch: so all batches get the K/V of one encoding
    _, cross = session.encode(inputs["input_ids"], None, inputs["attention_mask"])
    tokens = torch.randint(2, 200, (10, 40, 1), device="cuda")

    def logits(first: int, last: int, beams: int = 1) -> torch.Tensor:
        own = CrossStates(cross.kv[:, :, first:last].contiguous(), used=(last - first, cross.source_length))
        state = session.start(own.for_beams(beams), 64, inputs["attention_mask"][first:last])
        steps = [session.decode(state, each[first:last].repeat_interleave(beams, 0)) for each in tokens]
        return torch.stack(steps)[:, :, 0]

    whole = logits(0, 40)
    assert whole.isfinite().all() and len({tuple(row) for row in whole[-1].tolist()}) == 40
    for rows in range(1, 40):
        assert torch.equal(logits(0, rows), whole[:, :rows]), rows
    for row in (1, 17, 39):
        assert torch.equal(logits(row, row + 1)[:, 0], whole[:, row]), row
    for beams in (2, 5):
        assert torch.equal(logits(0, 8, beams), whole[:, :8].repeat_interleave(beams, 1)), beams


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_same_call_gives_the_same_bits(store: Path, precision: str) -> None:
    """In another process's place: a second model, whose buffers and captures are its own."""
    requests = [{}, {"num_beams": 4}, {"do_sample": True}, {"max_new_tokens": 150, "min_new_tokens": 150}]
    runs = []
    for _ in range(2):
        ours = cuda_model(make_hugging_face("t5-v1.1"), store, precision)
        for _ in range(2):
            found = []
            for request in requests:
                torch.manual_seed(3)
                scores = {"return_dict_in_generate": True, "output_logits": True}
                out = ours.generate(**on_gpu({**batch(9), "max_new_tokens": 12, **request, **scores}))
                found += [out.sequences, *out.logits]
            runs.append(found)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
