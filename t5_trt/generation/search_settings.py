"""Settings of ``generate()`` that override a generation config with one given search.

A checkpoint's settings depend on each other (several results need beams or sampling), so a comparison that sets one must set the
others too. Each function omits settings that the installed Transformers does not have.
"""

from __future__ import annotations

from typing import Any

#: settings of what `generate` returns, and of inputs besides the sources
_PLAIN_RESULT = {
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    # faster with equal tokens, but only for one row at a time
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": None,
}
#: stopping criteria that depend on time or need a tokenizer, and other kinds of search
_PLAIN_SEARCH = {
    "max_time": None,
    "stop_strings": None,
    "num_beam_groups": None,
    "diversity_penalty": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
}


def only_tokens(config: Any, arguments: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The caller's arguments, with additions that make ``generate()`` return only rows of tokens.

    Args:
        config: the model's generation config.
        arguments: of ``generate()``.
        tokenizer: of the model, for ``stop_strings``.
    """
    config = arguments.get("generation_config") or config
    stops = arguments.get("stop_strings") or config.stop_strings
    added = {**_known(config, _PLAIN_RESULT), **({"tokenizer": tokenizer} if stops else {})}
    return {**added, **arguments, "return_dict_in_generate": False}


def one_search(config: Any, *, num_beams: int, do_sample: bool, results: int = 1) -> dict[str, Any]:
    """Arguments of one search, with the config's processors.

    Args:
        config: the model's generation config.
        num_beams: 1 is greedy search or sampling.
        do_sample: draw tokens.
        results: sequences for each source.
    """
    search = {"num_beams": num_beams, "do_sample": do_sample, "num_return_sequences": results}
    return _known(config, {**_PLAIN_RESULT, **_PLAIN_SEARCH}) | search


def length_limit(config: Any, new_tokens: int) -> dict[str, Any]:
    """Arguments that end every sequence after some new tokens, with a minimum length no larger than that.

    Args:
        config: the model's generation config.
        new_tokens: the largest number.
    """
    least = {name: getattr(config, name) for name in ("min_length", "min_new_tokens")}
    shortest = {name: min(value, new_tokens) for name, value in least.items() if value is not None}
    return {"max_new_tokens": new_tokens, "max_length": None, **shortest}


def _known(config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if hasattr(config, name)}
