from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ltf.model.norm import RMSNorm


def norm(width: int, dtype: torch.dtype) -> RMSNorm:
    module = RMSNorm(width, 1e-6)
    torch.nn.init.normal_(module.weight, 1.0, 0.3, generator=torch.Generator().manual_seed(0))
    return module.to(dtype)


def test_the_norm_divides_by_the_root_mean_square() -> None:
    module = RMSNorm(4, 1e-6)
    torch.nn.init.constant_(module.weight, 2.0)
    torch.testing.assert_close(
        module(torch.tensor([3.0, -3.0, 3.0, -3.0])), torch.tensor([2.0, -2.0, 2.0, -2.0])
    )


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (2, 3, 4, 8)])
def test_its_gradients_are_those_of_small_differences(shape: tuple[int, ...]) -> None:
    module = norm(8, torch.float64)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(module, {"weight": weight}, (x,))
        return out

    assert torch.autograd.gradcheck(function, (x, module.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_gives_what_torch_gives_forward_and_backward(dtype: torch.dtype) -> None:
    module = norm(64, dtype)
    x = torch.randn(7, 3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    seen = []
    for function in (module, lambda each: F.rms_norm(each, (64,), module.weight, 1e-6)):
        each = x.clone().requires_grad_()
        module.zero_grad()
        out = function(each)
        out.square().sum().backward()
        seen.append([out.detach(), each.grad, module.weight.grad])
    torch.testing.assert_close(seen[0], seen[1])


def test_a_row_of_zeros_stays_zero_with_finite_gradients() -> None:
    module = norm(8, torch.float32)
    x = torch.zeros(3, 8, requires_grad=True)
    out = module(x)
    out.sum().backward()
    assert (out == 0).all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
