from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _torch_as_found() -> Iterator[None]:
    """A run in the test's own process leaves no process group and no mode behind."""
    yield
    import torch
    import torch.distributed as dist

    torch.use_deterministic_algorithms(False)
    if dist.is_initialized():
        dist.destroy_process_group()
