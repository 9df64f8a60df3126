"""Generation settings of one request: rejects unsupported ones, and lets Transformers prepare the others.

Defaults, checks, processors and end tokens come from ``generate()`` itself, which runs up to its decode loop. So a request gets the
result of ``generate()`` alone.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import logits_process
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import BaseModelOutput

from t5_trt.errors import InputError
from t5_trt.generation.prepared import SettingsSnapshot
from t5_trt.generation.processor_forms import CAPTURABLE
from t5_trt.generation.processors import identity
from t5_trt.generation.request import Request, refusal
from t5_trt.generation.token_rules import TokenRules
from t5_trt.runtime.recently_used import keep
from t5_trt.validation import check_token_ids

#: number of prepared settings that are kept, least recently used first out
KEPT = 256
_NAMES = frozenset(vars(GenerationConfig()))
#: unsupported settings -> values with which they have no effect
_REFUSED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("output_scores", "output_logits", "output_attentions", "output_hidden_states"), (False,)),
    "return_dict_in_generate": (False,),
    "max_time": (),
    "stop_strings": (),
    "use_cache": (True,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "token_healing": (False,),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "is_assistant": (False,),
    "use_mtp": (False,),
    "penalty_alpha": (),
    "dola_layers": (),
    "diversity_penalty": (0.0,),
    "num_beam_groups": (1,),
    "constraints": (),
    "force_words_ids": (),
    "low_memory": (False,),
}
_ADVICE = {
    "max_time": "give submit() a timeout",
    "stop_strings": "read the tokens as they come, and cancel",
}
_BEAMS = (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a request's settings come to; requests with equal settings mostly share one.

    Attributes:
        prompt: the decoder's prompt, one token.
        processors: logits processors in order, without state between calls.
        rules: of the processors, where kernels know all of them.
        hidden_until: greedy search does not choose the end tokens before this length, and the processors do nothing else; 0 if they do.
        eos: tokens that end it.
        limit: largest length in tokens, with the prompt.
        do_sample: draw tokens.
        in_group: it needs several rows (beams, several results), so ``generate()`` runs it.
        rows: that it needs.
        arguments: of ``generate()``.
        choice: equal where tokens are chosen alike, whatever the lengths; None where a processor has no form for many rows.
        by_row: such forms leave a row's bits independent of other rows on a GPU, too.
    """

    prompt: tuple[int, ...]
    processors: tuple[Any, ...]
    eos: frozenset[int]
    limit: int
    do_sample: bool
    in_group: bool
    rows: int
    arguments: dict[str, Any]
    choice: str | None
    by_row: bool
    rules: TokenRules | None = None
    hidden_until: int = 0


