"""Several positions by the kernels' launches on a CPU (their torch references): what reads and writes where, and when it may start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt.compat import CACHE
from t5_trt.runtime import kernel_decoder, kernel_positions
from t5_trt.runtime.kernel_positions import positions_at_once
from t5_trt.runtime.torch_layers import TorchDecoder
from tests.stand_in_kernels import kernels_pair
from tests.tiny_models import VOCAB, batch, make_hugging_face
from tests.tolerances import LOGITS_ATOL, LOSS_ATOL


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    return lambda kind="t5-v1.1": kernels_pair(monkeypatch, tmp_path, kind)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What steps were captured alone."""
    seen: list[str] = []
    real = kernel_decoder.KernelDecoder._captured_alone
    monkeypatch.setattr(
        kernel_decoder.KernelDecoder,
        "_captured_alone",
        lambda self, work, what: seen.append(what) or real(self, work, what),
    )
    return seen


@pytest.fixture(autouse=True)
def torch_decodes_single_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what has hidden tokens: several positions go to torch's decoder only then."""
    run = TorchDecoder.run

    def checked(self: Any, tokens: torch.Tensor, *rest: Any) -> Any:
        assert tokens.shape[1] == 1 or rest[-1] is not None
        return run(self, tokens, *rest)

    monkeypatch.setattr(TorchDecoder, "run", checked)


def tokens(rows: int, count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, count), generator=torch.Generator().manual_seed(seed))


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=LOGITS_ATOL, rtol=1e-5)


@pytest.mark.parametrize("kind", ["t5-v1.0", "t5-v1.1", "mt5", "umt5"])
@torch.no_grad()
def test_logits_and_loss_of_labels_equal_hugging_face(pair: Any, kind: str) -> None:
    hugging_face, ours = pair(kind)
    labels = tokens(3, 20)
    labels[1, 12:] = -100
    results = [model(**batch(), labels=labels) for model in (hugging_face, ours)]
    close(results[1].logits, results[0].logits)
    torch.testing.assert_close(results[1].loss, results[0].loss, atol=LOSS_ATOL, rtol=1e-5)


@torch.no_grad()
def test_cache_is_extended_and_cropped(pair: Any) -> None:
    """By one position and by several in turns, past the room of the first buffers; cropped tokens are written over."""
    hugging_face, ours = pair()
    fed = tokens(3, 90)
    results = []
    for model in (hugging_face, ours):
        kept, cache = [], None
        for start, end in ((0, 7), (7, 8), (8, 40), (40, 41), (41, 90)):
            out = model(**batch(), decoder_input_ids=fed[:, start:end], **{CACHE: cache})
            cache = out[CACHE]
            kept.append(out.logits)
        cache.crop(-85)
        for ids in (tokens(3, 4, seed=2), tokens(3, 1, seed=3), tokens(3, 2, seed=4)):
            kept.append(model(**batch(), decoder_input_ids=ids, **{CACHE: cache}).logits)
        results.append(torch.cat(kept, 1))
    close(results[1], results[0])


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_long_prompts_are_decoded_piece_by_piece(
    pair: Any, monkeypatch: pytest.MonkeyPatch, captured: list[str], beams: int
) -> None:
    monkeypatch.setattr(kernel_positions, "MOST_ROWS", 24)
    hugging_face, ours = pair()
    rows, source = 2 * beams, batch(2)
    states = hugging_face.get_encoder()(**source).last_hidden_state
    _, cross = ours.session.encode(source["input_ids"], None, source["attention_mask"])
    state = ours.session.start(cross.for_beams(beams), 8, source["attention_mask"])
    most = 24 // rows
    fed = tokens(rows, 2 * most + 1)
    given = {"encoder_outputs": (states.repeat_interleave(beams, 0),)}
    mask = source["attention_mask"].repeat_interleave(beams, 0)
    close(ours.session.decode(state, fed), hugging_face(**given, attention_mask=mask, decoder_input_ids=fed).logits)
    assert captured == [f"{most} positions"] and state.length == 2 * most + 1


