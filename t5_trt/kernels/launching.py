"""Starting a kernel of cuda.bindings on a stream."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from t5_trt.kernels.compile import bindings, checked


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
        early: let it begin before the kernel before it has ended (programmatic dependent launch; sm_90 and newer). It must then wait
            by itself, ``wait_for_inputs`` in ``launch.cuh``.
    """
    driver = bindings("driver")
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.hStream, config.sharedMemBytes = stream, shared
    if early:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
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
