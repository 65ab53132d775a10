"""Where a conversion writes: a file that appears once it is complete, a device or a pipe."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from remus_ckpt.codec.scan import filled_pages
from remus_ckpt.disk import appearing, naming_file, what_next, write_all, write_pages
from remus_ckpt.errors import RemusError, StoreError
from remus_ckpt.image import Image
from remus_ckpt.pages import PAGE_SIZE, Buffer

_COPY_BYTES = 16 << 20
_ZEROS = bytes(1 << 20)
_WINDOW_PAGES = 256
"""Pages looked at before they are written: they are still in the cache then."""


class Output:
    """Bytes in order, with holes where the output is a file.

    advance: called with the number of bytes so far
    """

    def __init__(self, fd: int, name: str, *, is_file: bool, advance: Callable[[int], None] | None = None) -> None:
        self.name = name
        self.written = 0
        """Bytes so far, holes included."""
        self._fd = fd
        self._is_file = is_file
        self._advance = advance or (lambda done: None)
        self._room = np.empty(_WINDOW_PAGES * PAGE_SIZE, dtype=np.uint8)

    @property
    def file(self) -> str | None:
        """The path of the file that is being written, which has another name yet; None for a pipe or a device."""
        return f"/proc/self/fd/{self._fd}" if self._is_file else None

    def is_at(self, fd: int) -> bool:
        """Whether a descriptor's file is the one that is being written."""
        return self._is_file and os.path.sameopenfile(fd, self._fd)

    def write(self, buffers: list[Buffer]) -> None:
        """Write all of the buffers. Raises OSError."""
        with naming_file(self.name):
            self.written += write_all(self._fd, buffers)
        self._advance(self.written)

    def skip(self, size: int) -> None:
        """Zeros: a hole in a file. Raises OSError."""
        if self._is_file and size:
            with naming_file(self.name):
                os.lseek(self._fd, size, os.SEEK_CUR)
            self.written += size
            return
        while size > 0:
            part = min(size, len(_ZEROS))
            self.write([memoryview(_ZEROS)[:part]])
            size -= part

    def write_sparse(self, data: Buffer) -> None:
        """Write bytes; of a file, pages of zeros among them become holes. Raises OSError."""
        flat = np.frombuffer(data, dtype=np.uint8)
        if not self._is_file:
            self.write([flat])
            return
        whole = len(flat) // PAGE_SIZE
        for start in range(0, whole, _WINDOW_PAGES):
            pages = flat[start * PAGE_SIZE : min(start + _WINDOW_PAGES, whole) * PAGE_SIZE].reshape(-1, PAGE_SIZE)
            filled = filled_pages(pages)
            with naming_file(self.name):
                write_pages(self._fd, pages, filled, filled, self.written)
            self.skip(pages.nbytes)
            self._advance(self.written)
        self.write([flat[whole * PAGE_SIZE :]])

    def copy_sparse(self, image: Image, start: int, stop: int) -> None:
        """Write the bytes of an image from `start` to `stop`, as `write_sparse`; its holes are not read."""
        while start < stop:
            # Holes of a few pages are read: that costs less than looking for each.
            if stop - start > len(self._room):
                found = image.data(start // PAGE_SIZE)
                first = stop if found is None else min(max(found[0] * PAGE_SIZE, start), stop)
                self.skip(first - start)
                start = first
            part = self._room[: stop - start]
            image.read_at(start, part)
            self.write_sparse(part)
            start += len(part)

    def copy(self, source: int, start: int, size: int) -> None:
        """Bytes of a file, from descriptor to descriptor. Raises OSError."""
        while size > 0:
            with naming_file(self.name):
                count = os.sendfile(self._fd, source, start, min(size, _COPY_BYTES))
            if not count:
                raise OSError(errno.EIO, "the temporary file has been truncated", self.name)
            start, size = start + count, size - count
            self.written += count
            self._advance(self.written)

    def finish(self) -> None:
        """Everything is written: a hole at the end becomes part of the file. Raises OSError."""
        if self._is_file:
            with naming_file(self.name):
                os.ftruncate(self._fd, self.written)


@contextmanager
def output_to(path: str, advance: Callable[[int], None] | None = None) -> Iterator[Output]:
    """An output to a file of mode 0600, which appears, durably, if the block succeeds; to a device; or, with "-", to
    standard output. Raises OSError.
    """
    with ExitStack() as stack:
        if path == "-":
            sys.stdout.flush()
            yield Output(sys.stdout.fileno(), "standard output", is_file=False, advance=advance)
        elif os.path.exists(path) and not os.path.isfile(path):
            device = stack.enter_context(open(path, "wb", buffering=0))
            yield Output(device.fileno(), path, is_file=False, advance=advance)
        else:
            target = Path(path)
            if not target.parent.is_dir():
                raise FileNotFoundError(errno.ENOENT, "there is no such directory", str(target.parent))
            yield Output(stack.enter_context(appearing(target)), path, is_file=True, advance=advance)


@contextmanager
def scratch_beside(path: str) -> Iterator[str]:
    """The path of an empty file without a name, on the file system of an output, or in the temporary directory."""
    is_file = path != "-" and (not os.path.exists(path) or os.path.isfile(path))
    folder = os.path.dirname(os.path.abspath(path)) if is_file else None
    with tempfile.TemporaryFile(dir=folder, prefix=".remus-convert.") as file, naming_folder(folder):
        yield f"/proc/self/fd/{file.fileno()}"


@contextmanager
def naming_folder(folder: str | Path | None) -> Iterator[None]:
    """What is wrong with a temporary file is told with its folder: its own name is nobody's business."""
    try:
        yield
    except StoreError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        place = tempfile.gettempdir() if folder is None else folder
        reason = f"{error.__cause__.strerror}{what_next(error.__cause__, 'output')}"
        raise RemusError(f"{place}: a temporary file for the memory: {reason}") from error
