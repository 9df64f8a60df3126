"""The decoder's C code against ONNX Runtime's graphs and torch: logits, caches, rows, threads, the largest logit."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch

from t5_trt import InputError, TRTT5ForConditionalGeneration
from t5_trt.config import default_engine_cache_dir
from t5_trt.engine.store import EngineStore
from t5_trt.graph.int8 import quantize
from t5_trt.graph.parameters import parameters
from t5_trt.kernels import cpu_weights
from t5_trt.kernels.cpu_compile import load_library
from t5_trt.kernels.cpu_decoder import Call, CpuDecoder
from t5_trt.kernels.cpu_weights import CpuTeam
from t5_trt.runtime.cpu_steps import CpuSteps
from t5_trt.runtime.onnxruntime_session import OrtSession
from tests.conftest import pair_of
from tests.tiny_models import KINDS, batch, make_hugging_face

#: sums in another order
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
#: of the logits' length, where rows are rounded to 8 bits in another way
CLOSE_INT8 = 0.08
#: threads, whether they spin, and `cpu_weights.CACHED_BYTES`: up to it each thread takes rows, above they share outputs
TEAMS = ((1, True, 0), (2, True, 0), (3, False, 0), (2, True, 10**9), (3, False, 10**9))


def sessions_of(
    arch: Any, weights: Any, quantized: Any = None, *, threads: int = 1, spinning: bool = True
) -> tuple[OrtSession, OrtSession]:
    """With the C code, and with ONNX Runtime's decoder."""
    library = load_library(EngineStore(default_engine_cache_dir(), None))
    options = {"num_threads": threads, "quantized": quantized, "thread_spinning": spinning}
    return OrtSession(arch, weights, library=library, **options), OrtSession(arch, weights, **options)


def tokens_of(rows: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 200, (rows, count), generator=torch.Generator().manual_seed(seed))


def decoded(
    session: OrtSession,
    beams: int,
    pieces: list[int],
    key_mask: torch.Tensor | None = None,
    encoder: OrtSession | None = None,
) -> Any:
    """Logits of a prompt in pieces, and the cache after it."""
    sources = batch()
    mask = sources["attention_mask"]
    _, cross = (encoder or session).encode(sources["input_ids"], None, mask)
    state = session.start(cross.for_beams(beams), sum(pieces), mask)
    tokens, made = tokens_of(state.rows, sum(pieces)), []
    for count in pieces:
        part = tokens[:, state.length : state.length + count]
        seen = None if key_mask is None else key_mask.repeat_interleave(beams, 0)[:, : state.length + count]
        made.append(session.decode(state, part, seen))
    state.materialize()
    return torch.cat(made, 1), state.kv[..., : state.length, :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("pieces", [[1] * 5, [4, 1, 1], [1, 6], [9]], ids=str)
def test_logits_and_caches_are_those_of_the_graphs(kind: str, beams: int, pieces: list[int]) -> None:
    ours = pair_of(kind)[1]
    own, graphs = sessions_of(ours.architecture, ours.state_dict())
    assert own.steps_by == "kernels" and graphs.steps_by == "engine"
    for got, expected in zip(decoded(own, beams, pieces, encoder=graphs), decoded(graphs, beams, pieces), strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)
    assert own.loaded_graphs() == ("decoder (C code)",)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unsigned", [False, True])
def test_matrices_in_8_bits(kind: str, unsigned: bool) -> None:
    """Also those that are shifted by 128 for processors whose products saturate."""
    ours = pair_of(kind)[1]
    arch, weights = ours.architecture, ours.state_dict()
    quantized = dict(quantize(arch, weights))
    own, graphs = sessions_of(arch, weights, quantized)
    if unsigned:
        shifted = {
            name: (made.short() + 128).to(torch.uint8) if made.dtype == torch.int8 else made
            for name, made in quantized.items()
        }
        other = sessions_of(arch, weights, shifted)[0]
        assert torch.equal(decoded(other, 1, [1] * 6)[0], decoded(own, 1, [1] * 6)[0])
    got, expected = decoded(own, 1, [1] * 6, encoder=graphs)[0], decoded(graphs, 1, [1] * 6)[0]
    assert (got - expected).norm() < CLOSE_INT8 * expected.norm()
    widened = dict(weights)
    for name, parameter in parameters(arch).items():
        if name.startswith("decoder.block") and f"{name}.int8" in quantized:
            matrix = (quantized[f"{name}.int8"].float() * quantized[f"{name}.scale"]).t()
            widened |= {key: matrix[parameter.place(key)].contiguous() for key in parameter.parts}
    only_weights_rounded = decoded(sessions_of(arch, widened)[0], 1, [1] * 6, encoder=graphs)[0]
    assert (got - only_weights_rounded).norm() < CLOSE_INT8 * expected.norm()


@pytest.mark.parametrize("kind", ["t5-v1.0", "t5-v1.1", "mt5"])
@pytest.mark.parametrize("in_8_bits", [False, True])
def test_bits_of_a_row_do_not_depend_on_other_rows_nor_on_threads(
    kind: str, in_8_bits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = pair_of(kind)[1]
    arch, weights = ours.architecture, ours.state_dict()
    quantized = dict(quantize(arch, weights)) if in_8_bits else None
    own = sessions_of(arch, weights, quantized)[0]
    sources = batch()
    _, cross = own.encode(sources["input_ids"][:1], None, sources["attention_mask"][:1])
    tokens = tokens_of(1, 6)
    logits = []
    for threads, spinning, cached in TEAMS:
        monkeypatch.setattr(cpu_weights, "CACHED_BYTES", cached)
        session = sessions_of(arch, weights, quantized, threads=threads, spinning=spinning)[0]
        for rows in (1, 2, 3, 7, 16, 33):
            state = session.start(cross.for_beams(rows), 8, sources["attention_mask"][:1])
            made = [session.decode(state, tokens[:, place, None].expand(rows, 1)) for place in range(5)]
            logits += [torch.cat(made, 1)[row] for row in (0, rows - 1)]
            whole = session.start(cross.for_beams(rows), 8, sources["attention_mask"][:1])
            logits.append(session.decode(whole, tokens[:, :5].expand(rows, 5).contiguous())[-1])
    assert all(torch.equal(each, logits[0]) for each in logits)


def test_masks_of_the_decoder() -> None:
    ours = pair_of("t5-v1.1")[1]
    own, graphs = sessions_of(ours.architecture, ours.state_dict())
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 0, 1, 1], [0] * 7])
    for pieces in ([7], [3, 4], [2] + [1] * 5):
        torch.testing.assert_close(
            decoded(own, 2, pieces, mask, encoder=graphs)[0], decoded(graphs, 2, pieces, mask)[0], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 30.0])
