"""The decode loop: launches step after step, looks at their reports a few steps late, and stops.

It knows neither engines nor Transformers' loop: a session gives it a `Program` (one decoder step and a choice of tokens,
recorded as one CUDA graph where there is a GPU), a choice says what its report means.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from t5_trt.generation.beam import BeamChoice, BeamRules
from t5_trt.generation.processors import Processing, Recordable, Stock, device_forms, fingerprint
from t5_trt.generation.sampling import Ending, TokenChoice
from t5_trt.generation.support import Request
from t5_trt.generation.watch import STEPS_AHEAD, Watcher
from t5_trt.runtime.buffers import DecoderState, bucket_length
from t5_trt.runtime.session import Program, Session


@dataclass
class Outcome:
    """What a loop made.

    Attributes:
        sequences: int64 [rows, tokens], with the prompt.
        scores: processed scores of every step, float32 [R, V], if they were asked for.
        logits: unprocessed logits, likewise.
        sequences_scores: float32 [rows], of beams.
        beam_indices: int32 [rows, new tokens], of beams.
    """

    sequences: torch.Tensor
    scores: list[torch.Tensor] | None = None
    logits: list[torch.Tensor] | None = None
    sequences_scores: torch.Tensor | None = None
    beam_indices: torch.Tensor | None = None


class _Run:
    """One request on its way."""

    def __init__(
        self, session: Session, state: DecoderState, request: Request, check_length: Callable[[int], None]
    ) -> None:
        assert request.limit is not None
        given = request.prompt.shape[1]
        self.session, self.state, self.request, self.check_length = session, state, request, check_length
        self.steps = max(request.limit - given, 1)
        self.capacity = bucket_length(max(request.limit, request.config.max_length or 0, given + 1))
        self.scores: list[torch.Tensor] | None = [] if request.wants_scores else None
        self.logits: list[torch.Tensor] | None = [] if request.wants_logits else None

    @cached_property
    def processing(self) -> Processing:
        """The request's processors, as device forms where all have one."""
        request = self.request
        forms = device_forms(request.processors, self.session.arch.vocab_size, self.capacity, self.session.device)
        return Stock(request.processors, request.prompt.shape[1]) if forms is None else Recordable(forms)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments that both kinds of choice take."""
        request = self.request
        records = {"scores": self.scores, "logits": self.logits, "criteria": request.custom_criteria}
        return {**records, "recordable": request.recordable, "device": self.session.device}

    def key(self, *settings: Hashable) -> Hashable:
        """Names a program that may serve other requests too; None if it may not."""
        if not self.request.recordable:
            return None
        return (self.capacity, *settings, *(fingerprint(processor) for processor in self.request.processors))

    def program(self, make: Callable[[], Any], key: Hashable, begin: Callable[[Any], None]) -> Program:
        """The program at the prompt's last token, the rest of the prompt decoded."""
        program = self.session.program(self.state, make, key)
        begin(program.choice)
        prompt = self.request.prompt
        if prompt.shape[1] > 1:
            self.check_length(prompt.shape[1] - 1)
            self.session.decode(self.state, prompt[:, :-1])
        program.feed(prompt[:, -1:])
        return program

    def grown(self, program: Program, make: Callable[[], Any], key: Hashable) -> Program:
        """The same program, or one of the next larger cache where the next token does not fit."""
        if self.state.length < self.state.capacity:
            return program
        self.state.reserve(1)
        larger = self.session.program(self.state, make, key)
        if larger is not program:
            larger.choice.take_over(program.choice)
            larger.feed(program.tokens)
        return larger

    def watcher(self, report: torch.Tensor) -> Watcher:
        """Requests with code of the user's in every step do not run ahead: it must not be called in vain."""
        free = self.request.known_processors and not self.request.custom_criteria
        return Watcher(report, STEPS_AHEAD if free else 0)

    @property
    def is_late(self) -> bool:
        """Whether ``max_time`` is over."""
        return self.request.deadline is not None and time.time() > self.request.deadline

    def drive(self, program: Program, make: Callable[[], Any], key: Hashable) -> tuple[Program, int]:
        """Launch steps until a report says that all is over.

        Returns:
            The program at the end, which may be one for a larger cache, and the number of steps that count.
        """
        streamer, rows = self.request.streamer, len(self.request.prompt)
        watcher, made = self.watcher(program.choice.report), 0
        for step in range(1, self.steps + 1):
            self.check_length(self.state.length + 1)
            program = self.grown(program, make, key)
            if self.is_late:
                program.choice.expired.fill_(True)
            program.launch()
            watcher.post(program.choice.report)
            for report in watcher.take(all_of_them=step == self.steps):
                made += 1
                if streamer is not None:
                    streamer.put(report[1 : 1 + rows].clone())
                if bool(report[0]):
                    return program, made
        return program, made


