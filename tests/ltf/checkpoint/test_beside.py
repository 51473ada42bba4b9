from __future__ import annotations

import hashlib
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ltf.checkpoint.beside import SMALL, DigestBeside


def memory(tensor: Tensor) -> memoryview:
    return tensor.numpy().data.cast("B")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(0, 300), st.integers(SMALL - 2, SMALL + 2), st.just(3 * SMALL)), max_size=9
    )
)
def test_the_digest_is_that_of_all_bytes_in_order_whatever_the_sizes_of_the_writes(sizes: list[int]) -> None:
    blocks = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    with DigestBeside() as digest:
        for block in blocks:
            digest.update(memoryview(block))
        assert digest.finish() == hashlib.sha256(b"".join(blocks)).hexdigest()


def test_bytes_that_the_writer_uses_again_are_digested_as_they_were() -> None:
    reused = bytearray(b"\1" * 2 * SMALL)
    with DigestBeside() as digest:
        digest.update(memoryview(reused))
        reused[:] = b"\2" * len(reused)
        digest.update(memoryview(reused))
        assert digest.finish() == hashlib.sha256(b"\1" * 2 * SMALL + b"\2" * 2 * SMALL).hexdigest()


def test_tensors_that_last_are_read_where_they_are_and_views_of_them_too() -> None:
    lasting = torch.arange(SMALL, dtype=torch.int64)
    expected = hashlib.sha256(memory(lasting)).hexdigest()
    with DigestBeside([lasting]) as digest:
        digest.update(memory(lasting)[: SMALL * 4])
        digest.update(memory(lasting)[SMALL * 4 :])
        assert digest.finish() == expected


def test_an_error_of_the_writer_ends_the_thread_and_goes_on() -> None:
    before = threading.active_count()

    def write() -> None:
        with DigestBeside() as digest:
            digest.update(memoryview(b"\0" * 2 * SMALL))
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write()
    assert threading.active_count() == before
