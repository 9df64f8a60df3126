"""A file of tensors in the format of safetensors that is written one tensor after the other, and whose tensors ONNX Runtime may map itself."""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

#: bytes of the header for a tensor; it is filled up with spaces, because the tensors' sizes are known after they are written
_ENTRY = 256
#: smaller tensors are written side by side after the larger ones, so that reading them maps few pages
_SMALL = 1 << 16
_NAMES = {torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


_madvise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_DONTNEED") else None


def write_tensors(path: Path, tensors: Iterable[tuple[str, torch.Tensor]], most: int) -> None:
    """Write at most `most` tensors to a new file; a large one may be freed as soon as the next is asked for."""
    room = 8 + _ENTRY * most
    small: list[tuple[str, torch.Tensor]] = []
    entries: dict[str, Any] = {}
    with path.open("wb") as file:
        file.seek(room)

        def write(name: str, tensor: torch.Tensor) -> None:
            start = file.tell() - room
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
            place = [start, start + tensor.nbytes]
            entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}

        for name, tensor in tensors:
            if tensor.nbytes < _SMALL:
                small.append((name, tensor))
            else:
                write(name, tensor)
        for name, tensor in small:
            write(name, tensor)
        header = json.dumps(entries).encode()
        assert len(header) <= room - 8
        file.seek(0)
        file.write((room - 8).to_bytes(8, "little") + header.ljust(room - 8))


class StoredTensors(dict[str, torch.Tensor]):
    """The tensors of a file, mapped, by name. An entry that is set stands for a tensor that the file does not have.

    Args:
        path: of a file in the format of safetensors.

    Raises:
        OSError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._written = _facts(path)
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        # not safetensors' own loading, which reads the first page of each tensor, and with it up to 2 MB
        mapped = torch.from_file(str(path), shared=False, size=self._written[1], dtype=torch.uint8)
        self._places: dict[str, tuple[int, int]] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = (8 + size + each for each in entry["data_offsets"])
                super().__setitem__(name, mapped[start:end].view(_DTYPES[entry["dtype"]]).view(entry["shape"]))
                self._places[name] = (start, end - start)

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        super().__setitem__(name, tensor)
        self.written_to(name)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.written_to(name)

    def written_to(self, name: str) -> None:
        """Record that the memory of a tensor no longer holds what the file does."""
        self._places.pop(name, None)

    def give_back(self, name: str) -> None:
        """Let the system take the pages of a tensor that has been read; what reads it again maps the file again."""
        if name in self.places() and _madvise is not None:
            tensor, page = self[name], mmap.PAGESIZE
            start = -(-tensor.data_ptr() // page) * page  # whole pages: others may hold what was written to a neighbour
            end = (tensor.data_ptr() + tensor.nbytes) // page * page
            if start < end:
                _madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)

    def places(self) -> dict[str, tuple[int, int]]:
        """Offset and bytes, in the file, of each tensor that it still has; nothing once the file is gone."""
        try:
            return self._places if _facts(self.path) == self._written else {}
        except OSError:
            return {}


def _facts(path: Path) -> tuple[int, int, int]:
    info = path.stat()
    return info.st_ino, info.st_size, info.st_mtime_ns
