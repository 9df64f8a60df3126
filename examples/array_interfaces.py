"""Arrays of other libraries in and out without a copy: NumPy, CuPy and PyCUDA share memory with torch tensors.

    python examples/array_interfaces.py               # everything that is installed and has a device here
    python examples/array_interfaces.py --only numpy

The library itself needs no PyCUDA. torch owns the CUDA context, the streams and the memory; t5_trt gives TensorRT the
addresses of torch tensors. Other libraries reach the same memory in two ways:

- DLPack (NumPy, CuPy): torch.from_dlpack(array) and cupy.from_dlpack(tensor). Streams are put in order by the protocol.
- __cuda_array_interface__ (CuPy, PyCUDA): torch.as_tensor(array, device="cuda") and the address of a tensor. torch
  waits for no stream here, so the program has to.

CI runs the NumPy part only, because it has no GPU. The CuPy and PyCUDA parts need the package and an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from t5_trt import TRTT5ForConditionalGeneration

SHIPPED = Path(__file__).resolve().parent / "kana_romaji"
TEXT = "わたしは コーヒーを のみます。"


def run(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Generated tokens and the encoder's states, on the device of the ids."""
    mask = torch.ones_like(ids)
    tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=96)
    with torch.no_grad():
        states = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return tokens, states.to(ids.device)  # no copy where the model runs there


def with_numpy(model: Any, ids: np.ndarray) -> np.ndarray:
    """NumPy through DLPack, on the CPU."""
    tensor = torch.from_dlpack(ids)
    tokens, states = run(model, tensor)
    array, out = np.from_dlpack(states), np.from_dlpack(tokens)
    print(f"numpy in: same memory {tensor.data_ptr() == ids.ctypes.data}")
    print(f"numpy out: {array.dtype} {array.shape}, same memory {array.ctypes.data == states.data_ptr()}")
    return out


def with_cupy(model: Any, ids: np.ndarray) -> np.ndarray:
    """CuPy through DLPack, on the GPU."""
    import cupy

    on_gpu = cupy.asarray(ids)
    tensor = torch.from_dlpack(on_gpu)
    tokens, states = run(model, tensor)
    array, out = cupy.from_dlpack(states), cupy.from_dlpack(tokens)
    print(f"cupy in: same memory {tensor.data_ptr() == on_gpu.data.ptr}")
    print(f"cupy out: {array.dtype} {array.shape}, same memory {array.data.ptr == states.data_ptr()}")
    return cupy.asnumpy(out)


def with_pycuda(model: Any, ids: np.ndarray) -> np.ndarray:
    """PyCUDA through __cuda_array_interface__ and addresses, on the GPU."""
    # torch's context; pycuda.autoinit would make another one
    import pycuda.autoprimaryctx  # noqa: F401
    from pycuda import driver, gpuarray

    on_gpu = gpuarray.to_gpu(ids)
    driver.Context.synchronize()
    tensor = torch.as_tensor(on_gpu, device="cuda")
    tokens, states = run(model, tensor)
    states, tokens = states.contiguous(), tokens.contiguous()
    torch.cuda.synchronize()
    # base keeps the tensor alive as long as the array
    dtype = np.dtype(str(states.dtype).removeprefix("torch."))
    array = gpuarray.GPUArray(tuple(states.shape), dtype, gpudata=states.data_ptr(), base=states)
    out = gpuarray.GPUArray(tuple(tokens.shape), np.int64, gpudata=tokens.data_ptr(), base=tokens)
    print(f"pycuda in: same memory {tensor.data_ptr() == int(on_gpu.gpudata)}")
    print(f"pycuda out: {array.dtype} {array.shape}, same memory {int(array.gpudata) == states.data_ptr()}")
    return out.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = {"numpy": with_numpy, "cupy": with_cupy, "pycuda": with_pycuda}
    parser.add_argument("--only", choices=list(ways))
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED)
    ids = np.array(tokenizer([TEXT])["input_ids"], dtype=np.int64)
    for name in [options.only] if options.only else ways:
        if name != "numpy" and (importlib.util.find_spec(name) is None or not torch.cuda.is_available()):
            print(f"{name}: left out, it needs the package {name} and an NVIDIA GPU")
            continue
        made = ways[name](model, ids)
        print(f"{name}: {tokenizer.decode(made[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
