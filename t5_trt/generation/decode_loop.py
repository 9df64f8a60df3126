"""The decode loop: launches steps, reads their reports a few steps later, and stops.

It knows neither engines nor Transformers' loop: a session gives it a `GenerationStep` (one decoder step and a token selection,
captured as one CUDA graph where there is a GPU), a token selector defines the meaning of the reports.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from t5_trt.compat import orders_drawn_beams
from t5_trt.generation.beam_search import BeamRules, BeamSelector, finished_beams
from t5_trt.generation.cached_property import cached_property
from t5_trt.generation.eager import EagerBeamSelector, EagerCallbacks, EagerTokenSelector
from t5_trt.generation.processors import CapturableProcessors, capturable_processors
from t5_trt.generation.report_reader import STEPS_AHEAD, Watcher
from t5_trt.generation.request import Request
from t5_trt.generation.sampling import GpuDraws, RowTokenSelector, StopTokens
from t5_trt.generation.token_rules import DeviceRules, TokenRules
from t5_trt.runtime import cuda_kernels
from t5_trt.runtime.kv_buffers import DecoderState, bucket_length
from t5_trt.runtime.session import GenerationStep, Session, TokenSelector
from t5_trt.runtime.torch_threads import one_torch_thread

#: rows up to which one thread chooses the tokens on a CPU: it takes some 0.1 ms a row
_FEW_ROWS = 8


@dataclass
class Outcome:
    """The result of a decode loop.

    Attributes:
        sequences: int64 [rows, tokens], with the prompt.
        scores: processed scores of every step, float32 [R, V], if requested.
        logits: unprocessed logits, likewise.
        sequences_scores: float32 [rows], of beams.
        beam_indices: int32 [rows, new tokens], of beams.
    """

    sequences: torch.Tensor
    scores: list[torch.Tensor] | None = None
    logits: list[torch.Tensor] | None = None
    sequences_scores: torch.Tensor | None = None
    beam_indices: torch.Tensor | None = None


class DecodeLoop(ABC):
    """Runs one request; a batch entry is a source with all of its beams.

    Args:
        session: runs the decoder.
        state: an empty cache of R rows; afterwards it holds all tokens except the last, unless rows were dropped.
        request: see `t5_trt.generation.request.Request`.
        check_length: raises if a number of tokens exceeds the limit of the cache.
    """

    beams = 1

    def __init__(
        self, session: Session, state: DecoderState, request: Request, check_length: Callable[[int], None]
    ) -> None:
        assert request.limit is not None
        self.session, self.state, self.request = session, state, request
        self._check_length = check_length
        self._given = request.prompt.shape[1]
        self._steps = max(request.limit - self._given, 1)
        longest = max(request.limit, math.ceil(request.config.max_length or 0), self._given + 1)
        self.capacity = bucket_length(longest, session.selector_tokens)
        scores: list[torch.Tensor] | None = [] if request.wants_scores else None
        logits: list[torch.Tensor] | None = [] if request.wants_logits else None
        self.eager = (
            None if request.capturable else EagerCallbacks(request.processors, request.criteria, scores, logits)
        )
        self._entries = torch.arange(len(request.prompt) // self.beams)  # entries still decoded
        self._kept: list[torch.Tensor] | None = None  # results of all entries, once some were dropped

    @abstractmethod
    def make(self, entries: int) -> TokenSelector:
        """A new selector."""

    @abstractmethod
    def settings(self) -> tuple[Hashable, ...]:
        """A selector's settings except its processors, for the key of captured steps."""

    def run(self) -> Outcome:
        """Decode to the end."""
        step = self._step()
        limit = self.request.limit
        assert limit is not None
        step.selector.begin(self.request.prompt, limit, self.request.config.max_length or limit)
        if self._given > 1:
            self._check_length(self._given - 1)
            self.session.decode(self.state, self.request.prompt[:, :-1])
        step.feed(self.request.prompt[:, -1:])
        draws = GpuDraws(self.session.device)
        with one_torch_thread() if self._leaves_cores() else nullcontext():
            step, made = self._drive(step)
        draws.rewind(self.state.length + 1 - self._given, made)
        self.state.crop(self._given + made - 1)
        self._keep(step.selector, made)
        assert self._kept is not None
        outcome = self.outcome(self._kept, made)
        if self.eager is not None:
            outcome.scores, outcome.logits = (
                None if kept is None else kept[:made] for kept in (self.eager.scores, self.eager.logits)
            )
        return outcome

    def _leaves_cores(self) -> bool:
        """Whether torch's work between two steps is so little that the session needs the cores more; user callbacks may do more."""
        return self.session.device.type == "cpu" and self.eager is None and len(self.request.prompt) <= _FEW_ROWS

    @abstractmethod
    def outcome(self, results: list[torch.Tensor], made: int) -> Outcome:
        """The result, from the selector's tensors for each entry, after `made` new tokens."""

    def processing(self) -> CapturableProcessors:
        """The request's processors in capturable form: new for each selector, which keeps their parameter values."""
        device, processors, vocabulary = self.session.device, self.request.processors, self.session.arch.vocab_size
        forms = capturable_processors(processors, vocabulary, self.capacity, device)
        assert forms is not None
        made, draws = CapturableProcessors(forms), bool(self.request.config.do_sample)
        chooses = draws or (len(made) > 0 and made.hiding is None)  # else the step does it, or the search for beams
        if chooses and cuda_kernels.choice_kernels(device, vocabulary):
            return CapturableProcessors(forms, DeviceRules(TokenRules.of(processors), device, draws=draws))
        return made

    def _step(self) -> GenerationStep:
        entries, key = len(self._entries), None
        if self.eager is None:  # the same key for all requests that one captured step can serve
            if not self.request.config.do_sample:  # with other row counts the draws would differ
                entries = self.session.decoded_rows(self.state) // self.beams
            key = (entries, self.capacity, *self.settings(), *self.request.fingerprints)
        step = self.session.generation_step(self.state, lambda: self.make(entries), key)
        if key is not None:  # the selector may have been made for another request
            step.selector.load(self.request.processors)
        return step

    def _drive(self, step: GenerationStep) -> tuple[GenerationStep, int]:
        """Launch steps until a report says that the search has ended; return the last step and the number of steps that count."""
        request = self.request
        # don't run ahead: user callbacks must run once per step
        ahead = STEPS_AHEAD if request.known_processors and not request.custom_criteria else 0
        watcher, made, deadline, checks = Watcher(step.selector, ahead), 0, request.deadline, request.checks
        for number in range(1, self._steps + 1):
            for each in checks:
                each.check()
            self._check_length(self.state.length + 1)
            if self.state.length == self.state.capacity:
                self.state.reserve(1)
                step = self._moved(step)
            if deadline is not None and time.time() > deadline:
                step.selector.expired.fill_(True)
            step.launch()
            watcher.post(step.selector, self.state.length)
            reports = watcher.take(all_of_them=number == self._steps)
            shrinks = bool(reports) and self._should_shrink(reports[-1])
            if shrinks:
                reports += watcher.take(all_of_them=True)
            for report in reports:
                made += 1
                if request.streamer is not None:
                    request.streamer.put(report[1 + step.selector.rows :][: len(self._entries)].clone())
                if bool(report[0]):
                    return step, made
            if shrinks and self._should_shrink(reports[-1]):  # the newest report may have even fewer unfinished entries
                step = self._shrunk(step, reports[-1], made)
                watcher = Watcher(step.selector, ahead)
        return step, made

    def _moved(self, step: GenerationStep, rows: torch.Tensor | None = None) -> GenerationStep:
        """A step over the current state that continues from another selector, with all entries or only `rows`."""
        moved = self._step()
        moved.selector.take_over(step.selector, rows)
        tokens = step.tokens.view(-1, self.beams)
        moved.feed((tokens if rows is None else tokens[rows]).reshape(-1, 1))
        return moved

    @cached_property
    def _may_shrink(self) -> bool:
        """Whether finished entries may be dropped.

        Not with sampling (other shapes draw other numbers), nor if the caller gets a cache of all rows, nor if sources were given once
        for each beam.
        """
        request, config = self.request, self.request.config
        seen_outside = request.streamer is not None or config.return_dict_in_generate
        shared = self.state.cross.beams == self.beams
        return self.eager is None and shared and not config.do_sample and not seen_outside

    def _should_shrink(self, report: torch.Tensor) -> bool:
        """Whether to continue with fewer entries: half of them have ended, and fewer are cheaper."""
        entries = len(self._entries)
        if entries == 1 or not self._may_shrink:
            return False
        going = entries - int(report[1 : 1 + entries].sum())
        return 0 < going <= entries // 2 and self.session.can_compact_batch(self.state, going)

    def _shrunk(self, step: GenerationStep, report: torch.Tensor, made: int) -> GenerationStep:
        self._keep(step.selector, made)
        finished = report[1 : 1 + len(self._entries)] != 0
        self._tell(self._entries[finished], made)
        going = (~finished).nonzero()[:, 0]
        device = self.session.device
        self.state = self.state.select_entries(going.to(device))
        self._entries = self._entries[going]
        return self._moved(step, going.to(device))

    def _tell(self, entries: torch.Tensor, made: int) -> None:
        """Tell the request's checks the results of entries that have ended."""
        for check in self.request.checks:
            if check.ended is not None:
                assert self._kept is not None
                places = entries.to(self.session.device)
                check.ended(entries.tolist(), self.outcome([kept[places] for kept in self._kept], made).sequences)

    def _keep(self, selector: TokenSelector, made: int) -> None:
        """Copy the results of the entries that are still decoded to their places in the full results."""
        results = [result[: len(self._entries)] for result in selector.results(self._given + made)]
        if self._kept is None:
            self._kept = [result.clone() for result in results]
            return
        places = self._entries.to(self.session.device)
        for kept, result in zip(self._kept, results, strict=True):
            kept.index_copy_(0, places, result)


