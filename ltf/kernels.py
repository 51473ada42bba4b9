"""Which of several kernels for one operator torch is to use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel

from ltf.config.schema import AttentionKernel, ExpertsKernel
from ltf.model.experts import looped

BACKENDS = {
    AttentionKernel.MATH: SDPBackend.MATH,
    AttentionKernel.EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
    AttentionKernel.FLASH: SDPBackend.FLASH_ATTENTION,
    AttentionKernel.CUDNN: SDPBackend.CUDNN_ATTENTION,
}


@contextmanager
def chosen(attention: AttentionKernel, experts: ExpertsKernel) -> Iterator[None]:
    """Forward passes in here use these; a backward pass uses what its forward pass did.

    Attention raises RuntimeError where the kernel does not exist for the device, dtype or shape. For the
    whole process, not for a thread.
    """
    with ExitStack() as stack:
        if attention is not AttentionKernel.AUTO:
            stack.enter_context(sdpa_kernel(BACKENDS[attention]))
        if experts is ExpertsKernel.LOOP:
            stack.enter_context(looped())
        yield
