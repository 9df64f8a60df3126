"""Low-rank factors of adapters in memory of a GPU, where a switch of adapters finds them without the host."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

from t5_trt.modeling.adapter_layers import LowRank, low_rank_update

#: states of adapters whose factors stay on the GPU
_KEPT = 8
#: kinds of states that get memory of their own: adapters of other ranks or on other matrices are another kind
_MOST_KINDS = 16


class DeviceFactors:
    """The factors of the active adapters. Equal kinds of states use the same memory.

    Args:
        layers: of peft, by the key of the weight that they change.
    """

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self._layers = layers
        self._memory: dict[Hashable, tuple[torch.Tensor, dict[str, LowRank]]] = {}
        # with the tensors that they were made of: as long as those live, no others get their addresses
        self._kept: dict[Hashable, tuple[list[torch.Tensor], torch.Tensor]] = {}
        self._current: dict[str, LowRank] = {}

    def load(self, device: torch.device) -> Hashable | None:
        """Bring the factors of the present state into their memory.

        Returns:
            What its use depends on besides the values: shapes, scales, addresses. None if an adapter has other than low-rank updates.
        """
        found = {key: low_rank_update(layer) for key, layer in self._layers.items()}
        given: dict[str, LowRank] = {key: factors for key, factors in found.items() if factors is not None}
        kind = tuple(
            (key, tuple((up.shape, down.shape, scale) for up, down, scale in own)) for key, own in given.items()
        )
        if len(given) < len(found) or (kind not in self._memory and len(self._memory) >= _MOST_KINDS):
            return None
        tensors = [tensor.detach() for own in given.values() for pair in own for tensor in pair[:2]]
        if kind not in self._memory:
            flat = torch.empty(sum(tensor.numel() for tensor in tensors), device=device)
            self._memory[kind] = flat, _views(flat, given)
        flat, self._current = self._memory[kind]
        if tensors:
            flat.copy_(self._values(tensors, device))
        return kind, flat.data_ptr()

    def __getitem__(self, key: str) -> LowRank:
        """The factors of a weight that were loaded last, float32 on the device."""
        return self._current[key]

    def _values(self, tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
        """All factors one after the other."""
        state = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
        if any(tensor.is_inference() for tensor in tensors):  # which count no versions
            return _joined(tensors, device)
        if state not in self._kept:
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[state] = tensors, _joined(tensors, device)
        return self._kept[state][1]

    def forget(self) -> None:
        """Treat all factors as changed: fused optimizers do not increment tensor versions."""
        self._kept.clear()


def _joined(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.cat([tensor.float().flatten() for tensor in tensors]).to(device)


def _views(flat: torch.Tensor, given: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The factors as parts of `flat`."""
    made: dict[str, LowRank] = {}
    place = 0

    def part(like: torch.Tensor) -> torch.Tensor:
        nonlocal place
        place += like.numel()
        return flat[place - like.numel() : place].view(like.shape)

    for key, own in given.items():
        made[key] = [(part(up), part(down), scale) for up, down, scale in own]
    return made
