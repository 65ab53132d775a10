"""Encodes dirty pages against their references: the codecs, and one way to get them.

get_codec("delta")         the June-2011 form: (offset, value) records        specs/delta.md
get_codec("rle")           the run-length form that Xen 4.2 to 4.5 shipped    specs/rle.md
get_codec("xbzrle")        QEMU's, byte-identical with its plain encoder      specs/xbzrle.md
get_codec("xbzrle-fold")   the same decoder; the encoder folds short gaps     specs/xbzrle.md §3.3
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec import kernels
from remus_ckpt.pages import PAGE_SIZE, Buffer, Pages

__all__ = ["CODECS", "Codec", "get_codec"]

CODECS = tuple(kernels.TABLE)
"""The names that `get_codec` knows."""


class Codec:
    """One page coding, run by one kernel. A call handles a batch of pages.

    name: one of `CODECS`
    kernel: the name of the kernel that runs it
    max_page_bytes: the maximum that an encoder of this coding writes for one page
    """

    def __init__(self, name: str, kernel: kernels.Kernel) -> None:
        self.name = name
        self.kernel = kernel.name
        self.max_page_bytes = kernel.max_page_bytes
        self._kernel = kernel
        self._native = kernel.native

    def __repr__(self) -> str:
        return f"<codec {self.name}, kernel {self.kernel}>"

    def encode(
        self,
        pages: Pages,
        reference: Pages,
        *,
        index: NDArray[np.integer] | None = None,
        reference_index: NDArray[np.integer] | None = None,
        full: NDArray[np.bool_] | None = None,
        update: bool = True,
        out: Buffer | None = None,
    ) -> memoryview:
        """Encode n pages against their references, in order.

        pages: uint8[…, 4096], C-contiguous
        reference: uint8[…, 4096], C-contiguous, writable if `update`
        index: integers[n], which of `pages`; by default all of them
        reference_index: integers[n], the reference of each page; −1: it has none and goes full. By default the i-th
            encoded page has the i-th reference, and there must be as many references as pages.
        full: bool[n], pages that go full whatever their reference holds
        update: also update the references, in the same pass. If a reference is listed twice, its second use sees what
            the first has left there.
        out: writable bytes to encode into, with room for n × `max_page_bytes`

        Returns the encoded bytes, back to back.
        Raises ValueError or TypeError for arrays that do not fit; nothing is changed then.
        """
        if self._native:
            # The native functions check types, lengths and numbers themselves, faster than numpy could. What they
            # refuse is converted below, or refused with a message.
            try:
                n = pages.nbytes // PAGE_SIZE if index is None else len(index)
                room_for = np.empty(n * self.max_page_bytes, dtype=np.uint8) if out is None else out
                size = self._kernel.encode(pages, index, reference, reference_index, full, update, room_for)  # type: ignore[arg-type]
                view = memoryview(room_for)
                return view[:size] if view.format == "B" and view.ndim == 1 else view.cast("B")[:size]
            except (AttributeError, TypeError, ValueError, BufferError):
                pass
        source = _as_pages(pages, "pages")
        base = _as_pages(reference, "reference", writable=update)
        picked = None if index is None else _as_index(index, len(source), "index", 0)
        n = len(source) if picked is None else len(picked)
        if reference_index is None:
            slots = None
            if len(base) != n:
                raise ValueError(f"{n} pages but {len(base)} references, and no reference_index")
        else:
            slots = _as_index(reference_index, len(base), "reference_index", -1)
            if len(slots) != n:
                raise ValueError(f"{n} pages but {len(slots)} entries in reference_index")
        whole = None
        if full is not None:
            whole = np.ascontiguousarray(full, dtype=bool).reshape(-1)
            if len(whole) != n:
                raise ValueError(f"{n} pages but {len(whole)} entries in full")
        room = n * self.max_page_bytes
        if out is None:
            target = np.empty(room, dtype=np.uint8)
        else:
            target = np.frombuffer(out, dtype=np.uint8)
            if not target.flags.writeable:
                raise ValueError("out is read-only")
            if len(target) < room:
                raise ValueError(f"out holds {len(target)} bytes; {n} pages may need {room}")
        size = self._kernel.encode(source, picked, base, slots, whole, update, target)
        return memoryview(target)[:size]

    def check(self, encoded: Buffer, n: int) -> int:
        """Walk n encoded pages and refuse anything malformed, without touching a page.

        Returns the number of bytes that the n pages take; more may follow.
        Raises Malformed, with the offset in `encoded`.
        """
        if n < 0:
            raise ValueError(f"n is {n}")
        if self._native:
            try:
                return self._kernel.check(encoded, n)  # type: ignore[arg-type]
            except (TypeError, BufferError):
                pass
        return self._kernel.check(np.frombuffer(encoded, dtype=np.uint8), n)

    def apply(
        self,
        encoded: Buffer,
        pages: Pages,
        *,
        index: NDArray[np.integer] | None = None,
        checked: int | None = None,
    ) -> int:
        """Apply encoded pages in place, in order; a page listed twice is applied twice.

        encoded: one encoded page for each of `pages`, or for each of `index`
        pages: uint8[…, 4096], C-contiguous, writable, holding what the encoder had as references
        index: integers[n], which of `pages`
        checked: what `check` returned for exactly these bytes and n pages. They are not walked again, so a wrong value
            is as bad as a wild pointer; leave it out if `check` has not run.

        Returns the number of bytes consumed.
        Raises Malformed, with the offset in `encoded`; `pages` is untouched then.
        """
        if self._native:
            try:
                return self._kernel.apply(encoded, pages, index, checked)  # type: ignore[arg-type]
            except (TypeError, ValueError, BufferError):
                pass
        target = _as_pages(pages, "pages", writable=True)
        picked = None if index is None else _as_index(index, len(target), "index", 0)
        data = np.frombuffer(encoded, dtype=np.uint8)
        if checked is not None and not 0 <= checked <= len(data):
            raise ValueError(f"checked is {checked} of {len(data)} bytes")
        return self._kernel.apply(data, target, picked, checked)


def get_codec(name: str, *, kernel: str | None = None) -> Codec:
    """The codec of that name.

    name: one of `CODECS`
    kernel: require one of `kernels.KERNELS`; by default the environment variable REMUS_CKPT_KERNEL, else the fastest
    Raises ValueError for a name or a kernel that does not exist.
    """
    return Codec(name, kernels.choose(name, kernel))


def _as_pages(array: Pages, what: str, *, writable: bool = False) -> Pages:
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape[-1:] != (PAGE_SIZE,):
        raise TypeError(
            f"{what} must be uint8[…, {PAGE_SIZE}], not {getattr(array, 'dtype', type(array).__name__)}"
            f"{list(getattr(array, 'shape', []))}"
        )
    if not array.flags.c_contiguous:
        raise ValueError(f"{what} must be C-contiguous")
    if writable and not array.flags.writeable:
        raise ValueError(f"{what} must be writable")
    return array.reshape(-1, PAGE_SIZE)


def _as_index(index: NDArray[np.integer], size: int, what: str, lowest: int) -> NDArray[np.int64]:
    numbers = np.asarray(index)
    if numbers.ndim != 1 or not (np.issubdtype(numbers.dtype, np.integer) or numbers.size == 0):
        raise TypeError(f"{what} must be a list of integers, not {numbers.dtype}{list(numbers.shape)}")
    if numbers.size and (int(numbers.min()) < lowest or int(numbers.max()) >= size):
        raise ValueError(f"{what} must lie in {lowest}…{size - 1}; it spans {numbers.min()}…{numbers.max()}")
    return np.ascontiguousarray(numbers, dtype=np.int64)
