"""Shape buckets: the engine that serves a request, and the optimization profile of an engine.

By default every axis of an engine is fixed at a power of two and requests are padded up to it: fixed shapes build in a
fraction of the time of dynamic ones on TensorRT 8.5 (41 s against more than 320 s for one encoder layer), give the best
kernels, and suit CUDA graphs. Masks make padding exact. An axis can be made dynamic instead.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from t5_trt.errors import InputError
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.signature import QUERIES, STEP, signature

#: the smallest bucket of each axis: B batch, N beams, S source, T cache, Q query positions
SMALLEST = {"B": 1, "N": 1, "S": 32, "T": 128, "Q": 8}
AXES = tuple(SMALLEST)


def power_of_two(size: int, smallest: int) -> int:
    """Round up to a power of two, at least `smallest`; all sizes are rounded by this rule."""
    return max(smallest, 1 << max(size - 1, 0).bit_length())


def bucket(axis: str, size: int) -> int:
    """The bucket of a size: the next power of two, at least the axis's smallest; beams are not rounded."""
    return size if axis == "N" else power_of_two(size, SMALLEST[axis])


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Largest sizes of one engine, by axis; those in `dynamic` may be smaller in a request.

    Attributes:
        B: batch. N: beams per batch entry. S: source tokens. T: cache tokens. Q: query positions.
        dynamic: axes that the engine takes at any size from 1 on.
    """

    B: int = 1
    N: int = 1
    S: int = 32
    T: int = 128
    Q: int = 1
    dynamic: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = set(self.dynamic) - set(AXES)
        if unknown:
            raise InputError(f"dynamic axes got {sorted(unknown)}; expected some of {', '.join(AXES)}.")
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise InputError(f"{axis} got {getattr(self, axis)}; expected at least 1.")

    def for_graph(self, graph: str) -> Shapes:
        """The same with the axes that a graph does not have set to 1, so that equal engines have equal keys."""
        used = (
            {"B", "S"}
            if graph not in (STEP, QUERIES)
            else {"B", "N", "S", "T"} | ({"Q"} if graph == QUERIES else set())
        )
        values = {axis: getattr(self, axis) if axis in used else 1 for axis in AXES}
        return Shapes(**values, dynamic=tuple(sorted(set(self.dynamic) & used)))

    def describe(self) -> str:
        """A description such as "B1 S32"."""
        return " ".join(f"{axis}{getattr(self, axis)}" for axis in AXES if getattr(self, axis) != 1 or axis == "B")

    def as_dict(self) -> dict[str, object]:
        """The values for a manifest or a key."""
        return asdict(self)


def input_shapes(graph: str, arch: Architecture, shapes: Shapes) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Optimization profile of a graph's inputs that have dynamic axes: name -> (smallest, optimal, largest)."""
    low = {axis: 1 if axis in shapes.dynamic else getattr(shapes, axis) for axis in AXES}
    high = {axis: getattr(shapes, axis) for axis in AXES}
    fixed = fixed_axes(shapes)
    return {
        tensor.name: tuple(tuple(_size(axis, sizes) for axis in tensor.axes) for sizes in (low, high, high))
        for tensor in signature(graph, arch, packed=True).inputs
        if any(isinstance(axis, str) and axis not in fixed for axis in tensor.axes)
    }


def _size(axis: str | int, sizes: dict[str, int]) -> int:
    if isinstance(axis, int):
        return axis
    if axis == "R":
        return sizes["B"] * sizes["N"]
    if axis == "K":
        return sizes["T"] + sizes["Q"]
    return sizes[axis]


def fixed_axes(shapes: Shapes) -> dict[str, int]:
    """Values of the symbolic ONNX dimensions that an engine fixes; the parser folds shape arithmetic away with them."""
    sizes = {axis: getattr(shapes, axis) for axis in AXES}
    fixed = {axis: size for axis, size in sizes.items() if axis not in shapes.dynamic and axis != "N"}
    for derived, parts in (("R", "BN"), ("K", "TQ")):
        if not set(parts) & set(shapes.dynamic):
            fixed[derived] = _size(derived, sizes)
    return fixed
