"""Opening the decoder's cache for an encoder output, and decoding with it."""

from __future__ import annotations

from typing import Any

import torch

from t5_trt.compat import CACHE
from t5_trt.errors import InputError
from t5_trt.generation.encoder_output import recall, recall_mask, version_of
from t5_trt.generation.kv_cache import EngineCache, read_hugging_face
from t5_trt.runtime.kv_buffers import CrossStates
from t5_trt.runtime.session import Session
from t5_trt.validation import check_decoder_mask, check_embeds, check_length, check_mask


def open_cache(session: Session, past: Any, encoder_outputs: Any, attention_mask: Any, rows: int) -> EngineCache:
    """The cache to decode with: the given one, or a new one over the encoder's K/V.

    Args:
        session: runs the decoder.
        past: an `EngineCache`; a Hugging Face cache, whose contents are copied; or None.
        encoder_outputs: first entry [B, S, E].
        attention_mask: [B, S], one row for each source or for each decoder row; None hides nothing.
        rows: R of the decoder.

    Raises:
        InputError: these do not fit each other.
    """
    layers = session.arch.decoder_layers
    cache = past if isinstance(past, EngineCache) else EngineCache(layers)
    if cache.state is None:
        own = cross = None
        if past is not None and past is not cache:
            own, cross = read_hugging_face(past, layers, session.dtype, session.device)
        cross = cross or _cross_states(session, encoder_outputs, rows)
        capacity = max(cache.capacity_tokens, 0 if own is None else own.shape[4])
        mask = recall_mask(encoder_outputs, attention_mask)  # the encoder has checked it
        if mask is None or mask.shape != (cross.batch, cross.source_length):
            mask = _source_mask(session, attention_mask, cross)
        cache.state = session.start(cross, capacity, mask)
        if mask is not None:
            cache.mask_source = version_of(attention_mask)
        if own is not None:
            cache.state.append(own)
    if cache.state.rows != rows:
        raise InputError(
            f"decoder_input_ids has {rows} rows; the cache was made for {cache.state.rows}. Start with "
            f"{CACHE}=None, or reorder the cache with batch_select_indices."
        )
    _apply_mask(session, cache, attention_mask)
    return cache


def decode(
    session: Session, cache: EngineCache, tokens: torch.Tensor, decoder_mask: Any, longest: int | None
) -> torch.Tensor:
    """Logits, float32 [R, Q, V], of tokens [R, Q] behind those in an opened cache.

    Args:
        session: runs the decoder.
        cache: Q tokens longer afterwards.
        tokens: int64.
        decoder_mask: [R, any number], see `check_decoder_mask`; None hides nothing.
        longest: tokens that a cache may hold.

    Raises:
        InputError: there are more, or the mask does not fit.
    """
    state = cache.state
    assert state is not None
    total = state.length + tokens.shape[1]
    check_length("target", total, longest, session.arch.longest_target)
    key_mask = None
    if decoder_mask is not None:
        key_mask = check_decoder_mask(decoder_mask, len(tokens), total, tokens.device)
        key_mask = None if bool(key_mask.all()) else key_mask
    return session.decode(state, tokens, key_mask)


def _cross_states(session: Session, encoder_outputs: Any, rows: int) -> CrossStates:
    cross = recall(encoder_outputs, session)
    if cross is None:
        hidden = encoder_outputs[0]
        width, device = session.arch.d_model, session.device
        cross = session.project_cross(check_embeds("encoder_outputs[0]", hidden, width, device, session.dtype))
    if cross.rows != rows:
        if cross.rows != 1:
            raise InputError(
                f"decoder_input_ids has {rows} rows and the encoder's output {cross.rows}; expected the same number."
            )
        cross = cross.for_beams(rows)
    return cross


def _source_mask(session: Session, mask: Any, cross: CrossStates) -> torch.Tensor | None:
    """`attention_mask`, checked, with one row for each source; None if it has different ones for beams of one source."""
    given = len(mask) if isinstance(mask, torch.Tensor) and mask.dim() == 2 else cross.batch
    rows = given if given in (cross.batch, cross.rows) else cross.batch
    checked = check_mask("attention_mask", mask, rows, cross.source_length, session.device)
    if rows == cross.batch:
        return checked
    grouped = checked.view(cross.batch, cross.beams, -1)
    return grouped[:, 0] if bool((grouped == grouped[:, :1]).all()) else None


def _apply_mask(session: Session, cache: EngineCache, mask: Any) -> None:
    """Bring the state's cross bias in line with `attention_mask`, doing nothing while it is the same tensor."""
    source, known = version_of(mask), cache.mask_source
    if known is not None and source is not None and known[0] is mask and known[1] == source[1]:
        return
    state = cache.state
    assert state is not None
    checked = _source_mask(session, mask, state.cross)
    if checked is None:  # rows of one source got different masks
        state.separate_sources()
        checked = _source_mask(session, mask, state.cross)
        assert checked is not None
    bias = session.cross_bias(checked, state.cross)
    if bias.shape != state.cross_bias.shape or not torch.equal(bias, state.cross_bias):
        state.hide_keys(bias)
    cache.mask_source = source
