"""Hugging Face's ``generate`` with our decode loops instead of its own.

Everything before and after the loop (defaults, checks, processors, criteria, encoder) stays Transformers'. A request that
`t5_trt.generation.request` refuses runs in Transformers' loop over our forward pass.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationMixin
from transformers.generation.utils import GenerateBeamEncoderDecoderOutput, GenerateEncoderDecoderOutput

from t5_trt.compat import CACHE, takes_old_cache_names
from t5_trt.generation.decode_loop import BeamLoop, DecodeLoop, Outcome, TokenLoop
from t5_trt.generation.encoder_output import EngineEncoderOutput, recall, recall_mask, share
from t5_trt.generation.kv_cache import EngineCache
from t5_trt.generation.prepared import Prepared, PreparedRequests, request_key, step_checks
from t5_trt.generation.request import GenerationPath, Request, StepCheck, refusal
from t5_trt.modeling.forward import EngineForward
from t5_trt.modeling.generation_context import generating, generation_of
from t5_trt.modeling.inputs import INNER_VALUES
from t5_trt.modeling.runner import ModelRunner, ordinary_tensors
from t5_trt.runtime.cuda_graph import at_home
from t5_trt.validation import check_length, check_token_ids

logger = logging.getLogger("t5_trt")
#: the methods that ``generate`` consists of
_STEPS = frozenset(name for name, value in vars(GenerationMixin).items() if callable(value)) - {"generate"} | {
    "get_encoder"
}
_of_class = attrgetter(*sorted(_STEPS))
_TRAINING = "generate() in training mode runs on engines, without dropout; call model.eval() first"


class EngineGeneration:
    """`generate` of a model with a runner, over ``GenerationMixin``, whose steps it overrides."""

    if TYPE_CHECKING:
        _runner: ModelRunner
        _hf_class: Any
        _last_path: GenerationPath | None
        _forward_hooks: Any
        _forward_pre_hooks: Any
        config: Any
        generation_config: Any
        training: bool
        prepare_inputs_for_generation: Any

        @property
        def device(self) -> torch.device: ...  # noqa: D102 - see modeling/placement.py
        def get_encoder(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102 - see modeling/base.py

    def _attach(self, settings: Any) -> None:
        super()._attach(settings)  # type: ignore[misc]
        self._prepared = PreparedRequests()
        self.__dict__.setdefault("_last_path", None)

    def after_fork(self) -> None:
        """Drop state that another thread of the parent process may have been writing; see `EngineModel.after_fork`."""
        super().after_fork()  # type: ignore[misc]
        self._prepared = PreparedRequests()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = cast(
            "Any", super()
        ).__getstate__()  # the model's; Python 3.10 does not define it for every object
        return {key: value for key, value in state.items() if key != "_prepared"}

    @property
    def last_generation_path(self) -> GenerationPath | None:
        """The loop that the last ``generate()`` used, and why; None before the first call."""
        return self._last_path

    @takes_old_cache_names(past_key_values="6.0.0", cache_params="6.0.0")
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def generate(self, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's ``generate``, with all its arguments and results. Calls from several threads run one by one.

        Raises:
            InputError, StrictModeError, BackendError: as `forward`.
        """
        self._runner.notice_changes()
        given = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), inputs)
        home = getattr(given, "device", self.device)
        if home != self.device:  # inputs on another device: results are returned there
            inputs = _moved(inputs, self.device)
            kwargs = {name: _moved(value, self.device) for name, value in kwargs.items()}
        key = request_key(inputs, kwargs) if self._prepares_as_hugging_face(generation_config, args) else None
        if self.training:
            _log_once(logging.WARNING, _TRAINING)
        configs = [config for config in (generation_config, self.generation_config) if config is not None]
        rows_per_source = max(_setting(name, kwargs, configs) or 1 for name in ("num_beams", "num_return_sequences"))
        with self._runner.lock, at_home(self.device), generating(self._runner, rows_per_source, key):
            wanted = [name for name in INNER_VALUES if _setting(name, kwargs, configs)]
            wanted += ["adapter_names"] if self._runner.rows_have_adapters() else []
            if wanted:
                self._last_path = GenerationPath("reference", wanted[0])
                reference: Any = self._runner.fall_back(wanted[0])
                return _moved(reference.generate(inputs, generation_config, *args, **kwargs), home)
            known = self._prepared.find(key, *self._preparation)
            if known is not None:
                ids, checks = kwargs.get("input_ids"), step_checks(kwargs) or ()
                ids = inputs if ids is None else ids
                return _moved(self._repeat(known, ids, kwargs["attention_mask"], checks), home)
            self._last_path = GenerationPath("transformers", "this decoding method")
            return _moved(super().generate(inputs, generation_config, *args, **kwargs), home)  # type: ignore[misc]

    def _sample(
        self,
        input_ids: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        request = Request(
            input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, streamer, bool(synced_gpus)
        )
        if not self._takes(request):
            hugging_face = super()._sample  # type: ignore[misc]
            return hugging_face(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        outcome = self._first_run(TokenLoop, request)
        if streamer is not None:
            streamer.end()
        return self._returned(GenerateEncoderDecoderOutput, request, outcome)

    def _beam_search(
        self,
        input_ids: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        request = Request(
            input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, None, bool(synced_gpus)
        )
        if not self._takes(request):
            hugging_face = super()._beam_search  # type: ignore[misc]
            return hugging_face(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, **model_kwargs
            )
        outcome = self._first_run(BeamLoop, request)
        beams = {"beam_indices": outcome.beam_indices}
        if request.config.output_scores:
            beams["sequences_scores"] = outcome.sequences_scores
        return self._returned(GenerateBeamEncoderDecoderOutput, request, outcome, **beams)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> None:  # fmt: skip
        given = model_kwargs.get(CACHE)
        if given is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        else:  # cache_implementation has no effect: the engines' cache is static and grows
            model_kwargs[CACHE] = EngineCache(self._runner.architecture.decoder_layers, 0)

    def _prefill(self, input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if generation_config.prefill_chunk_size is not None:
            # Transformers' loop would cut the *encoder's* mask to the chunk and then fail; one pass takes the whole prompt
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, *args, **kwargs)  # type: ignore[misc]

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = True, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        given = model_kwargs.get("encoder_outputs")
        session = self._runner.opened()
        cross, mask = recall(given, session), recall_mask(given, model_kwargs.get("attention_mask"))
        if given is not None and expand_size > 1:  # Transformers' method writes into the caller's object
            model_kwargs["encoder_outputs"] = copy.copy(given)
        with ordinary_tensors():
            input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
                expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
            )
        if cross is not None and expand_size > 1:
            expanded = EngineEncoderOutput(**model_kwargs["encoder_outputs"])
            cross = cross.for_beams(expand_size)
            expanded.remember(cross, session, model_kwargs.get("attention_mask"), mask)
            model_kwargs["encoder_outputs"] = expanded
        return input_ids, model_kwargs

    def _takes(self, request: Request) -> bool:
        """Whether the device loop serves a request; if not, the reason is logged once."""
        reason = self._own_code() or refusal(request)
        self._last_path = GenerationPath("device" if reason is None else "transformers", reason or "")
        if reason is not None:
            _log_once(logging.INFO, f"generate() runs in Transformers' own loop, which is slower: {reason}.")
        return reason is None

    def _own_code(self) -> str | None:
        """User code that Transformers' loop would call in every step; None if there is none."""
        kind: Any = type(self)
        if kind.forward is not EngineForward.forward or "forward" in self.__dict__:
            return "forward() is not this library's"
        prepare = getattr(self.prepare_inputs_for_generation, "__func__", None)  # on the instance: peft sets it
        if prepare is not self._hf_class.prepare_inputs_for_generation:
            return "prepare_inputs_for_generation() is not Transformers'"
        hooked = self._forward_hooks or self._forward_pre_hooks
        return "the model has forward hooks" if hooked else None

    def _prepares_as_hugging_face(self, generation_config: Any, args: tuple[Any, ...]) -> bool:
        """Whether only Transformers' code prepares a call, from the model's settings and named arguments."""
        own = "_is_public" in vars(type(self)) and self.__dict__.keys().isdisjoint(_STEPS)
        return own and generation_config is None and not args and not self._own_code()

    @property
    def _preparation(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The settings that Transformers prepares a request from, and the functions that do so, which users may have replaced."""
        return (self.generation_config, self.config), _of_class(type(self))

    @torch.no_grad()
    def _repeat(
        self, known: Prepared, ids: torch.Tensor, mask: torch.Tensor, checks: Sequence[StepCheck]
    ) -> torch.Tensor:
        """Run a request with an earlier preparation: encode as Transformers does, then run the loop."""
        self._last_path = GenerationPath("device")
        wanted = {name: getattr(known.request.config, name) for name in INNER_VALUES}
        encoded = self.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True, **wanted)
        inputs = {"encoder_outputs": encoded, "attention_mask": mask}
        if known.expand > 1 and not share(encoded, self._runner.opened(), mask, known.expand):
            _, inputs = self._expand_inputs_for_generation(known.expand, **inputs)
        inputs[CACHE] = EngineCache(self._runner.architecture.decoder_layers, 0)
        return self._run_loop(known.loop, known.request.for_inputs(inputs, checks)).sequences

    def _first_run(self, loop: type[DecodeLoop], request: Request) -> Outcome:
        prompt = check_token_ids("decoder_input_ids", request.prompt, self._runner.architecture.vocab_size, self.device)
        request = replace(request, prompt=prompt)
        outcome = self._run_loop(loop, request)
        generation = generation_of(self._runner)
        if generation is not None:
            self._prepared.keep(generation.key, loop, request, *self._preparation)
        return outcome

    def _run_loop(self, loop: type[DecodeLoop], request: Request) -> Outcome:
        runner, cache, inputs = self._runner, request.cache, request.model_kwargs
        with ordinary_tensors():
            encoded, mask = inputs["encoder_outputs"], inputs.get("attention_mask")
            session = runner.open_cache(cache, encoded, mask, request.prompt)
            limit, positions = runner.settings.runtime.max_target_tokens, runner.architecture.longest_target
            fits = partial(check_length, "target", limit=limit, positions=positions)
            return loop(session, cache.state, request, fits).run()

    def _returned(self, kind: Any, request: Request, outcome: Outcome, **more: Any) -> Any:
        if not request.config.return_dict_in_generate:
            return outcome.sequences
        return kind(
            sequences=outcome.sequences,
            scores=None if outcome.scores is None else tuple(outcome.scores),
            logits=None if outcome.logits is None else tuple(outcome.logits),
            **{CACHE: request.cache},
            **more,
        )


@cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, "%s", message)


def _setting(name: str, arguments: dict[str, Any], configs: list[Any]) -> Any:
    """A setting: the argument if given, else that of the first config that has it."""
    values = (arguments.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def _moved(value: Any, device: Any) -> Any:
    """A tensor, or the tensors of a ``generate`` result, on another device; anything else unchanged."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, GenerateEncoderDecoderOutput | GenerateBeamEncoderDecoderOutput):
        for name, entry in value.items():
            if isinstance(entry, torch.Tensor):
                value[name] = entry.to(device)
            elif isinstance(entry, tuple) and all(isinstance(tensor, torch.Tensor) for tensor in entry):
                value[name] = tuple(tensor.to(device) for tensor in entry)
    return value