class SettingsReader:
    """Prepares settings for one model, with a cache for equal ones.

    Args:
        model: a `TRTT5ForConditionalGeneration`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._kept: OrderedDict[str, Prepared] = OrderedDict()
        self._known = SettingsSnapshot((), ())

    def read(self, config: Any, settings: Mapping[str, Any]) -> Prepared:
        """Check and prepare. Not thread-safe.

        Args:
            config: a ``GenerationConfig``, or None for the model's.
            settings: that override it, by the names of ``GenerationConfig``.

        Raises:
            InputError: a name is no generation setting, or a setting that rows cannot serve.
            ValueError: Transformers refuses a value.
        """
        unknown = sorted(settings.keys() - _NAMES)
        if unknown:
            raise InputError(
                f"submit() got {', '.join(unknown)}; expected settings of GenerationConfig, such as max_new_tokens. "
                "Inputs are token ids and a mask of one source; processors, criteria and streamers are not taken."
            )
        key = self._key(config, settings)
        if key is None:
            return self._prepare(config, settings)
        return keep(self._kept, key, KEPT, lambda: self._prepare(config, settings))

    def _key(self, config: Any, settings: Mapping[str, Any]) -> str | None:
        """A key that is equal for equal settings and model settings; None if they cannot be compared."""
        if config is not None:
            return None
        objects = (self._model.generation_config, self._model.config)
        if not self._known.same(objects, ()):
            self._kept.clear()
            self._known = SettingsSnapshot(objects, ())
        try:
            return json.dumps(settings, sort_keys=True) if self._known.comparable else None
        except TypeError:
            return None

    def _prepare(self, config: Any, settings: Mapping[str, Any]) -> Prepared:
        _refuse(settings)
        if config is not None:
            _refuse(vars(config))
        result = {"return_dict_in_generate": False, "output_scores": False, "output_logits": False}
        arguments = {**({} if config is None else {"generation_config": config}), **settings, **result}
        request = self._request(arguments)
        _refuse(vars(request.config))
        mode = request.config.get_generation_mode()
        own = [
            *request.custom_criteria,
            *(p for p in request.processors if type(p).__module__ != logits_process.__name__),
        ]
        reason = refusal(request) or (type(own[0]).__name__ if own else None)  # a user's model may add them
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, *_BEAMS):
            reason = f"the generation mode {mode.value}"
        if reason is not None:
            raise InputError(f"the settings ask for {reason}, which requests in shared rows cannot have. {_ELSE}")
        assert request.limit is not None
        rules = _rules(request)
        vocabulary = self._model.session.arch.vocab_size  # an id outside of it would end the requests of all rows
        prompt = check_token_ids("decoder_start_token_id", request.prompt, vocabulary, request.prompt.device)
        return Prepared(
            prompt=tuple(prompt[0].tolist()),
            processors=tuple(request.processors),
            eos=frozenset(request.eos),
            limit=request.limit,
            do_sample=bool(request.config.do_sample),
            in_group=mode in _BEAMS or request.config.num_return_sequences > 1,
            rows=max(1, request.config.num_beams, request.config.num_return_sequences),
            arguments=arguments,
            choice=_choice(request),
            by_row=all(type(each) in CAPTURABLE and CAPTURABLE[type(each)].by_row for each in request.processors),
            rules=rules,
            hidden_until=_hidden_until(request, rules),
        )

    def _request(self, arguments: dict[str, Any]) -> Request:
        """The arguments that ``generate()`` passes to its decode loop, for an arbitrary source."""
        model, found = self._model, []

        def keep(
            model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
        ) -> Any:  # fmt: skip
            found.append(Request(input_ids, logits_processor, stopping_criteria, generation_config, kwargs))
            return input_ids

        source = torch.ones((1, 1), dtype=torch.int64, device=model.device)
        states: Any = torch.zeros((1, 1, model.config.d_model), device=model.device)
        GenerationMixin.generate(
            model, source, encoder_outputs=BaseModelOutput(last_hidden_state=states), custom_generate=keep, **arguments
        )
        return found[0]


def _choice(request: Request) -> str | None:
    """See `Prepared.choice`. A string, as that computes its hash once."""
    if not request.known_processors:
        return None
    return repr((bool(request.config.do_sample), *map(identity, request.processors)))


def _rules(request: Request) -> TokenRules | None:
    """See `Prepared.rules`."""
    rules = TokenRules.of(request.processors) if request.known_processors else None
    return None if rules is None or rules.front else rules


def _hidden_until(request: Request, rules: TokenRules | None) -> int:
    """See `Prepared.hidden_until`."""
    if rules is None or request.config.do_sample or rules.warps or rules.looks_back:
        return 0
    return rules.until if frozenset(rules.ends) == frozenset(request.eos) else 0


_ELSE = "Use model.generate() for it."


def _refuse(settings: Mapping[str, Any]) -> None:
    for name, neutral in _REFUSED.items():
        value = settings.get(name)
        if value is not None and value not in neutral:
            raise InputError(f"{name}={value!r} is not supported in shared rows: {_ADVICE.get(name, _ELSE)}")