def choose_tokens(
    session: Session, state: DecoderState, request: Request, check_length: Callable[[int], None]
) -> Outcome:
    """Greedy search or sampling.

    Args:
        session: runs the decoder.
        state: an empty cache of R rows; afterwards it holds all tokens but the last.
        request: see `t5_trt.generation.support.Request`.
        check_length: raises if the cache must not hold so many tokens.

    Returns:
        Sequences [R, tokens] and what else was asked for.
    """
    run = _Run(session, state, request, check_length)
    rows, given = request.prompt.shape
    ending, sample = Ending(request.eos, request.pad), bool(request.config.do_sample)

    def make() -> TokenChoice:
        return TokenChoice(rows, run.capacity, run.processing, ending, do_sample=sample, **run.options)

    key = run.key("tokens", rows, ending, sample)
    program = run.program(make, key, lambda choice: choice.begin(request.prompt))
    program, made = run.drive(program, make, key)
    state.crop(given + made - 1)
    sequences = program.choice.tokens[:, : given + made].clone()
    return Outcome(sequences, _first(run.scores, made), _first(run.logits, made))


def search_beams(
    session: Session, state: DecoderState, request: Request, check_length: Callable[[int], None]
) -> Outcome:
    """Beam search or beam sampling; arguments as of `choose_tokens`, R = B * N.

    Returns:
        Sequences [B * num_return_sequences, tokens] with their scores and beam indices.
    """
    run = _Run(session, state, request, check_length)
    config = request.config
    rows, given = request.prompt.shape
    rules = beam_rules(config, request.eos)

    def make() -> BeamChoice:
        return BeamChoice(rows // rules.num_beams, run.capacity, run.processing, rules, **run.options)

    key = run.key("beams", rows, rules)
    longest = config.max_length or request.limit
    program = run.program(make, key, lambda choice: choice.begin(request.prompt, request.limit, longest))
    program, made = run.drive(program, make, key)
    state.crop(given + made - 1)
    sequences, scores, indices = program.choice.result(given, config.num_return_sequences)
    return Outcome(sequences, _first(run.scores, made), _first(run.logits, made), scores, indices)


def beam_rules(config: Any, eos: tuple[int, ...]) -> BeamRules:
    """The rules of a generation config, as ``GenerationMixin._beam_search`` reads them.

    Args:
        config: a ``GenerationConfig`` with its special tokens prepared.
        eos: tokens that end a row by a stopping criterion.
    """
    ends, pad = config._eos_token_tensor, config._pad_token_tensor
    # what stands behind the end of a row: the stock loop's `pad or eos`, by which a pad token 0 is not used
    fill = -1 if ends is None else int(pad) if pad is not None and int(pad) else int(ends[0])
    return BeamRules(
        num_beams=config.num_beams,
        candidates=max(2, 1 + (0 if ends is None else len(ends))) * config.num_beams,
        length_penalty=float(config.length_penalty),
        early_stopping=config.early_stopping,
        do_sample=bool(config.do_sample),
        eos=eos,
        fill=fill,
    )


def _first(records: list[torch.Tensor] | None, count: int) -> list[torch.Tensor] | None:
    return None if records is None else records[:count]
