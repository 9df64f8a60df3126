"""Model sizes that kernels are compiled for, and what the assembler says of them."""

from __future__ import annotations

import re
import struct
from dataclasses import replace

from t5_trt.graph.architecture import Architecture

BASE = Architecture(
    vocab_size=32128, d_model=768, d_kv=64, num_heads=12, d_ff=3072, encoder_layers=12, decoder_layers=12, num_buckets=32,
    max_distance=128, activation="relu", gated=False, epsilon=1e-6, tied_head=True, output_scale=1.0, bias_per_layer=False,
)  # fmt: skip
GATED = replace(BASE, d_model=1024, d_ff=2816, num_heads=16, activation="gelu_new", gated=True)
WIDE = replace(BASE, d_model=1024, d_ff=16384, num_heads=32, d_kv=128)
LARGE = replace(BASE, d_model=2048, d_ff=5120, num_heads=32, activation="gelu_new", gated=True)  # Flan-T5-XL
HUGE = replace(LARGE, d_model=4096, d_ff=10240, num_heads=64)
ODD = replace(BASE, d_model=72, d_ff=200, num_heads=1, d_kv=40, vocab_size=211, activation="silu", gated=True)


def usage(log: str) -> dict[str, tuple[int, int]]:
    """Kernel -> (registers, bytes of spilled registers) out of the assembler's log."""
    found = {}
    for part in log.split("Compiling entry function")[1:]:
        name = part.split("'")[1]
        registers, spilled = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes spill stores", part)
        assert registers and spilled, part
        found[name] = (int(registers[1]), int(spilled[1]))
    return found


#: operations of sm_90, in the lowest 12 bits of an instruction: a load, the start of the next kernel, and the wait for the one before
LOAD, LETS_START, WAITS = 0x981, 0x82D, 0x82E


def operations(cubin: bytes, kernel: str) -> list[int]:
    """What a kernel's instructions do, in their order in memory: 16 bytes each in an ELF section of its own."""
    (sections,), (size, count, names) = struct.unpack_from("<40xQ", cubin), struct.unpack_from("<58xHHH", cubin)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + i * size) for i in range(count)]
    text = headers[names][4]
    for name, _, _, _, start, length in headers:
        if cubin[text + name : cubin.index(b"\0", text + name)] == f".text.{kernel}".encode():
            return [word & 0xFFF for (word,) in struct.iter_unpack("<Q8x", cubin[start : start + length])]
    raise KeyError(kernel)