@torch.no_grad()
def test_positions_follow_beams_that_have_moved(pair: Any) -> None:
    """Keys and values that the last steps left in other beams' caches."""
    hugging_face, ours = pair()
    source = batch(2)
    mask = source["attention_mask"]
    states = hugging_face.get_encoder()(**source).last_hidden_state.repeat_interleave(2, 0)
    given = {"encoder_outputs": (states,), "attention_mask": mask.repeat_interleave(2, 0)}
    _, cross = ours.session.encode(source["input_ids"], None, mask)
    state = ours.session.start(cross.for_beams(2), 8, mask)
    fed, parents = tokens(4, 5), torch.tensor([1, 0, 3, 3])
    ours.session.decode(state, fed)
    slot = state.binding.slot
    slot.ancestors.copy_((parents % 2)[:, None])
    state.ancestors = slot.ancestors
    more = tokens(4, 3, seed=2)
    expected = hugging_face(**given, decoder_input_ids=torch.cat((fed[parents], more), 1)).logits[:, 5:]
    close(ours.session.decode(state, more), expected)


@torch.no_grad()
def test_many_sequences_are_decoded_one_position_at_a_time(pair: Any) -> None:
    hugging_face, ours = pair()
    source, fed = batch(1), tokens(300, 2)
    states = hugging_face.get_encoder()(**source).last_hidden_state
    _, cross = ours.session.encode(source["input_ids"], None, source["attention_mask"])
    state = ours.session.start(cross.for_beams(300), 4)
    expected = hugging_face(encoder_outputs=(states.expand(300, -1, -1),), decoder_input_ids=fed).logits
    close(ours.session.decode(state, fed), expected)
    assert not state.binding.slot.several


@torch.no_grad()
def test_captured_when_a_number_of_positions_comes_again(pair: Any, captured: list[str]) -> None:
    hugging_face, ours = pair()
    for seed in range(3):
        for count in (5, 2) if seed == 0 else (5,):
            fed = tokens(3, count, seed)
            close(ours(**batch(), decoder_input_ids=fed).logits, hugging_face(**batch(), decoder_input_ids=fed).logits)
    assert captured == ["5 positions"]


@torch.no_grad()
def test_hidden_tokens_of_the_decoder(pair: Any) -> None:
    """They go to torch, over the cache that kernels made, and kernels go on over theirs."""
    hugging_face, ours = pair()
    fed, mask = tokens(3, 9), torch.ones((3, 9), dtype=torch.long)
    mask[1, 3] = mask[2, 5] = 0
    results = []
    for model in (hugging_face, ours):
        kept, cache = [], None
        for start, end in ((0, 3), (3, 6), (6, 7), (7, 9)):
            masked = {"decoder_attention_mask": mask[:, :end]}
            out = model(**batch(), decoder_input_ids=fed[:, start:end], **masked, **{CACHE: cache})
            cache = out[CACHE]
            kept.append(out.logits)
        results.append(torch.cat(kept, 1))
    close(results[1][mask.bool()], results[0][mask.bool()])


@pytest.mark.parametrize(
    "arguments",
    [{"prompt_lookup_num_tokens": 3}, {"assistant": True}, {"use_cache": False}],
    ids=["prompt lookup", "assistant", "no cache"],
)
def test_tokens_of_verified_drafts_equal_hugging_face(pair: Any, arguments: dict[str, Any]) -> None:
    hugging_face, ours = pair()
    if "assistant" in arguments:
        arguments = {"assistant_model": make_hugging_face("t5-v1.1", seed=3)}
    request = {**batch(1), "max_new_tokens": 14, "min_new_tokens": 14}
    assert ours.generate(**request, **arguments).tolist() == hugging_face.generate(**request).tolist()


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_prompts_of_generate_equal_hugging_face(pair: Any, arguments: dict[str, Any]) -> None:
    results = []
    for model in pair():
        torch.manual_seed(3)
        prompt = {"decoder_input_ids": tokens(2, 70)}
        results.append(model.generate(**batch(2), **prompt, **arguments, max_new_tokens=6).tolist())
    assert results[0] == results[1]


def test_positions_of_a_step() -> None:
    """As many as the rows allow, and none whose places an int32 could not hold."""
    assert [positions_at_once(rows, 12, 128) for rows in (1, 8, 9, 128, 256, 257, 1000)] == [64, 64, 56, 4, 2, 1, 1]
    assert positions_at_once(1, 64, 1 << 20) == 32 and positions_at_once(40, 64, 1 << 20) == 1
