"""Weights that are bytes of a file, mapped and never written to: read without mapping them, identified without reading them.

What is mapped where, and that no page of it was written to, is what Linux says in ``/proc/self/smaps``. So writes of any kind count, through
``parameter.data`` too. On other systems no weight is known to be a file's.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from t5_trt.graph.parameters import Weights

_SMAPS = Path("/proc/self/smaps")
_HEADER = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ (\d+) *(.*)$")
#: a file whose times are closer to the present than this could be written to once more without another time: the coarsest clocks
#: of file systems count 2 s
_SETTLED_NS = 2_000_000_000
_SAMPLE = 4096


@dataclass(frozen=True)
class FileMapping:
    """Private memory with the bytes of a file.

    Attributes:
        start: the first address.
        end: behind the last one.
        offset: of `start` in the file.
        inode: of the file.
        path: of the file.
    """

    start: int
    end: int
    offset: int
    inode: int
    path: str


def unwritten_mappings(smaps: Path = _SMAPS) -> list[FileMapping]:
    """The private mappings of files in this process of which no page has been written to."""
    try:
        lines = smaps.read_bytes().splitlines()
    except OSError:
        return []
    found: list[FileMapping] = []
    mapping: FileMapping | None = None
    clean: set[bytes] = set()
    for line in lines:
        if header := _HEADER.match(line):
            start, end, modes, offset, inode, path = header.groups()
            private = modes.endswith(b"p") and path.startswith(b"/")
            numbers = (int(start, 16), int(end, 16), int(offset, 16), int(inode))
            mapping, clean = FileMapping(*numbers, os.fsdecode(path)) if private else None, set()
        elif mapping is not None and line.startswith((b"Anonymous:", b"Swap:")):
            name, count = line.split()[:2]  # own pages, in memory and swapped out
            if count == b"0":
                clean.add(name)
            if len(clean) == 2:
                found.append(mapping)
                mapping = None
    return found


class MappedWeights(Mapping[str, torch.Tensor]):
    """Some weights of a model, read from their files where memory holds nothing else. A context: it closes the files.

    Args:
        weights: state-dict key -> CPU tensor.
        keys: of those that are wanted.
        smaps: what this process has mapped.
    """

    def __init__(self, weights: Weights, keys: Collection[str], smaps: Path = _SMAPS) -> None:
        self._weights, self._keys = weights, list(keys)
        self._places: dict[str, tuple[str, int]] = {}  # path, offset
        self._files: dict[str, int] = {}  # path -> descriptor
        self._facts: dict[str, list[int]] = {}
        self._made_at = time.time_ns()
        mappings = unwritten_mappings(smaps)
        starts = [mapping.start for mapping in mappings]  # in order, as in the file
        for key in self._keys:
            tensor = weights[key]
            start = tensor.data_ptr()
            index = bisect_right(starts, start) - 1
            if index < 0 or start + tensor.nbytes > mappings[index].end or not tensor.is_contiguous():
                continue
            mapping = mappings[index]
            if self._opens(mapping):
                self._places[key] = (mapping.path, start - mapping.start + mapping.offset)

    def __enter__(self) -> MappedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __getitem__(self, key: str) -> torch.Tensor:
        tensor = self._weights[key]
        if key not in self._places:
            return tensor
        path, offset = self._places[key]
        made = torch.empty(tensor.shape, dtype=tensor.dtype)
        view = made.view(torch.uint8).numpy().data.cast("B")
        while len(view):
            count = os.preadv(self._files[path], [view], offset)
            if not count:
                return tensor  # the file is shorter now
            view, offset = view[count:], offset + count
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def identity(self) -> dict[str, object] | None:
        """A JSON value that is equal only for the same files with the same content, without reading them; None if there is none.

        It has the files' inodes, sizes and times, where each tensor lies in them, and a digest of 4 KB of each: times alone would not
        tell two images of read-only file systems apart.
        """
        if not self._keys or len(self._places) < len(self._keys):
            return None
        digest = hashlib.sha256()
        for key, (path, offset) in self._places.items():
            tensor = self._weights[key]
            digest.update(
                f"{key} {tuple(tensor.shape)} {tensor.dtype} {path} {offset}".encode(errors="surrogateescape")
            )
            middle = offset + max(tensor.nbytes - _SAMPLE, 0) // 2
            digest.update(os.pread(self._files[path], min(_SAMPLE, tensor.nbytes), middle))
        files = [[os.fsencode(path).hex(), *facts] for path, facts in sorted(self._facts.items())]
        return {"files": files, "tensors": digest.hexdigest()}

    def settled(self) -> bool:
        """Whether the files had not been written to for a while when this was made, and have not been since then."""
        unchanged = all(_facts(os.fstat(file)) == self._facts[path] for path, file in self._files.items())
        return unchanged and all(max(facts[-2:]) + _SETTLED_NS < self._made_at for facts in self._facts.values())

    def _opens(self, mapping: FileMapping) -> bool:
        """Whether the file of a mapping is still at its path; it is then open."""
        if mapping.path in self._files:
            return self._facts[mapping.path][0] == mapping.inode
        try:
            descriptor = os.open(mapping.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        info = os.fstat(descriptor)
        if info.st_ino != mapping.inode:
            os.close(descriptor)
            return False
        self._files[mapping.path], self._facts[mapping.path] = descriptor, _facts(info)
        return True


def _facts(info: os.stat_result) -> list[int]:
    return [info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]
