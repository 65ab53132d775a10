"""Where the source of a conversion restores its memory: a file without a name, filled no earlier than it must be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.files import StreamFile, read_events, restorer_of
from remus_ckpt.image_file import ImageFile
from remus_ckpt.limits import Limits
from remus_ckpt.pages import Pages
from remus_ckpt.wire.xen.dialect import Dialect


class LateHome(ImageFile):
    """Memory that stays empty until somebody needs it, and is then read from the source once more.

    Pages of a first checkpoint pass through a conversion between streams as they come. Memory is needed only if a
    second one follows, or if the target asks for it by `need`.

    path: of an empty file
    refill: writes the pages of the first checkpoint through `put`; None: keep every page from the start
    """

    def __init__(self, path: str, refill: Callable[[LateHome], None] | None) -> None:
        super().__init__(path)
        self._refill = refill
        self.memory: Pages | None = None
        """The file as memory, once it is open."""

    def open(self, pages: int) -> Pages:
        """The file as memory of zeros."""
        self.memory = super().open(pages)
        return self.memory

    def write(self, memory: Pages, pfns: NDArray[np.int64], data: Pages) -> None:
        """Write pages, unless they can be read again."""
        if self._refill is None:
            super().write(memory, pfns, data)

    def reserve(self, pfns: NDArray[np.int64]) -> None:
        """Make sure that memory is there, and that these pages can be written to it."""
        self.need()
        super().reserve(pfns)

    def need(self) -> None:
        """Fill memory with the first checkpoint, if that was put off. Raises like reading the source did."""
        refill, self._refill = self._refill, None
        if refill is not None:
            refill(self)

    def put(self, pfns: NDArray[np.int64], data: Pages) -> None:
        """Write pages of the first checkpoint after all."""
        assert self.memory is not None
        super().write(self.memory, pfns, data)


class _Through:
    """The home of a second reading: pages go to the first one's memory."""

    def __init__(self, home: LateHome) -> None:
        self._home = home

    def open(self, pages: int) -> Pages:
        assert self._home.memory is not None
        return self._home.memory

    def write(self, memory: Pages, pfns: NDArray[np.int64], data: Pages) -> None:
        self._home.put(pfns, data)

    def reserve(self, pfns: NDArray[np.int64]) -> None:
        raise AssertionError("the first checkpoint needs no room")


def reading_again(source: str, dialect: Dialect, limits: Limits) -> Callable[[LateHome], None]:
    """What fills a home with the first checkpoint of a stream in a file, which must not change meanwhile."""

    def refill(home: LateHome) -> None:
        with StreamFile(source) as file:
            restorer = restorer_of(file, dialect, limits=limits, home=_Through(home))
            for _ in read_events(file, restorer):
                if restorer.staged is not None:
                    return

    return refill
