"""What several test files share: arguments of generate(), processors, user code, and changes of a model's weights."""

from __future__ import annotations

from collections import deque
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)
from transformers.generation import logits_process as transformers_processors
from transformers.generation.streamers import BaseStreamer

from t5_trt.generation.processor_forms import CAPTURABLE
from t5_trt.generation.processors import CapturableProcessors
from tests.conftest import pair_of
from tests.tiny_models import VOCAB, batch
from tests.tolerances import LOGITS_ATOL

SCORES = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


class PreferEven(LogitsProcessor):
    """Adds 3 to the logits of even ids."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        bonus = torch.zeros_like(scores)
        bonus[:, ::2] = 3.0
        return scores + bonus


class StopOnMultipleOf(StoppingCriteria):
    """Ends a row when its last id is a multiple of a number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return (input_ids[:, -1] % self.number == 0) & (input_ids.shape[1] > 3)


def only_some(batch_id: int, ids: torch.Tensor) -> list[int]:
    """Ids that a prefix constraint allows: they depend on the row and on the last token."""
    start = 2 + (batch_id * 17 + int(ids[-1])) % 90
    return list(range(start, start + 60))


def prompt(rows: int, tokens: int, seed: int = 3) -> torch.Tensor:
    ids = torch.randint(2, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return torch.cat((torch.zeros(rows, 1, dtype=torch.long), ids), 1)


#: name -> arguments of generate(), beside max_new_tokens=12
CORE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy with scores": {**SCORES},
    "greedy, no cache": {"use_cache": False},
    "greedy past two buckets": {"max_new_tokens": 150, "min_new_tokens": 150},
    "sampling": {"do_sample": True},
    "sampling, several": {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
    "beams": {"num_beams": 4},
    "beams with scores": {"num_beams": 3, "num_return_sequences": 3, **SCORES},
    "beam sampling": {"num_beams": 3, "do_sample": True, "top_k": 20},
    "prompt": {"decoder_input_ids": prompt(3, 5)},
    "min length": {"min_new_tokens": 12},
}

MORE: dict[str, dict[str, Any]] = {
    "max length": {"max_length": 7, "max_new_tokens": None},
    "min and max length": {"min_length": 6, "max_length": 9, "max_new_tokens": None},
    "no limit given": {"max_new_tokens": None},
    "temperature": {"do_sample": True, "temperature": 0.5},
    "hot": {"do_sample": True, "temperature": 2.5, "top_k": 0},
    "top-k": {"do_sample": True, "top_k": 5},
    "top-p": {"do_sample": True, "top_p": 0.6, "top_k": 0},
    "min-p": {"do_sample": True, "min_p": 0.05, "top_k": 0},
    "typical-p": {"do_sample": True, "typical_p": 0.7, "top_k": 0},
    "epsilon cutoff": {"do_sample": True, "epsilon_cutoff": 0.01, "top_k": 0},
    "eta cutoff": {"do_sample": True, "eta_cutoff": 0.01, "top_k": 0},
    "top-h": {"do_sample": True, "top_h": 0.5, "top_k": 0},
    "all warpers": {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, **SCORES},
    "sampling with scores": {"do_sample": True, "num_return_sequences": 2, **SCORES},
    "renormalized": {"do_sample": True, "top_k": 10, "renormalize_logits": True, **SCORES},
    "repetition penalty": {"repetition_penalty": 1.7},
    "repetition reward": {"repetition_penalty": 0.8, "min_new_tokens": 12},
    "encoder repetition penalty": {"encoder_repetition_penalty": 1.8},
    "no repeated bigram": {"no_repeat_ngram_size": 2, "min_new_tokens": 12},
    "no repeated token": {"no_repeat_ngram_size": 1, "min_new_tokens": 12},
    "no source bigram": {"encoder_no_repeat_ngram_size": 1},
    "forced bos": {"forced_bos_token_id": 17},
    "forced eos": {"forced_eos_token_id": 1},
    "suppressed": {"suppress_tokens": list(range(2, 120))},
    "suppressed at first": {"begin_suppress_tokens": list(range(2, 120))},
    "bad words": {"bad_words_ids": [[5], [7], [40, 41], [100, 3, 9]]},
    "sequence bias": {"sequence_bias": [[[9], 4.0], [[10, 11], -6.0]]},
    "decaying length": {"exponential_decay_length_penalty": (3, 1.8)},
    "invalid values removed": {"remove_invalid_values": True},
    "several ends": {"eos_token_id": [1, 5, 9, 20, 33, 60, 90, 120, 150]},
    "another padding": {"pad_token_id": 3, "eos_token_id": [1, 5, 9, 20, 33, 60, 90, 120, 150]},
    "another start": {"decoder_start_token_id": 8},
    "watermark": {"watermarking_config": {"bias": 2.5, "seeding_scheme": "selfhash"}},
    "guidance": {"guidance_scale": 1.0},
    "two beams, many results": {"num_beams": 5, "num_return_sequences": 5},
    "short preferred": {"num_beams": 4, "length_penalty": -1.5},
    "long preferred": {"num_beams": 4, "length_penalty": 2.0},
    "no length penalty": {"num_beams": 4, "length_penalty": 0.0},
    "early stopping": {"num_beams": 4, "early_stopping": True},
    "never early": {"num_beams": 4, "early_stopping": "never", "length_penalty": 0.5},
    "never early, short": {"num_beams": 4, "early_stopping": "never", "length_penalty": -0.5},
    "beams, min length": {"num_beams": 3, "min_new_tokens": 8},
    "beams, no repeat": {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
    "beams, no cache": {"num_beams": 3, "use_cache": False},
    "beams, bad words": {"num_beams": 3, "bad_words_ids": [[5], [7], [40, 41]]},
    "beams, several ends": {"num_beams": 4, "eos_token_id": [1, 5, 9, 20, 33, 60, 90, 120, 150]},
    "beams, prompt": {"num_beams": 3, "decoder_input_ids": prompt(3, 4)},
    "beams, long": {"num_beams": 2, "max_new_tokens": 90, "min_new_tokens": 90},
    "beam sampling, warm": {"num_beams": 4, "do_sample": True, "temperature": 1.7, "top_p": 0.9, "top_k": 0},
    "beam sampling, several": {"num_beams": 4, "do_sample": True, "num_return_sequences": 2, **SCORES},
    "beams, never, scores": {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0, **SCORES},
    "long prompt": {"decoder_input_ids": prompt(3, 70)},
    "prompt and mask": {
        "decoder_input_ids": prompt(3, 5),
        "decoder_attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]]),
    },
    "prompt, sampling": {"decoder_input_ids": prompt(3, 3), "do_sample": True, "num_return_sequences": 2},
    "static cache wished": {"cache_implementation": "static", "disable_compile": True},
    "dynamic cache wished": {"cache_implementation": "dynamic"},
    "processor": {"logits_processor": LogitsProcessorList([PreferEven()])},
    "processors, beams": {"logits_processor": LogitsProcessorList([PreferEven()]), "num_beams": 3},
    "library processors": {
        "logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(9, 1), TemperatureLogitsWarper(0.7)])
    },
    "criterion": {"stopping_criteria": StoppingCriteriaList([StopOnMultipleOf(3)]), "min_new_tokens": 12},
    "criterion, beams": {"stopping_criteria": StoppingCriteriaList([StopOnMultipleOf(5)]), "num_beams": 3},
    "ample time": {"max_time": 60.0, "stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(90.0)])},
    "prefix constraint": {"prefix_allowed_tokens_fn": only_some},
    "prefix constraint, beams": {"prefix_allowed_tokens_fn": only_some, "num_beams": 3},
    "config object": {"generation_config": GenerationConfig(num_beams=2, no_repeat_ngram_size=3, max_new_tokens=9)},
    "low memory": {"num_beams": 2, "low_memory": None},
}

#: argument sets that Transformers' own loop must run, with the reason that is given
OTHER_LOOP = {
    "greedy, no cache": "use_cache=False",
    "beams, no cache": "use_cache=False",
    "prompt and mask": "a decoder_attention_mask that hides tokens",
}


def run(model: Any, arguments: dict[str, Any], seed: int = 11) -> Any:
    torch.manual_seed(seed)
    return model.generate(**batch(), **{"max_new_tokens": 12, **arguments})


@cache
def hugging_face_result(name: str) -> Any:
    """What the Hugging Face model of T5 v1.1 gives in `run` for arguments of `CORE` and `MORE`; computed once per process."""
    return run(pair_of("t5-v1.1")[0], {**CORE, **MORE}[name])


def assert_same(ours: Any, expected: Any, atol: float = LOGITS_ATOL) -> None:
    if isinstance(expected, torch.Tensor):
        assert ours.tolist() == expected.tolist()
        return
    assert ours.sequences.tolist() == expected.sequences.tolist()
    assert set(ours.keys()) == set(expected.keys())
    for name in ("scores", "logits"):
        for left, right in zip(ours[name], expected[name], strict=True):
            assert torch.equal(left.isinf(), right.isinf())
            torch.testing.assert_close(left, right, atol=atol, rtol=1e-5)
    if "sequences_scores" in expected:
        torch.testing.assert_close(ours.sequences_scores, expected.sequences_scores, atol=atol, rtol=1e-5)
        assert ours.beam_indices.tolist() == expected.beam_indices.tolist()


#: end tokens by which twelve rows end at very different times
ENDS = [1, 8, 27, 34, 67, 69, 82, 88, 107, 122, 184, 189, 192, 199, 205]

PROCESSORS: list[LogitsProcessor] = [
    transformers_processors.TemperatureLogitsWarper(0.7),
    transformers_processors.TopKLogitsWarper(7),
    transformers_processors.TopPLogitsWarper(0.6),
    transformers_processors.MinPLogitsWarper(0.1),
    transformers_processors.TypicalLogitsWarper(0.5),
    transformers_processors.EpsilonLogitsWarper(0.01),
    transformers_processors.InfNanRemoveLogitsProcessor(),
    transformers_processors.LogitNormalization(),
    transformers_processors.MinLengthLogitsProcessor(5, [1, 4]),
    transformers_processors.MinNewTokensLengthLogitsProcessor(3, 4, 1),
    transformers_processors.SuppressTokensLogitsProcessor([3, 50, 7]),
    transformers_processors.SuppressTokensAtBeginLogitsProcessor([3, 50, 7], 4),
    transformers_processors.ForcedBOSTokenLogitsProcessor(17),
    transformers_processors.ForcedEOSTokenLogitsProcessor(12, [1, 4]),
    transformers_processors.RepetitionPenaltyLogitsProcessor(1.7),
    *(transformers_processors.NoRepeatNGramLogitsProcessor(size) for size in (1, 2, 3, 40)),
    transformers_processors.SequenceBiasLogitsProcessor([[[9], 4.0], [[2, 3], -6.0], [[3, 2], 1.5], [[2, 3, 2], 2.0]]),
    transformers_processors.NoBadWordsLogitsProcessor([[2], [3, 2], [2, 2, 3], [0, 2]], 1),
    transformers_processors.ExponentialDecayLengthPenalty((2, 1.3), 1, 1),
]

#: the same classes with other numbers, which a captured step reads from memory
OTHER_NUMBERS: list[LogitsProcessor] = [
    transformers_processors.TemperatureLogitsWarper(1.3),
    transformers_processors.TopPLogitsWarper(0.9),
    transformers_processors.MinPLogitsWarper(0.03),
    transformers_processors.TypicalLogitsWarper(0.8),
    transformers_processors.EpsilonLogitsWarper(0.003),
    transformers_processors.MinLengthLogitsProcessor(9, [1, 4]),
    transformers_processors.MinNewTokensLengthLogitsProcessor(3, 7, 1),
    transformers_processors.ForcedEOSTokenLogitsProcessor(7, [1, 4]),
    transformers_processors.RepetitionPenaltyLogitsProcessor(0.6),
]


def same_values(process: CapturableProcessors, processor: Any, device: str) -> bool:
    """Compare with the Hugging Face class at every length of a buffer whose later part holds tokens that must not count.

    Returns:
        Whether any score was changed.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4, (6, 32), generator=generator).to(device)  # few kinds: n-grams repeat
    scores = 3 * torch.randn(6, VOCAB, generator=generator)
    scores[2, 30:60] = -torch.inf
    scores, changed = scores.to(device), False
    for length in range(1, 20):
        expected = processor(tokens[:, :length], scores.clone())
        got = process(tokens, torch.tensor([length - 1], device=device), scores.clone())
        assert torch.equal(got, expected), length
        changed |= not torch.equal(got, scores)
        if CAPTURABLE[type(processor)].by_row or device == "cpu":  # rows of a server have lengths of their own
            own = [1 + (length + 5 * row) % 20 for row in range(6)]
            alone = [processor(tokens[row : row + 1, :n], scores[row : row + 1].clone()) for row, n in enumerate(own)]
            got = process(tokens, torch.tensor(own, device=device)[:, None] - 1, scores.clone())
            assert torch.equal(got, torch.cat(alone)), own
    return changed


class LateWatcher:
    """Hands out reports four steps late, as on a GPU."""

    def __init__(self, selector: Any, ahead: int) -> None:
        self.waiting: deque[torch.Tensor] = deque()
        self.ahead = ahead

    def post(self, selector: Any, position: int) -> None:
        self.waiting.append(selector.report.clone())

    def take(self, *, all_of_them: bool = False) -> list[torch.Tensor]:
        keep = 0 if all_of_them else self.ahead
        return [self.waiting.popleft() for _ in range(len(self.waiting) - keep)]


class Recorder(BaseStreamer):
    """Keeps what it is handed."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


LABELS = torch.tensor([[5, 6, 7]] * 3)


def scale_weights(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def training_step(model: Any) -> None:
    """As the engines' session is open: a training step between two evaluations."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.zero_grad()
    (model(**batch(), labels=LABELS).loss * 3).backward()
    optimizer.step()
    model.eval()


def exchange_head(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().roll(1, 0))


def write_data_of_head(model: Any) -> None:
    model.lm_head.weight.data = model.lm_head.weight.detach().roll(1, 0)


def scale_row(model: Any) -> None:
    with torch.no_grad():
        model.shared.weight[batch()["input_ids"][0, 0]] *= -3


def load_decoder(model: Any) -> None:
    model.decoder.load_state_dict({name: t * 1.3 for name, t in model.decoder.state_dict().items()})
