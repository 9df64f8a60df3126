"""What every backend offers to the model and the decode loops: encode, project, decode, and steps that choose tokens."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.graph.fp16_scaling import Fp16Scaling
from t5_trt.graph.parameters import Weights
from t5_trt.runtime.kv_buffers import CrossStates, DecoderState


@dataclass(frozen=True)
class NextStep:
    """What the next step of a slot reads; on a GPU the kernel of a token selector writes it, and moves the position on.

    Attributes:
        tokens: int32 [R, 1].
        positions: int32 [R] or [1].
        best: int64 [R], where the step left what its best tokens are, in place of logits; zeros when it has been read.
        ancestors: uint8 [R, T + 1], the beam in whose cache each token's key and value lie; None where rows of the cache move.
    """

    tokens: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    best: torch.Tensor | None = None
    ancestors: torch.Tensor | None = None

    @property
    def position_count(self) -> int:
        """Entries of `positions`."""
        return 0 if self.positions is None else len(self.positions)


@dataclass(frozen=True)
class Hiding:
    """Tokens that are hidden as long as a row is short.

    Attributes:
        tokens: uint8 [V], 1 for those.
        until: float64 [1], the length in tokens from which on they are not.
    """

    tokens: torch.Tensor
    until: torch.Tensor


#: reports of steps that a `Mailbox` holds, those of the last ones
MAILS = 8


class Mailbox:
    """Page-locked memory of the host into which the kernel of a token selector writes the report of each step, so that nobody waits for a copy.

    Args:
        width: entries of a report.
        device: the GPU.

    Attributes:
        memory: int64 [MAILS, 1 + width], by position modulo MAILS: a stamp, which is written last, and the report.
        epoch: int64 [1] on the GPU, part of the stamp: another number for each request, as steps of the one before may still run.
        in_use: whether a kernel writes into it.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.memory = torch.zeros((MAILS, 1 + width), dtype=torch.int64, pin_memory=device.type == "cuda")
        self.epoch = torch.zeros(1, dtype=torch.int64, device=device)
        self.in_use = False
        self._stamps = self.memory.numpy()[:, 0]
        self._epoch = 0

    def start_anew(self) -> None:
        """Tell the reports of the steps that follow on torch's stream from all others."""
        self._epoch += 1
        self.epoch.fill_(self._epoch)

    def find(self, position: int) -> torch.Tensor | None:
        """The report of the step that has chosen the tokens at a position, if it has come; int64 [width], a view."""
        place = position % MAILS
        return self.memory[place, 1:] if self._stamps[place] == (self._epoch << 32) + position else None


