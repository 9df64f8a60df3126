"""A torch reference for every kernel, under the kernel's name. Tests compare the two in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def embed(table: torch.Tensor, tokens: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Rows of the table [V, E] for tokens [R]: the residual stream [R, E]."""
    return table[tokens.long()] * scale


def normed(stream: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm of [R, E] without its weight, which is folded into the next matrices."""
    return stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + epsilon)


def project_qkv(weights: torch.Tensor, stream: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, ...]:
    """Query, key and value, [R, H * D] each, by weights [3 * H * D, E]."""
    return (normed(stream, epsilon) @ weights.t()).chunk(3, -1)


def attend_self(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """Attention of each row's query [R, H, D] over its keys and values [R, H, T, D] up to its position [R]; bias [H, distances].

    Returns:
        [R, H * D].
    """
    made = []
    for row, last in enumerate(position.tolist()):
        distance = torch.arange(last, -1, -1, device=bias.device).clamp(max=bias.shape[1] - 1)
        scores = torch.einsum("hd,htd->ht", query[row], keys[row, :, : last + 1]) + bias[:, distance]
        made.append(torch.einsum("ht,htd->hd", scores.softmax(-1), values[row, :, : last + 1]).flatten())
    return torch.stack(made)


def attend_cross(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    lengths: torch.Tensor,
    beams: int,
) -> torch.Tensor:
    """As `attend_self` over sources [B, H, S, D], which `beams` rows share, with an additive mask [B, S] and lengths [B]."""
    made = []
    for row in range(len(query)):
        source = row // beams
        count = int(lengths[source])
        scores = torch.einsum("hd,htd->ht", query[row], keys[source, :, :count]) + mask[source, :count]
        made.append(torch.einsum("ht,htd->hd", scores.softmax(-1), values[source, :, :count]).flatten())
    return torch.stack(made)


def add_attention(weights: torch.Tensor, attended: torch.Tensor, stream: torch.Tensor, scale: float) -> torch.Tensor:
    """The stream [R, E] plus ``scale`` times the product of [E, H * D] with attention's result."""
    return stream + scale * (attended @ weights.t())


def project_query(weights: torch.Tensor, stream: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The cross-attention's query [R, H * D]."""
    return normed(stream, epsilon) @ weights.t()


def feed_forward_in(
    weights: torch.Tensor, stream: torch.Tensor, epsilon: float, activation: str, *, gated: bool
) -> torch.Tensor:
    """The inside of a feed-forward layer [R, FF], by weights [FF or 2 * FF, E]."""
    return activate_inner(normed(stream, epsilon) @ weights.t(), activation, gated=gated)


def feed_forward_out(weights: torch.Tensor, inner: torch.Tensor, stream: torch.Tensor, scale: float) -> torch.Tensor:
    """The stream plus ``scale`` times the product of [E, FF] with the inside."""
    return stream + scale * (inner @ weights.t())


def output_head(weights: torch.Tensor, stream: torch.Tensor, epsilon: float, scale: float) -> torch.Tensor:
    """Logits [R, V]."""
    return normed(stream, epsilon) @ weights.t() * scale


def attend_encoder(qkv: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention of all tokens of a row to those that its mask shows; if it shows none, to all of them equally.

    Args:
        qkv: [B, S, 3 * H * D].
        mask: int64 [B, S], 0 hides a token; negative values mark places without a token.
        bias: [H, 2 * n + 1], of key - query from -n to n, and of those beyond likewise.
        heads: H.

    Returns:
        [B, S, H * D].
    """
    batch, length, columns = qkv.shape
    q, k, v = qkv.view(batch, length, 3, heads, columns // (3 * heads)).permute(2, 0, 3, 1, 4)
    steps, limit = torch.arange(length, device=qkv.device), bias.shape[1] // 2
    offsets = (steps[None] - steps[:, None]).clamp(-limit, limit) + limit
    made = []
    for row in range(batch):
        shown = mask[row] > 0
        scores = q[row] @ k[row].mT + bias[:, offsets]
        if not shown.any():
            shown, scores = mask[row] == 0, torch.zeros_like(scores)
        weights = scores.masked_fill(~shown, -torch.inf).softmax(-1)
        made.append((weights @ v[row]).transpose(0, 1).flatten(1))
    return torch.stack(made)


def attend_packed(
    qkv: torch.Tensor, mask: torch.Tensor, starts: torch.Tensor, bias: torch.Tensor, heads: int
) -> torch.Tensor:
    """As `attend_encoder` of sources that lie one behind another; what belongs to none becomes NaN.

    Args:
        qkv: [T, 3 * H * D].
        mask: int64 [T].
        starts: int64 [B + 1], the first token of each source, and behind the last token of all.
        bias: see `attend_encoder`.
        heads: H.

    Returns:
        [T, H * D].
    """
    made = qkv.new_full((len(qkv), qkv.shape[1] // 3), torch.nan)
    places = starts.tolist()
    for begin, end in pairwise(places):
        if end > begin:
            made[begin:end] = attend_encoder(qkv[None, begin:end], mask[None, begin:end], bias, heads)[0]
    return made


def add_and_norm(
    stream: torch.Tensor, branch: torch.Tensor, scale: float, epsilon: float, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream [R, E] with `scale` times a branch, and its RMSNorm with a weight [E], unless it is folded into the next matrix."""
    summed = stream + scale * branch
    return summed, normed(summed, epsilon) * (1.0 if weight is None else weight)


def activate_inner(inner: torch.Tensor, activation: str, *, gated: bool) -> torch.Tensor:
    """The inside of a feed-forward layer [R, FF], from the products of its input matrices [R, FF or 2 * FF]."""
    act = ACTIVATIONS[activation]
    if not gated:
        return act(inner)
    gate, up = inner.chunk(2, -1)
    return act(gate) * up


def split_heads(made: torch.Tensor, matrices: int, heads: int) -> torch.Tensor:
    """[B, S, matrices * H * D] as [matrices, B, H, S, D]."""
    batch, length, columns = made.shape
    return made.view(batch, length, matrices, heads, columns // (matrices * heads)).permute(2, 0, 3, 1, 4)