def test_largest_logit_is_exact_and_others_stay_smaller(kind: str, scale: float) -> None:
    """A rough output matrix decides nothing: what could be the largest is computed again, bit for bit."""
    hugging_face = make_hugging_face(kind, seed=3)
    with torch.no_grad():
        hugging_face.lm_head.weight.mul_(scale)
        hugging_face.lm_head.weight[7] = hugging_face.lm_head.weight[5]  # equal logits: the first one counts
        hugging_face.lm_head.weight[11] = 0
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    own = sessions_of(ours.architecture, ours.state_dict(), threads=2)[0]
    sources = batch()
    _, cross = own.encode(sources["input_ids"], None, sources["attention_mask"])
    hidden = torch.tensor([1, 5, 7])
    for seed in range(12):
        tokens = tokens_of(3, 1, seed)
        made = []
        for best_only, hides in ((False, None), (True, None), (True, hidden)):
            state = own.start(cross, 4, sources["attention_mask"])
            logits = torch.empty(3, 1, ours.architecture.vocab_size)
            own.step(state, tokens, logits, hides, best_only=best_only)
            made.append(logits[:, 0])
        exact, best, without = made
        assert torch.equal(best.argmax(-1), exact.argmax(-1)) and torch.equal(best.amax(-1), exact.amax(-1))
        exact[:, hidden] = float("-inf")
        assert torch.equal(without.argmax(-1), exact.argmax(-1)) and torch.equal(without.amax(-1), exact.amax(-1))


def test_rough_output_matrix_follows_its_weights(fresh: Any) -> None:
    request = {**batch(), "max_new_tokens": 6, "do_sample": False}
    before = fresh.generate(**request)
    with torch.no_grad():
        fresh.lm_head.weight.copy_(fresh.lm_head.weight.flip(0))
        assert fresh.generate(**request).tolist() == fresh.reference.generate(**request).tolist() != before.tolist()


