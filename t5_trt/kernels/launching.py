"""Loading compiled kernels by cuda.bindings, and starting them on a stream."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from t5_trt.kernels.compile import bindings, checked


class LoadedModule:
    """A cubin in the current context.

    Args:
        cubin: compiled.
        names: of its kernels.

    Attributes:
        functions: CUfunctions by name.
    """

    def __init__(self, cubin: bytes, names: Iterable[str]) -> None:
        driver = bindings("driver")
        self._module = checked(driver.cuModuleLoadData(cubin))
        self.functions = {name: checked(driver.cuModuleGetFunction(self._module, name.encode())) for name in names}

    def numbers(self, name: str) -> list[int]:
        """The int32 entries of a global array."""
        driver = bindings("driver")
        address, size = checked(driver.cuModuleGetGlobal(self._module, name.encode()), 2)
        made = (ctypes.c_int * (size // 4))()
        checked(driver.cuMemcpyDtoH(ctypes.addressof(made), address, size))
        return list(made)

    def allow_shared(self, name: str, size: int) -> None:
        """Allow launches of a kernel with that many bytes of dynamic shared memory."""
        driver = bindings("driver")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(self.functions[name], attribute, size))

    def prefer_shared(self, name: str, percent: int) -> None:
        """Ask for a division of a multiprocessor's memory between shared memory and the L1 cache while a kernel runs on it: `percent` of the most
        shared memory that there can be, or the next larger one of the sizes that the GPU has.
        """
        driver = bindings("driver")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        checked(driver.cuFuncSetAttribute(self.functions[name], attribute, percent))


def launch(
    function: Any,
    grid: tuple[int, ...],
    threads: int,
    stream: int,
    arguments: Sequence[Any],
    *,
    shared: int = 0,
    early: bool = False,
) -> None:
    """Start a kernel without waiting for it.

    Args:
        function: a CUfunction.
        grid: CTAs along up to three axes.
        threads: of a CTA.
        stream: a CUstream.
        arguments: tensors are passed by address (None as 0), ints as int32, floats as float32.
        shared: bytes of dynamic shared memory.
        early: let it begin before the previous kernel has ended (programmatic dependent launch; sm_90 and newer). It must then wait
            by itself, ``wait_for_inputs`` in ``launch.cuh``.
    """
    driver, early_start = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.hStream, config.sharedMemBytes = stream, shared
    if early:
        config.attrs, config.numAttrs = [early_start], 1
    values: list[Any] = []
    types: list[Any] = []
    for argument in arguments:
        if isinstance(argument, float):
            values.append(argument)
            types.append(ctypes.c_float)
        elif isinstance(argument, int):
            values.append(argument)
            types.append(ctypes.c_int)
        else:
            values.append(0 if argument is None else argument.data_ptr())
            types.append(ctypes.c_void_p)
    checked(driver.cuLaunchKernelEx(config, function, (tuple(values), tuple(types)), 0))


@cache
def _driver() -> tuple[Any, Any]:
    """The driver's functions, and the attribute of kernels that start early: to look both up takes longer than a launch."""
    driver = bindings("driver")
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return driver, attribute
