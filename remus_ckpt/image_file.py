"""An image that is filled while a stream is restored: memory may be larger than this machine's; and a sparse diff."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec.scan import filled_pages
from remus_ckpt.disk import appearing
from remus_ckpt.errors import NoCheckpoint, StoreError
from remus_ckpt.pages import PAGE_SIZE, Pages
from remus_ckpt.restorer import Checkpoint
from remus_ckpt.store.warm import MappedFile


class ImageFile(MappedFile):
    """A restorer's home that becomes an image; zero pages are holes in it."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, "output")

    def write(self, memory: Pages, pfns: NDArray[np.int64], data: Pages) -> None:
        """Write pages; zero pages only where something else was written before. Raises StoreError."""
        keep = self.has_room[pfns]
        keep[filled_pages(data)] = True
        if not keep.all():
            # If a page occurs twice, the later copy may blank the earlier one.
            keep |= np.isin(pfns, pfns[keep])
        index = np.flatnonzero(keep)
        self.write_some(pfns[index], data, index)


@contextmanager
def image_appearing(path: str | Path) -> Iterator[ImageFile]:
    """Memory in a new file of mode 0600, which replaces the path, durably, if the block succeeds.

    The block must `cut` it to its size. Raises OSError.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such directory", str(target.parent))
    with appearing(target) as descriptor:
        home = ImageFile(f"/proc/self/fd/{descriptor}")  # only `appearing` knows its name
        home.path = target
        try:
            yield home
        except StoreError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise
        finally:
            home.close()


class SparseDiff(ImageFile):
    """A restorer's home, from which a file is written that has data just for the pages that came after a checkpoint
    (specs/formats.md §11).

    since: the number of that checkpoint
    path: of an empty file for memory
    """

    def __init__(self, since: int, path: str | Path) -> None:
        super().__init__(path)
        self.path = Path(os.readlink(path)).parent  # it has no name of its own
        self._since = since
        self._came: NDArray[np.bool_] | None = None
        """bool[pages]: which came after it; None: it has not come."""

    def note(self, checkpoint: Checkpoint) -> None:
        """To be called with each checkpoint, as it is put in force."""
        if self._came is not None:
            self._came[checkpoint.pfns] = True
        elif checkpoint.epoch == self._since:
            self._came = np.zeros(len(self.has_room), dtype=bool)

    def write_diff(self, output: str, found: Checkpoint) -> None:
        """Write the file, durably, at the checkpoint in force. Raises NoCheckpoint if that is no later one, and
        OSError.
        """
        if self._came is None or found.epoch == self._since:
            raise NoCheckpoint(
                f"checkpoint {found.epoch} does not follow checkpoint {self._since} of the same stream: there is no "
                "diff between them"
            )
        edges = np.flatnonzero(np.diff(self._came, prepend=False, append=False)) * PAGE_SIZE
        with appearing(Path(output)) as descriptor:
            for start, stop in np.minimum(edges, found.memory_bytes).reshape(-1, 2).tolist():
                os.lseek(descriptor, start, os.SEEK_SET)
                while start < stop:
                    start += os.sendfile(descriptor, self.fd, start, stop - start)
            os.ftruncate(descriptor, found.memory_bytes)


@contextmanager
def sparse_diff(output: str, since: int) -> Iterator[SparseDiff]:
    """A home for `SparseDiff`: memory is in a file without a name beside the output. Raises OSError."""
    with tempfile.TemporaryFile(dir=Path(output).absolute().parent, prefix=".remus-ckpt-") as file:
        home = SparseDiff(since, f"/proc/self/fd/{file.fileno()}")
        try:
            yield home
        finally:
            home.close()
