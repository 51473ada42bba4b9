"""The learning rate by step, and which parameters decay."""

from __future__ import annotations

import pytest
import torch

from ltf.config.schema import Optimizer
from ltf.optim import adamw, learning_rate


def rates(steps: int, **settings: object) -> list[float]:
    optimizer = Optimizer.model_validate({"lr": 1.0, **settings})
    return [learning_rate(step, steps, optimizer) for step in range(steps)]


def test_warm_up_grows_evenly_to_the_peak_and_the_last_step_has_the_final_fraction() -> None:
    found = rates(10, warmup_steps=4, decay="linear", final_fraction=0.1)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert found[4:] == pytest.approx([0.85, 0.7, 0.55, 0.4, 0.25, 0.1])


def test_a_cosine_is_half_way_down_in_the_middle_of_the_decay() -> None:
    found = rates(100, warmup_steps=0, decay="cosine", final_fraction=0.0)
    assert found[49] == pytest.approx(0.5)
    assert found[-1] == pytest.approx(0.0)
    assert found == sorted(found, reverse=True)


def test_with_decay_steps_the_rate_stays_at_the_peak_until_them() -> None:
    found = rates(20, warmup_steps=2, decay="linear", decay_steps=5, final_fraction=0.0)
    assert set(found[1:15]) == {1.0}
    assert found[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_a_constant_rate_stays() -> None:
    assert set(rates(10, warmup_steps=0, decay="constant")) == {1.0}


def test_matrices_decay_and_vectors_do_not() -> None:
    matrix, vector = torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = adamw([("a", matrix), ("b", vector)], Optimizer(lr=0.1, weight_decay=0.5))
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((2, 2), 0.95))
    assert torch.equal(vector, torch.ones(2))
