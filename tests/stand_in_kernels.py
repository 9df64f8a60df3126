"""Stand-ins for the kernels and for CUDA graphs on a CPU: torch does a step, references encode, and a recording runs its work."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.engine.store import EngineStore
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.fp16_scaling import Fp16Scaling
from t5_trt.kernels import reference
from t5_trt.kernels.encoder import EncoderKernels, KeyLists
from t5_trt.runtime import captured_encoder, cuda_session, kernel_decoder, weight_updates
from t5_trt.runtime.kernel_encoder import KernelEncoder
from t5_trt.runtime.step_buffers import select_tokens
from tests.launched_kernels import LaunchedKernels
from tests.tiny_models import make_hugging_face


class Recording:
    """In place of a CUDA graph, after a warm-up that draws nothing from the user's generator."""

    def __init__(self, work: Any, *_: Any, draws: bool = True, stream: Any = None) -> None:
        with torch.random.fork_rng(devices=[], enabled=draws):
            work()
        self.replay = work


class TorchSteps(kernel_decoder.KernelDecoder):
    """A step of one position by torch's decoder, one of several by the references of the kernels."""

    decoder: Any

    def kernels(self, rows: int, beams: int = 1) -> Any:
        """Their references."""
        return LaunchedKernels(self._arch)

    def _stream(self) -> int:
        return 0

    def _run(self, slot: Any, selector: Any) -> None:
        length = int(slot.position)
        assert (slot.positions == length).all()
        past, beams = slot.kv[..., :length, :], slot.shapes.N
        if slot.ancestors is not None:
            rows = torch.arange(len(slot.tokens))[:, None] // beams * beams + slot.ancestors[:, :length]
            past = past.transpose(3, 4)[:, :, rows, torch.arange(length)].transpose(3, 4)
        logits, made = self.decoder.run(slot.tokens.long(), past, slot.cross, slot.cross_bias, beams, None)
        slot.kv[..., length : length + 1, :] = made
        slot.logits.copy_(logits)
        if selector is None:
            slot.move_on(slot.position)
        elif selector.takes_best:
            slot.logits.fill_(torch.nan)  # they are not there
            if selector.hiding is not None and length + 1 < selector.hiding.until:
                logits[..., selector.hiding.tokens.bool()] = -torch.inf
            select_tokens(slot, selector, slot.position, best_of(logits[:, 0]))
        else:
            select_tokens(slot, selector, slot.position)

    def _run_rows(self, rows: Any, step: Any, best_only: bool) -> None:
        """Row by row, from what the kernels get; rows of padding have a source without tokens."""
        given = step.inputs
        for row, token in enumerate(given.tokens):
            length, source, own = int(given.position[row]), int(given.lengths[row]), slice(row, row + 1)
            if source == 0:
                assert int(token) == length == 0
                continue
            past, bias = given.kv[:, :, own, :, :length], given.mask[own, None, None, :source]
            logits, made = self.decoder.run(
                token.long().view(1, 1), past, given.cross[:, :, own, :, :source], bias, 1, None
            )
            given.kv[:, :, own, :, length : length + 1] = made
            given.logits[row] = torch.nan if best_only else logits[0, 0]
            if best_only:
                step.buffers.best[own] = best_of(logits[:, 0])
        if best_only:
            rows.name_best(step.buffers.best[: len(given.tokens)])


class ReferenceKernels(EncoderKernels):
    """The encoder's kernels by their references, in any type. Of key lists, `hide` is the mask and `lists` where packed sources begin."""

    def __init__(self, arch: Architecture) -> None:
        self._arch = arch

    def list_keys(self, mask: torch.Tensor) -> KeyLists:
        return KeyLists(mask, torch.empty(0))

    def list_packed(self, mask: torch.Tensor, starts: torch.Tensor, *, wide: bool | None = None) -> KeyLists:
        return KeyLists(mask, starts)

    def attend(
        self, qkv: torch.Tensor, keys: KeyLists, bias: torch.Tensor, *, wide: bool | None = None
    ) -> torch.Tensor:
        heads, table = self._arch.num_heads, bias / math.log2(math.e)
        if qkv.dim() == 3:
            return reference.attend_encoder(qkv, keys.hide, table, heads)
        return reference.attend_packed(qkv, keys.hide, keys.lists, table, heads)

    def add_and_norm(
        self,
        stream: torch.Tensor,
        branch: torch.Tensor | None,
        scale: float,
        epsilon: float,
        weight: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        added = torch.zeros_like(stream) if branch is None else branch
        summed, made = reference.add_and_norm(stream, added, scale, epsilon, weight)
        stream.copy_(summed)
        return made.to(dtype)

    def activate(self, inner: torch.Tensor) -> torch.Tensor:
        return reference.activate_inner(inner, self._arch.activation, gated=self._arch.gated)

    def split_heads(self, made: torch.Tensor, matrices: int) -> torch.Tensor:
        return reference.split_heads(made, matrices, self._arch.num_heads).contiguous()


def best_of(logits: torch.Tensor) -> torch.Tensor:
    """As the kernel of the output matrix leaves it: the order of the largest logit, and behind it the token, inverted."""
    return (torch.ones(len(logits), dtype=torch.int64) << 32) | (~logits.argmax(-1) & 0xFFFFFFFF)


def kernels_pair(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str = "t5-v1.1", *, packs: bool = False
) -> tuple[Any, Any]:
    """(Hugging Face model of a kind, ours on the backend "cuda" with the stand-ins); with `packs`, kernels encode, and sources are packed."""
    if packs:
        monkeypatch.setattr(
            cuda_session,
            "open_encoder",
            lambda arch, *rest: KernelEncoder(ReferenceKernels(arch), arch, *rest[:3]),
        )
    monkeypatch.setattr(kernel_decoder, "capture", Recording)
    monkeypatch.setattr(captured_encoder, "capture", Recording)
    monkeypatch.setattr(weight_updates, "capture", Recording)
    monkeypatch.setattr(cuda_session, "KernelDecoder", TorchSteps)
    monkeypatch.setattr(kernel_decoder, "SMALLEST_CACHE", 64)  # so that it grows soon
    hugging_face = make_hugging_face(kind)
    ours = TRTT5ForConditionalGeneration.from_model(copy.deepcopy(hugging_face), num_threads=1)
    arch, weights, cpu = ours.architecture, hugging_face.state_dict(), torch.device("cpu")
    session: Any = cuda_session.CudaSession(arch, weights, cpu, "fp32", Fp16Scaling(), EngineStore(tmp_path))
    session._steps.decoder = session._queries
    ours.session  # noqa: B018 - takes note of the weights
    ours.session = session
    return hugging_face, ours
