"""The weights of one model in GPU memory, shared by all of its engines."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial

import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.graph.fp16_scaling import Fp16Scaling
from t5_trt.graph.parameters import DeviceNorms, Weights, folded_part, materialize, parameters


class WeightsOn(Mapping[str, torch.Tensor]):
    """Weights on a device, each put there when it is asked for and not kept.

    Args:
        weights: state-dict key -> tensor, anywhere.
        device: of what is given.
    """

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self._weights, self._device = weights, device

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._weights[key].detach().to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class DeviceWeights:
    """Weight inputs of device graphs by name, each created at its first use. Not thread-safe.

    Args:
        arch: of the model.
        weights: state-dict key -> CPU tensor; kept.
        dtype: compute type of the engines.
        device: the GPU.
        scaling: factors to write into the weights.
    """

    def __init__(
        self,
        arch: Architecture,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        scaling: Fp16Scaling | None = None,
    ) -> None:
        self._scaling = scaling or Fp16Scaling()
        self._parameters = parameters(arch)
        self._weights = weights
        self._dtype = dtype
        self.device = device
        self._made: dict[str, torch.Tensor] = {}
        self._norms = DeviceNorms(weights, device)
        self._readers: defaultdict[str, list[str]] = defaultdict(list)  # by key of the state dict
        for name, parameter in self._parameters.items():
            for key in (*parameter.parts, *([parameter.norm] if parameter.norm else ())):
                self._readers[key].append(name)

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor of a weight input, contiguous on the device.

        Raises:
            torch.cuda.OutOfMemoryError: there is too little GPU memory; tensors that nobody else uses are freed first.
        """
        if name not in self._made:
            try:
                parameter, factor = self._parameters[name], partial(self._scaling.factor, name)
                self._made[name] = materialize(parameter, self._weights, self._dtype, self.device, factor)
            except torch.cuda.OutOfMemoryError as error:
                needed = sum(self._bytes(parameter) for parameter in self._parameters)
                self._made.clear()
                kind = str(self._dtype).removeprefix("torch.")
                raise torch.cuda.OutOfMemoryError(
                    f"the weights take {needed / 1e9:.2f} GB as {kind}: {error}"
                ) from error
        return self._made[name]

    def update(self, key: str, tensor: torch.Tensor) -> None:
        """Write a new value of a checkpoint tensor in place, where captured graphs and bound engines read it.

        Args:
            key: of the state dict; what it maps to has changed, too.
            tensor: on the device.
        """
        self._norms.forget(key)
        for name in self._readers[key]:
            if name not in self._made:
                continue
            made, parameter, factor = self._made[name], self._parameters[name], partial(self._scaling.factor, name)
            if not parameter.is_matrix:
                made.copy_(tensor * factor(key))
            elif key in parameter.parts:
                norm = self._norms.before(parameter)
                made[:, parameter.place(key)] = folded_part(parameter, tensor.float(), norm, factor(key)).t()
            else:  # the norm of all parts
                made.copy_(materialize(parameter, self._weights, self._dtype, self.device, factor))

    def share(self, name: str, tensor: torch.Tensor) -> None:
        """Use an existing tensor for `name` instead of creating a second copy."""
        self._made[name] = tensor

    @property
    def nbytes(self) -> int:
        """GPU memory used so far, in bytes."""
        return sum(tensor.nbytes for tensor in self._made.values())

    def _bytes(self, name: str) -> int:
        return math.prod(self._parameters[name].shape) * self._dtype.itemsize