class TokenLoop(DecodeLoop):
    """Greedy search and sampling."""

    @cached_property
    def _ending(self) -> StopTokens:
        return StopTokens(self.request.eos, self.request.pad)

    def make(self, entries: int) -> RowTokenSelector | EagerTokenSelector:
        """See `DecodeLoop.make`."""
        sample, device = bool(self.request.config.do_sample), self.session.device
        if self.eager is not None:
            return EagerTokenSelector(entries, self.eager, self.request.pad, do_sample=sample, device=device)
        return RowTokenSelector(
            entries, self.capacity, self.processing(), self._ending, do_sample=sample, device=device
        )

    def settings(self) -> tuple[Hashable, ...]:
        """See `DecodeLoop.settings`."""
        return "tokens", bool(self.request.config.do_sample), self._ending

    def outcome(self, results: list[torch.Tensor], made: int) -> Outcome:
        """See `DecodeLoop.outcome`."""
        return Outcome(results[0][:, : self._given + made].clone())


class BeamLoop(DecodeLoop):
    """Beam search and beam sampling."""

    def __init__(
        self, session: Session, state: DecoderState, request: Request, check_length: Callable[[int], None]
    ) -> None:
        self.rules = beam_rules(request)
        self.beams = self.rules.num_beams
        super().__init__(session, state, request, check_length)

    def make(self, entries: int) -> BeamSelector:
        """See `DecodeLoop.make`."""
        device = self.session.device
        if self.eager is not None:
            return EagerBeamSelector(entries, self.capacity, self.eager, self.rules, device=device)
        return BeamSelector(entries, self.capacity, self.processing(), self.rules, device=device)

    def settings(self) -> tuple[Hashable, ...]:
        """See `DecodeLoop.settings`."""
        return "beams", self.rules

    def outcome(self, results: list[torch.Tensor], made: int) -> Outcome:
        """See `DecodeLoop.outcome`."""
        count = self.request.config.num_return_sequences
        sequences, scores, indices = finished_beams(*results, given=self._given, count=count)
        return Outcome(sequences, sequences_scores=scores, beam_indices=indices)


def beam_rules(request: Request) -> BeamRules:
    """The rules of a request's config, as ``GenerationMixin._beam_search`` reads them."""
    config, ends = request.config, request.config._eos_token_tensor
    return BeamRules(
        num_beams=config.num_beams,
        candidates=max(2, 1 + (0 if ends is None else len(ends))) * config.num_beams,
        length_penalty=float(config.length_penalty),
        # values equal to True but not the object True count as False, as in Transformers' loop
        early_stopping="never" if config.early_stopping == "never" else config.early_stopping is True,
        do_sample=bool(config.do_sample),
        orders_draws=bool(config.do_sample) and orders_drawn_beams(),
        eos=request.eos,
        fill=request.beam_fill,
    )
