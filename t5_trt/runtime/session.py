"""The protocol between backends and the model or the decode loops: encode, project, decode, and steps that choose tokens."""

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
    """Inputs of a slot's next step; on a GPU the kernel of a token selector writes them and advances the position.

    Attributes:
        tokens: int32 [R, 1].
        positions: int32 [R] or [1].
        best: int64 [R], the best tokens as the step encodes them, in place of logits; reset to zeros when read.
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
        until: float64 [1], the length in tokens from which they are shown.
    """

    tokens: torch.Tensor
    until: torch.Tensor

    def holds(self, length: int) -> bool:
        """Whether they are hidden in a row of so many tokens; on a GPU this waits for it."""
        return length < float(self.until)


#: number of the latest reports that a `Mailbox` holds
MAILS = 8


class Mailbox:
    """Page-locked host memory into which the kernel of a token selector writes the report of each step, without a copy to wait for.

    Args:
        width: entries of a report.
        device: the GPU.

    Attributes:
        memory: int64 [MAILS, 1 + width], by position modulo MAILS: a stamp, which is written last, and the report.
        epoch: int64 [1] on the GPU, part of the stamp: a new number for each request, as steps of an earlier one may still run.
        in_use: whether a kernel writes into it.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.memory = torch.zeros((MAILS, 1 + width), dtype=torch.int64, pin_memory=device.type == "cuda")
        self.epoch = torch.zeros(1, dtype=torch.int64, device=device)
        self.in_use = False
        self._stamps = self.memory.numpy()[:, 0]
        self._epoch = 0

    def start_anew(self) -> None:
        """Start a new epoch for the steps that follow on torch's stream."""
        self._epoch += 1
        self.epoch.fill_(self._epoch)

    def find(self, position: int) -> torch.Tensor | None:
        """The report of the step that chose the tokens at a position, int64 [width], a view; None if it has not arrived."""
        place = position % MAILS
        return self.memory[place, 1:] if self._stamps[place] == (self._epoch << 32) + position else None


class TokenSelector(Protocol):
    """Runs after a decoder step: chooses the next token of every row from the logits.

    Attributes:
        rows: R.
        expired: bool [1]; set from outside when time is up.
        capturable: `advance` is torch operations on fixed memory that neither wait for the device nor look at values on the
            host, so that a session may capture them together with the step.
        draws: `advance` draws random numbers on the device.
        takes_best: `advance` needs only the index of the largest logit that `hiding` does not hide.
        hiding: the tokens that the step then leaves out; None for none.
        moves_rows: a row may continue another row (beam search).
        report: int64, what the host needs to know about the step.
        mailbox: where kernels put the report; None if they do not.
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
        """Load the parameter values of a request's logits processors; the selector may have been made for another request."""
        ...

    def begin(self, prompt: torch.Tensor, limit: int, longest: int) -> None:
        """Start a request.

        Args:
            prompt: int64 [at most R, tokens].
            limit: length in tokens at which a row ends.
            longest: ``max_length`` of the generation config, which beam search uses in its bounds.
        """
        ...

    def take_over(self, other: Any, rows: torch.Tensor | None = None) -> None:
        """Continue from the state of another selector of this class, with all of its batch entries or only `rows`."""
        ...

    def results(self, length: int) -> tuple[torch.Tensor, ...]:
        """The tensors of the result after `length` tokens, one row for each batch entry."""
        ...

    def advance(
        self, logits: torch.Tensor, position: torch.Tensor, following: NextStep | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Choose the next tokens.

        Args:
            logits: float32 [R, V], valid until the next step.
            position: int64 [1], of the tokens that the logits follow.
            following: what the next step reads.

        Returns:
            The next tokens, int64 [R], and the rows that they continue, int64 [R] (None: their own). None if `following` was given and
            was written completely, and `position` was advanced.
        """
        ...


class GenerationStep(Protocol):
    """A decoder step and a token selector that are launched repeatedly; holds the tokens that the next step reads.

    Attributes:
        selector: its buffers belong to this step.
        tokens: [R, 1], the next step's input.
    """

    selector: TokenSelector
    tokens: torch.Tensor

    def feed(self, tokens: torch.Tensor) -> None:
        """Set the tokens [R, 1] that the next launch decodes."""
        ...

    def launch(self) -> None:
        """Decode the tokens, write their K/V and choose the next ones; on a GPU this returns before the work is done."""
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
        updates: calls of `update_weights` so far; results from before the last one are of other weights.
        steps_by: what runs the one-token decoder step: "kernels" (the library's own, in CUDA or on a CPU in C) or "engine".
        scaling: factors in the weights that keep half precision in range; None where the weights are the model's.
        engines: built engines, which can be stored beside a checkpoint; None if the backend builds none.
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
        """Change the values of some weights, keeping graphs and engines.

        Args:
            changed: state-dict key -> tensor on the session's device; each is computed on access and valid until the next access.

        Returns:
            Whether the session supports it; if not, it must be opened again.
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
        """Cross-attention K/V of given encoder states [B, S, E]."""
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
        """Run the encoder or the many-query decoder once on full buffers, to find the block where a result goes wrong.

        Args:
            graph: `t5_trt.graph.signature.ENCODER` or `QUERIES`.
            inputs: every input of the graph's signature, on the device, of buckets' sizes.

        Returns:
            The residual stream after every block, [rows of tokens, E] each, named "encoder.block.0" and so on, and
            "encoder_hidden_states" [B, S, E] or "logits" [R, Q, V].
        """
        ...

    def loaded_graphs(self) -> tuple[str, ...]:
        """The names of loaded graphs, and of parts that run without an engine."""
        ...

    @property
    def weight_bytes(self) -> int:
        """GPU memory of the session's weights so far, in bytes; 0 if they are read from host memory."""
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
            Logits, float32 [R, Q, V], in memory that later calls do not write to.
        """
        ...

    def can_compact_batch(self, state: DecoderState, batch: int) -> bool:
        """Whether a step with `batch` of the state's entries is cheaper and needs no new engine."""
        ...

    def decoded_rows(self, state: DecoderState) -> int:
        """Rows that are decoded for a state: its own R, and padding rows of the engine's shape."""
        ...

    def generation_step(self, state: DecoderState, make: Callable[[], TokenSelector], key: Hashable) -> GenerationStep:
        """A step over the buffers of a state with room for one more token.

        Args:
            state: of R rows.
            make: a new selector for R rows, or for more, up to `decoded_rows`.
            key: equal for selectors that do the same; the session may then return a step that it captured
                before, whose selector has old contents. None: always a new selector.
        """
        ...
