"""The SHA-256 of what a thread writes, computed by another thread meanwhile.

A core digests 1 to 2 GB/s, less than what a good disk takes. Digests of one file cannot be divided among
cores, but they need not stand between the writer and its disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
from torch import Tensor

SMALL = 2**16


class DigestBeside:
    """A context; `update` returns at once.

    `lasting`: contiguous CPU tensors that neither change nor go away within the context. Bytes that lie in
    their memory are read there whenever the other thread comes to them; all others are copied first.
    """

    def __init__(self, lasting: Iterable[Tensor] = ()) -> None:
        self._lasting = {t.data_ptr(): t.nbytes for t in lasting if t.device.type == "cpu"}
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._small = bytearray()
        self._last: Future[None] | None = None

    def __enter__(self) -> DigestBeside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=kind is not None)

    def update(self, data: memoryview) -> None:
        """What comes next in the file."""
        if data.nbytes <= SMALL:
            self._small += data
            if len(self._small) > SMALL:
                self._hand_over()
            return
        self._hand_over()
        self._submit(data if self._lasts(data) else bytes(data))

    def finish(self) -> str:
        """In hexadecimal; waits for the other thread."""
        self._hand_over()
        if self._last is not None:
            self._last.result()
        return self._digest.hexdigest()

    def _lasts(self, data: memoryview) -> bool:
        address = np.frombuffer(data, np.uint8).ctypes.data
        return data.nbytes <= self._lasting.get(address, 0)

    def _hand_over(self) -> None:
        if self._small:
            self._submit(bytes(self._small))
            self._small.clear()

    def _submit(self, data: bytes | memoryview) -> None:
        # One thread: in order, so that the last has ended when all have.
        self._last = self._thread.submit(self._digest.update, data)
