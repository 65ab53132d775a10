"""An image that is filled while a stream is restored: memory may be larger than this machine's."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.disk import appearing
from remus_ckpt.errors import StoreError
from remus_ckpt.pages import Pages
from remus_ckpt.store.warm import MappedFile


class ImageFile(MappedFile):
    """A restorer's home that becomes an image; zero pages are holes in it."""

    def write(self, memory: Pages, pfns: NDArray[np.int64], data: Pages) -> None:
        """Write pages; zero pages only where something else was written before. Raises StoreError."""
        keep = data.view(np.uint64).any(axis=1) | self.has_room[pfns]
        if not keep.all():
            # If a page occurs twice, the later copy may blank the earlier one.
            keep |= np.isin(pfns, pfns[keep])
            pfns, data = pfns[keep], data[keep]
        super().write(memory, pfns, data)


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
            if isinstance(error.__cause__, OSError):  # worded for the operator of a store
                raise error.__cause__ from None
            raise
        finally:
            home.close()
