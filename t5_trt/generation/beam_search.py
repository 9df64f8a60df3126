"""Beam search after each decoder step, by Transformers' rules, on buffers of fixed size.

The rules (which candidates are kept, when a batch entry can no longer improve, how lengths are weighted) are those of
``GenerationMixin._beam_search`` in Transformers 5; names in the comments are from there. The length is read from a tensor, and steps
after the end of the search change nothing, so that steps can be launched ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from t5_trt.generation.processors import CapturableProcessors
from t5_trt.generation.sampling import draw, pad_rows
from t5_trt.runtime import cuda_kernels
from t5_trt.runtime.session import NextStep
from t5_trt.runtime.top_tokens import largest_log_sums, largest_sums, log_softmax

_NEVER = -1.0e9  # score of a candidate that must not be chosen


@dataclass(frozen=True)
class BeamRules:
    """Settings of a beam search, as in ``GenerationConfig``.

    Attributes:
        num_beams: N.
        candidates: K, continuations considered in each step: (1 + number of eos ids) * N, at least 2 N.
        length_penalty: exponent of the length that a finished score is divided by.
        early_stopping: True, False or "never".
        do_sample: draw continuations instead of taking the best.
        orders_draws: sort drawn continuations by score; see `orders_drawn_beams`.
        eos: token ids that end a row.
        fill: token id that pads rows after their end.
    """

    num_beams: int
    candidates: int
    length_penalty: float
    early_stopping: bool | str
    do_sample: bool
    orders_draws: bool
    eos: tuple[int, ...]
    fill: int

    @property
    def hopeful(self) -> bool:
        """Whether bounds on scores use the maximum length."""
        return self.early_stopping == "never" and self.length_penalty > 0.0


class BeamSelector:
    """Keeps the N best unfinished and the N best finished rows of every batch entry.

    Args:
        batch: B; a request may use only the first entries, the others are marked as finished.
        capacity: M, tokens that a row can have, with the prompt; at least the longest that `begin` gets.
        process: of the log probabilities.
        rules: see `BeamRules`.
        device: of the buffers.

    Attributes:
        tokens: int64 [B, N, M], rows that go on.
        sequences: int64 [B, N, M], finished rows, the best first.
        beam_scores: float32 [B, N], their scores.
        beam_indices: int32 [B, N, M], the decoder row that each of their tokens came from, -1 where there is none.
        report: int64 [1 + B]: 1 once the search has ended, then 1 for each entry that is finished.
        expired: bool [1]; set from outside when time is up.
    """

    capturable = True
    takes_best = False
    moves_rows = True
    hiding = None

    def __init__(
        self,
        batch: int,
        capacity: int,
        process: CapturableProcessors,
        rules: BeamRules,
        *,
        device: torch.device,
    ) -> None:
        beams = rules.num_beams
        shape = (batch, beams, capacity)
        self.rows = batch * beams
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.sequences = torch.zeros_like(self.tokens)
        self.beam_indices = torch.zeros(shape, dtype=torch.int32, device=device)
        self.beam_scores = torch.zeros((batch, beams), dtype=torch.float32, device=device)
        self.report = torch.zeros(1 + batch, dtype=torch.int64, device=device)
        self.expired = torch.zeros(1, dtype=torch.bool, device=device)
        self._running_indices = torch.zeros_like(self.beam_indices)
        self._running_scores = torch.zeros((batch, beams), dtype=torch.float32, device=device)
        self._full = torch.zeros((batch, beams), dtype=torch.bool, device=device)  # is_sent_finished
        self._improvable = torch.ones((batch, 1), dtype=torch.bool, device=device)
        self._limits = torch.zeros(3, dtype=torch.int64, device=device)  # prompt length, max_length, longest estimate
        self.process, self._rules, self.draws = process, rules, rules.do_sample
        self._eos = torch.tensor(rules.eos, dtype=torch.int64, device=device)
        self._first = torch.arange(rules.candidates, device=device) < beams  # top_num_beam_mask
        entries = torch.arange(batch, device=device)[:, None]
        self._offset, self._candidate_offset = entries * beams, entries * rules.candidates  # of an entry's first row
        self._merged_offset = self._offset + self._candidate_offset
        self._own = torch.arange(batch * beams, device=device)
        lengths = torch.arange(capacity + 1, dtype=torch.float64)
        self._penalties = (lengths**rules.length_penalty).float().to(device)  # [M + 1], by new tokens
        # for the kernel that does a whole step on a GPU: results, and counters that are 0 between steps
        self._chosen, self._parents = torch.empty_like(self._own), torch.empty_like(self._own)
        self._counters = torch.zeros(4, dtype=torch.int32, device=device)
        self._lists: tuple[torch.Tensor, ...] | None = None
        self.mailbox = cuda_kernels.mailbox(self.report)

    def load(self, processors: Sequence[Any]) -> None:
        """See `t5_trt.runtime.session.TokenSelector.load`."""
        self.process.load(processors)

    def begin(self, prompt: torch.Tensor, limit: int, longest: int) -> None:
        """See `t5_trt.runtime.session.TokenSelector.begin`; the prompt is int64 [at most B * N, tokens]."""
        self.tokens.fill_(self._rules.fill)
        self.tokens.flatten(0, 1)[:, : prompt.shape[1]] = pad_rows(prompt, self.rows)
        self.sequences.copy_(self.tokens)
        for indices in (self.beam_indices, self._running_indices):
            indices.fill_(-1)
        self.beam_scores.fill_(_NEVER)
        self._running_scores.fill_(_NEVER)
        self._running_scores[:, 0] = 0.0  # all beams start equal: only the first one counts in the first step
        self._full.zero_()
        self._improvable.fill_(True)
        self.report.zero_()
        self.expired.zero_()
        # without a wait: the encoder may still run
        self._limits.copy_(torch.tensor([prompt.shape[1], limit, longest]), non_blocking=True)
        if self.mailbox is not None:
            self.mailbox.start_anew()
        self._end_behind(len(prompt) // self._rules.num_beams)

    def take_over(self, other: BeamSelector, rows: torch.Tensor | None = None) -> None:
        """Continue from another selector's state, with all of its batch entries or only `rows`."""
        for mine, theirs in zip(self._entries(), other._entries(), strict=True):
            mine.copy_(theirs if rows is None else theirs[pad_rows(rows, len(self.tokens))])
        self.report[:1].copy_(other.report[:1])
        self.expired.copy_(other.expired)
        self._limits.copy_(other._limits)
        if self.mailbox is not None:
            self.mailbox.start_anew()
        if rows is not None:
            self._end_behind(len(rows))

    def _end_behind(self, entries: int) -> None:
        """Mark the entries after the first `batch` as finished."""
        self._full[entries:] = True
        self._improvable[entries:] = False

    def _entries(self) -> tuple[torch.Tensor, ...]:
        """All tensors with one row for each batch entry."""
        finished = (self.sequences, self.beam_indices, self.beam_scores, self._full, self._improvable)
        return (self.tokens, self._running_indices, self._running_scores, *finished)

    def advance(
        self, logits: torch.Tensor, position: torch.Tensor, following: NextStep | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Choose the tokens at ``position + 1``.

        Args:
            logits: float32 [B * N, V].
            position: int64 [1], of the tokens that the logits follow.
            following: see `t5_trt.runtime.session.TokenSelector.advance`.

        Returns:
            The tokens, int64 [B * N], and the rows that they continue, int64 [B * N]. None if `following` was written completely.
        """
        vocabulary = logits.shape[-1]
        found = self._candidates_of_kernel(logits, position)
        if found is None:
            found = self._candidates_of_logits(logits, position)
        if found is None:
            log_probs = log_softmax(logits)
            found = self._candidates(self.process.overwrite(self.tokens.flatten(0, 1), position, log_probs))
        if self._step_of_kernel(found, position, vocabulary, following):
            return None if following is not None else (self._chosen, self._parents)
        best, places = found[:2]
        assert best is not None and places is not None
        return self._step(best, places // vocabulary, places % vocabulary, position)

    def _candidates_of_kernel(
        self, logits: torch.Tensor, position: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...] | None:
        """The candidate lists that `cuda_kernels.beam_step` reads; None if there is no kernel for them."""
        if self.draws:
            return None
        if self._lists is None:
            self._lists = cuda_kernels.beam_lists(logits, self._rules.candidates, self._rules.num_beams)
        if self._lists is None:
            return None
        scores, hiding = logits, self.process.hiding
        normalized = len(self.process) > 0 and hiding is None
        if normalized:
            log_probs = torch.nn.functional.log_softmax(logits, dim=-1)
            scores = self.process(self.tokens.flatten(0, 1), position, log_probs).contiguous()
        if not cuda_kernels.beam_candidates(scores, self._lists, position, hiding, normalized=normalized):
            return None
        return None, None, *self._lists[:2], None if normalized else self._lists[2]

    def _candidates_of_logits(
        self, logits: torch.Tensor, position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`_candidates` in one go on a CPU; None where processors need the log probabilities, or if there is no code for it."""
        process = self.process
        if self.draws or logits.device.type != "cpu" or (len(process) and process.hiding is None):
            return None
        hidden = process.hidden(position)
        return largest_log_sums(logits, self._running_scores, self._rules.candidates, below=_NEVER / 2, hidden=hidden)

    def _step(
        self, scores: torch.Tensor, beams: torch.Tensor, ids: torch.Tensor, position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Update the state with candidates, [B, K] each: their scores, the beams that they continue, their tokens."""
        place = position + 1  # cur_len
        made = place + 1 - self._limits[:1]  # new tokens, this one included
        ended = self.report[:1].bool()
        rows = beams + self._offset  # that candidates continue
        sequences = _put(_pick(self.tokens, rows), place, ids)
        indices = _put(_pick(self._running_indices, rows), place, rows.int())
        hits = self._hits(sequences, place, ids)
        # rows that go on: the N best that have not ended
        running, going = torch.add(scores, hits, alpha=_NEVER).topk(self._rules.num_beams)
        chosen = going + self._candidate_offset
        # rows that have ended: the N best of those known and the new ones
        just_ended = hits & self._first
        self._keep_best(sequences, indices, self._final_scores(scores, just_ended, made), just_ended, ended)
        self._replace(ended, (self.tokens, _pick(sequences, chosen)), (self._running_indices, _pick(indices, chosen)))
        self._replace(ended, (self._running_scores, running))
        self._replace(ended, (self._improvable, self._can_improve(made)))
        self._end(hits)
        # not `ids`: a user's criterion may have written into the sequences
        made_tokens = self.tokens.flatten(0, 1).index_select(1, place)[:, 0]
        parents = torch.where(ended, self._own, rows.gather(1, going).flatten())
        return made_tokens.clamp(min=0), parents  # rows are padded with `fill`, maybe -1

    def _hits(self, sequences: torch.Tensor, place: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Which candidates end with their new token `ids` at `place`: bool [B, K]."""
        return (place + 1 >= self._limits[1]) | self.expired | (ids[..., None] == self._eos).any(-1)

    def _step_of_kernel(
        self,
        found: tuple[torch.Tensor | None, ...],
        position: torch.Tensor,
        vocabulary: int,
        following: NextStep | None,
    ) -> bool:
        """Run the rest of `advance` as one kernel; False if there is none."""
        rules = self._rules
        running = (self.tokens, self._running_indices, self._running_scores)
        finished = (self.sequences, self.beam_indices, self.beam_scores, self._full, self._improvable)
        inputs = (self.expired, self._limits, self._penalties, self._eos, position)
        return cuda_kernels.beam_step(
            (*found, *(None,) * (5 - len(found))),
            (*running, *finished, self.report, *inputs, self._chosen, self._parents, self._counters),
            vocabulary,
            stops_early=rules.early_stopping is True,
            hopeful=rules.hopeful,
            following=following,
            mailbox=self.mailbox,
        )

    def results(self, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Finished rows, their scores and their beam indices; see the attributes."""
        return self.sequences, self.beam_scores, self.beam_indices

    def _candidates(self, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The K best continuations of each batch entry: scores, and places among all beams' tokens, [B, K] each."""
        if not self._rules.do_sample:
            return largest_sums(log_probs, self._running_scores, self._rules.candidates, below=_NEVER / 2)
        summed = (log_probs.reshape(*self._running_scores.shape, -1) + self._running_scores[..., None]).flatten(1)
        places = draw(summed, self._rules.candidates, capturable=self.capturable)
        scores = summed.gather(1, places)
        if self._rules.orders_draws:
            scores, order = scores.sort(dim=-1, descending=True)
            places = places.gather(1, order)
        return scores, places

    def _final_scores(self, scores: torch.Tensor, just_ended: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        """Scores of rows that end here, and for all others a value that never wins, [B, K]."""
        final = scores / self._penalties.index_select(0, made)
        if self._rules.early_stopping is True:
            final = final.add(self._full.all(-1, keepdim=True), alpha=_NEVER)
        return final.add(~self._improvable, alpha=_NEVER).add_(~just_ended, alpha=_NEVER)

    def _keep_best(
        self,
        sequences: torch.Tensor,
        indices: torch.Tensor,
        final: torch.Tensor,
        just_ended: torch.Tensor,
        ended: torch.Tensor,
    ) -> None:
        values, best = torch.cat((self.beam_scores, final), 1).topk(self._rules.num_beams)
        rows = best + self._merged_offset
        self._replace(
            ended,
            (self.sequences, _pick(torch.cat((self.sequences, sequences), 1), rows)),
            (self.beam_indices, _pick(torch.cat((self.beam_indices, indices), 1), rows)),
            (self.beam_scores, values),
            (self._full, torch.cat((self._full, just_ended), 1).gather(1, best)),
        )

    def _can_improve(self, made: torch.Tensor) -> torch.Tensor:
        """Bool [B, 1]: whether a running row could still beat the worst finished one (_check_early_stop_heuristic)."""
        rules = self._rules
        length = self._limits[2:] - self._limits[:1] if rules.hopeful else made
        best = self._running_scores[:, :1] / self._penalties.index_select(0, length)
        worst = torch.where(self._full, self.beam_scores.amin(1, keepdim=True), _NEVER)
        return self._improvable & (best > worst).any(-1, keepdim=True)

    def _end(self, hits: torch.Tensor) -> None:
        """Set the report once no step can change the result (_beam_search_has_unfinished_sequences)."""
        entries_over = ~self._improvable[:, 0]
        if self._rules.early_stopping is True:
            entries_over = entries_over | self._full.all(-1)
        self.report[1:] = entries_over
        goes_on = self._improvable.any() & ~hits.all()
        if self._rules.early_stopping is True:
            goes_on = goes_on & ~self._full.all()
        self.report[:1] |= ~goes_on

    def _replace(self, ended: torch.Tensor, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
        for buffer, value in pairs:
            torch.where(ended, buffer, value, out=buffer)


def finished_beams(
    sequences: torch.Tensor, scores: torch.Tensor, indices: torch.Tensor, *, given: int, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best `count` finished rows of every batch entry out of the attributes of `BeamSelector`.

    Args:
        sequences: int64 [B, N, M].
        scores: float32 [B, N].
        indices: int32 [B, N, M].
        given: tokens of the prompt.
        count: results for each entry.

    Returns:
        Sequences [B * count, given + new], scores [B * count], beam indices [B * count, new].
    """
    indices = indices[:, :count, given:].flatten(0, 1)
    made = int((indices >= 0).sum(1).max())
    rows = sequences[:, :count, : given + made].flatten(0, 1)
    return rows.clone(), scores[:, :count].flatten().clone(), indices[:, :made].clone()


def _pick(buffer: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows [B, K, M] of a buffer [B, N, M] by indices [B, K] into all of its rows."""
    return buffer.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1)


def _put(rows: torch.Tensor, place: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Write values [B, K] into rows [B, K, M] at one place."""
    return rows.index_copy_(2, place, values[..., None])