def test_calls_of_several_threads_wait_for_one_another() -> None:
    ours = pair_of("t5-v1.1")[1]
    own = sessions_of(ours.architecture, ours.state_dict(), threads=2)[0]
    expected, found = decoded(own, 2, [1] * 20)[0], []
    threads = [threading.Thread(target=lambda: found.append(decoded(own, 2, [1] * 20)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(each, expected) for each in found)


def test_threads_that_come_late_leave_steps_as_they_are() -> None:
    """Jobs that threads may miss and jobs of all of them in turns, with more threads than processors."""
    ours = pair_of("t5-v1.1")[1]
    sessions = [
        sessions_of(ours.architecture, ours.state_dict(), threads=threads, spinning=False)[0] for threads in (1, 5)
    ]
    sources = batch()
    found = []
    for session in sessions:
        _, cross = session.encode(sources["input_ids"], None, sources["attention_mask"])
        _, single = session.encode(sources["input_ids"][:1], None, sources["attention_mask"][:1])
        many = session.start(cross.for_beams(4), 200, sources["attention_mask"])
        one = session.start(single, 200, sources["attention_mask"][:1])
        tokens, logits = tokens_of(many.rows, 200), []
        for place in range(200):
            logits += [session.decode(state, tokens[: state.rows, place, None])[-1] for state in (many, one)]
        found.append(torch.stack(logits))
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_starts_threads_of_its_own() -> None:
    ours = pair_of("t5-v1.1")[1]
    library = load_library(EngineStore(default_engine_cache_dir(), None))
    arch = ours.architecture
    steps = CpuSteps(library, arch, ours.state_dict(), None, threads=2, spinning=True)
    session = sessions_of(arch, ours.state_dict())[0]
    sources = batch()
    _, cross = session.encode(sources["input_ids"], None, sources["attention_mask"])

    def logits() -> torch.Tensor:
        made = torch.empty(3, 1, arch.vocab_size)
        steps.one_token(session.start(cross, 4, sources["attention_mask"]), tokens_of(3, 1), made)
        return made

    expected = logits()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(logits(), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(logits(), expected)


def test_weights_in_bfloat16_are_read_where_they_are() -> None:
    ours = pair_of("t5-v1.1")[1]
    arch = ours.architecture
    weights = {key: weight.detach().to(torch.bfloat16) for key, weight in ours.state_dict().items()}
    library = load_library(EngineStore(default_engine_cache_dir(), None))
    decoder = CpuDecoder(CpuTeam(library, 1, True), arch, weights, None)
    widened = {key: weight.float() for key, weight in weights.items()}
    session = sessions_of(arch, widened)[0]
    sources = batch()
    _, cross = session.encode(sources["input_ids"], None, sources["attention_mask"])
    states = [session.start(cross, 4, sources["attention_mask"]) for _ in range(2)]
    tokens, logits = tokens_of(3, 1), torch.empty(3, 1, arch.vocab_size)
    state = states[0]
    call = Call(tokens, torch.zeros(1, dtype=torch.int64), state.kv, cross.kv, state.cross_bias)
    decoder.run(decoder.prepare(call), logits)
    torch.testing.assert_close(logits, session.decode(states[1], tokens), **CLOSE)
    key = "decoder.block.0.layer.0.SelfAttention.q.weight"
    assert decoder.weights.kept[key].data_ptr() == weights[key].data_ptr()


@pytest.mark.parametrize("token", [-1, 211])
def test_tokens_outside_of_the_vocabulary_are_refused(token: int) -> None:
    ours = pair_of("t5-v1.1")[1]
    own = sessions_of(ours.architecture, ours.state_dict())[0]
    sources = batch()
    _, cross = own.encode(sources["input_ids"], None, sources["attention_mask"])
    state = own.start(cross, 4, sources["attention_mask"])
    with pytest.raises(InputError, match="a token for the decoder is out of range; expected 0 to 210"):
        own.decode(state, torch.tensor([[5], [token], [5]]))
    assert state.length == 0 and own.decode(state, torch.tensor([[5], [6], [5]])).isfinite().all()
    with pytest.raises(InputError, match="a token for the encoder is out of range; expected 0 to 210"):
        own.encode(torch.tensor([[5, token]]), None, torch.ones((1, 2), dtype=torch.int64))