class TokenSelector(Protocol):
    """What follows a decoder step: from its logits it decides how every row goes on.

    Attributes:
        rows: R.
        expired: bool [1]; set from outside when time is up.
        capturable: `advance` is torch operations on fixed memory that neither wait for the device nor look at values on the
            host, so that a session may capture them together with the step.
        draws: `advance` draws random numbers on the device.
        takes_best: `advance` reads no more of the logits than which one is the largest, but for those that `hiding` hides.
        hiding: what the step leaves out then; None for nothing.
        moves_rows: a row may go on with what another one holds.
        report: int64, what the host must know of the step.
        mailbox: where it looks for it, if kernels put it there.
    """

    rows: int
    expired: torch.Tensor
    capturable: bool
    draws: bool
    takes_best: bool
    moves_rows: bool
    report: torch.Tensor

    @property
    def hiding(self) -> Hiding | None: ...  # noqa: D102 - see above

    @property
    def mailbox(self) -> Mailbox | None: ...  # noqa: D102

    def load(self, processors: Sequence[Any]) -> None:
        """Take over the numbers of a request's logits processors; the selector may have been made for another request."""
        ...

    def begin(self, prompt: torch.Tensor, limit: int, longest: int) -> None:
        """Start a request.

        Args:
            prompt: int64 [at most R, tokens].
            limit: tokens at which a row is over.
            longest: ``max_length`` of the generation config, which estimates of beam search go by.
        """
        ...

    def take_over(self, other: Any, rows: torch.Tensor | None = None) -> None:
        """Go on where another selector of this class stands, with all of its batch entries or those that `rows` names."""
        ...

    def results(self, length: int) -> tuple[torch.Tensor, ...]:
        """What the loop's outcome is made of, a row for each batch entry, after `length` tokens."""
        ...

    def advance(
        self, logits: torch.Tensor, position: torch.Tensor, following: NextStep | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Choose.

        Args:
            logits: float32 [R, V], good until the next step.
            position: int64 [1], of the tokens that the logits follow.
            following: what the next step reads.

        Returns:
            The next tokens, int64 [R], and the rows that they continue, int64 [R] (None: their own). None if `following` was given and is
            all written, with `position`.
        """
        ...


class GenerationStep(Protocol):
    """A decoder step and a token selector, to be launched over and over; it holds the tokens that the next step reads.

    Attributes:
        selector: with the buffers that belong to this step.
        tokens: [R, 1], the next step's input.
    """

    selector: TokenSelector
    tokens: torch.Tensor

    def feed(self, tokens: torch.Tensor) -> None:
        """Set the tokens [R, 1] that the next launch decodes."""
        ...

    def launch(self) -> None:
        """Decode the tokens, write their K/V and choose the next ones; on a GPU this returns before it is done."""
        ...


class BuiltEngines(Protocol):
    """Engines that a session has used."""

    def write_bundle(self, checkpoint: Path) -> Path:
        """Copy them beside a checkpoint, see `t5_trt.engine.bundle`."""
        ...


class Session(Protocol):
    """Engines of one model on one device. Calls are thread-safe as long as each thread has its own `DecoderState`.

    Attributes:
        selector_tokens: least number of tokens that a `TokenSelector` should have room for; more than it needs where it is captured, so
            that requests of other lengths can use it again.
        updates: calls of `update_weights` so far; what was computed before the last one has other weights in it.
        steps_by: who does the one-token decoder step: "kernels" (the library's own CUDA kernels) or "engine".
        scaling: factors in the weights that keep half precision in range; None where the weights are the model's.
        engines: built ones, which can be stored beside a checkpoint; None where nothing is built.
    """

    arch: Architecture
    backend: str
    precision: str
    device: torch.device
    dtype: torch.dtype
    selector_tokens: int
    steps_by: str
    updates: int

    def update_weights(self, changed: Weights) -> bool:
        """Go on with other values of some weights, without another graph or engine.

        Args:
            changed: state-dict key -> tensor on the session's device, which is made when it is asked for and good until the next one.

        Returns:
            Whether the session could; if not it must be opened anew.
        """
        ...

    @property
    def scaling(self) -> Fp16Scaling | None: ...  # noqa: D102 - see above

    @property
    def engines(self) -> BuiltEngines | None: ...  # noqa: D102

    def encode(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor,
        beams: int | None = None,
    ) -> tuple[torch.Tensor, CrossStates]:
        """Run the encoder.

        Args:
            input_ids: int64 [B, S], or None with `inputs_embeds`.
            inputs_embeds: float32 [B, S, E], or None with `input_ids`.
            attention_mask: int64 [B, S], 0 hides a token.
            beams: that the decoder will run with next, one token at a time, so that its engine can be built side by side
                with the encoder's; None if nothing is known.

        Returns:
            Hidden states [B, S, E] and the decoder's cross-attention K/V.
        """
        ...

    def project_cross(self, hidden: torch.Tensor) -> CrossStates:
        """Cross-attention K/V of encoder states [B, S, E] that came from elsewhere."""
        ...

    def start(
        self, cross: CrossStates, capacity_tokens: int, attention_mask: torch.Tensor | None = None
    ) -> DecoderState:
        """An empty cache over sources, with room for at least `capacity_tokens`; a mask [B, S] of zeros and ones hides tokens."""
        ...

    def cross_bias(self, attention_mask: torch.Tensor, cross: CrossStates) -> torch.Tensor:
        """Additive form of a mask [B, S], shaped [B, 1, 1, S] as the buffers of `cross` are."""
        ...

    def layer_outputs(self, graph: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the encoder or the many-query decoder once on full buffers, for finding where a result goes wrong.

        Args:
            graph: `t5_trt.graph.signature.ENCODER` or `QUERIES`.
            inputs: every input of the graph's signature, on the device, of buckets' sizes.

        Returns:
            The residual stream after every block, [rows of tokens, E] each, named "encoder.block.0" and so on, and
            "encoder_hidden_states" [B, S, E] or "logits" [R, Q, V].
        """
        ...

    def loaded_graphs(self) -> tuple[str, ...]:
        """What computes, by name: the graphs that engines are loaded for, and what runs without an engine."""
        ...

    @property
    def weight_bytes(self) -> int:
        """GPU memory that the session's weights take so far; 0 where the host's are read."""
        ...

    def decode(
        self, state: DecoderState, input_ids: torch.Tensor, key_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the decoder on Q new tokens per row and write their K/V into the state.

        Args:
            state: of R rows; it is Q tokens longer afterwards.
            input_ids: int64 [R, Q].
            key_mask: int64 [R, length + Q], 0 hides one of the decoder's own tokens; None hides none.

        Returns:
            Logits, float32 [R, Q, V], in memory that later calls do not touch.
        """
        ...

    def can_compact_batch(self, state: DecoderState, batch: int) -> bool:
        """Whether a step of this state is cheaper with `batch` of its entries, without anything being built for that."""
        ...

    def decoded_rows(self, state: DecoderState) -> int:
        """Rows that are decoded for a state: its own R, and behind them those that fill up the engines' shape."""
        ...

    def generation_step(self, state: DecoderState, make: Callable[[], TokenSelector], key: Hashable) -> GenerationStep:
        """A step over the buffers of a state with room for one more token.

        Args:
            state: of R rows.
            make: a new selector for R rows, or for more, up to `decoded_rows`.
            key: equal for selectors that do the same; the session may then hand out a step that it has captured
                before, whose selector holds old contents. None: always a new selector.
        """
        ...
