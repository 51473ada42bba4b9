"""Clean numbers pass; every planted fault is seen and the operator that has it is named."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from ltf.config.schema import AttentionKernel, Config, Data, Dtype, ExpertsKernel, Optimizer, Precision
from ltf.model.args import ModelArgs, MoEArgs
from ltf.numerics import candidates, shape
from ltf.numerics.candidates import Candidate
from ltf.numerics.command import main, validate
from ltf.numerics.compare import Quantity, Stage, difference
from ltf.numerics.report import json_of, text
from ltf.numerics.trial import Around, Reference, attempt
from tests.ltf.model.shapes import DENSE, MOE
from tests.ltf.numerics import faults

CPU = torch.device("cpu")
FP32, BF16 = Candidate(Dtype.FP32), Candidate(Dtype.BF16)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(model: ModelArgs = MOE, **precision: object) -> Config:
    return Config(
        model=model,
        data=Data(seq_len=16),
        optimizer=Optimizer(lr=1e-3),
        precision=Precision.model_validate(precision),
    )


@cache
def reference(model: ModelArgs = MOE, steps: int = 10) -> Reference:
    args = shape.small(model)
    asked = config(model)
    return Reference(args, shape.texts(asked, args, steps + 1), asked.optimizer, seed=0)


SHARED = replace(
    MOE,
    ffn_width=48,
    tied_embeddings=True,
    qk_norm=False,
    moe=MoEArgs(8, 1, 24, shared_experts=1, dense_layers=1, renormalise=False, z_coefficient=1e-3),
)


@pytest.mark.parametrize("candidate", [FP32, BF16], ids=lambda one: one.name)
@pytest.mark.parametrize("model", [MOE, DENSE, SHARED], ids=["experts", "dense", "dense then shared"])
def test_clean_numbers_pass(model: ModelArgs, candidate: Candidate) -> None:
    trial = attempt(reference(model), candidate, CPU)
    assert [row for row in trial.rows if not row.passed] == []
    assert trial.passed
    assert trial.first is None
    assert {row.stage for row in trial.rows} == set(Stage)


def test_every_operator_and_every_parameter_is_compared() -> None:
    trial = attempt(reference(), FP32, CPU)
    isolated = {(row.operator, row.quantity) for row in trial.rows if row.stage is Stage.ISOLATED}
    attention = ["q", "k", "v", "q_norm", "k_norm", "rope", "kernel", "o"]
    for operator in [
        "embed", "norm", "lm_head", "logits", "loss", "layers.0.attention_norm", "layers.0.ffn_norm",
        "layers.0.ffn.router", "layers.0.ffn.experts", "layers.0.ffn.combine", "layers.0.ffn.residual",
        *(f"layers.0.attention.{name}" for name in attention),
    ]:  # fmt: skip
        assert (operator, Quantity.OUTPUT) in isolated, operator
    for operator in ["layers.0.attention.q", "layers.0.ffn.router", "layers.0.ffn.experts", "lm_head"]:
        assert (operator, Quantity.INPUT_GRADIENT) in isolated, operator
        assert (operator, Quantity.WEIGHT_GRADIENT) in isolated, operator
    updates = [row for row in trial.rows if row.quantity is Quantity.UPDATE]
    assert len(updates) == len(reference().steps.updates)


PLANTED: list[tuple[Around, str, Quantity | None]] = [
    (faults.scaled_attention_gradient, "layers.1.attention.kernel", Quantity.INPUT_GRADIENT),
    (faults.biased_layer_norm, "layers.1.attention_norm", Quantity.OUTPUT),
    (faults.dropped_columns, "layers.0.attention.o", Quantity.OUTPUT),
    (faults.router_in_bf16, "layers.0.ffn.router", Quantity.OUTPUT),
    (faults.dropped_expert, "layers.1.ffn.experts", Quantity.OUTPUT),
    (faults.infinite_activation, "layers.0.ffn_norm", Quantity.OUTPUT),
]


@pytest.mark.parametrize("candidate", [FP32, BF16], ids=lambda one: one.name)
@pytest.mark.parametrize(
    ("fault", "operator", "quantity"), PLANTED, ids=lambda one: getattr(one, "__name__", "")
)
def test_a_wrong_kernel_is_seen_and_named(
    fault: Around, operator: str, quantity: Quantity, candidate: Candidate
) -> None:
    trial = attempt(reference(steps=1), candidate, CPU, fault)
    assert not trial.passed
    assert trial.first is not None
    assert (trial.first.operator, trial.first.quantity, trial.first.stage) == (
        operator,
        quantity,
        Stage.ISOLATED,
    )


def test_an_error_is_laid_to_the_operator_that_makes_it_and_to_none_behind_it() -> None:
    trial = attempt(reference(steps=1), FP32, CPU, faults.biased_layer_norm)
    outputs = [row for row in trial.rows if row.quantity is Quantity.OUTPUT and not row.passed]
    assert {row.operator for row in outputs if row.stage is Stage.ISOLATED} == {"layers.1.attention_norm"}
    assert len({row.operator for row in outputs if row.stage is Stage.ACCUMULATED}) > 10


def test_the_cosine_of_a_scaled_gradient_is_one_and_its_gain_is_what_shows_it() -> None:
    trial = attempt(reference(steps=1), FP32, CPU, faults.scaled_attention_gradient)
    assert trial.first is not None
    assert trial.first.difference.cosine == pytest.approx(1)
    assert trial.first.difference.gain == pytest.approx(0.05, rel=1e-3)


def test_an_error_of_the_router_that_only_accumulates_is_seen_after_ten_steps() -> None:
    trial = attempt(reference(), FP32, CPU, faults.drifting_router)
    failed = [row for row in trial.rows if not row.passed]
    assert failed
    assert {row.stage for row in failed} == {Stage.STEPS}
    assert any(row.operator.endswith("ffn.router") for row in failed)
    parameters = [row.difference.cosine for row in trial.rows if row.quantity is Quantity.PARAMETER]
    assert min(parameters) > 0.99, (
        "parameters hardly turn in ten steps: their update is what must be compared"
    )


def test_flips_of_near_ties_are_told_and_fail_nothing() -> None:
    trial = attempt(reference(), BF16, CPU)
    assert trial.flips.steps is not None
    assert trial.flips.accumulated is not None
    assert 0 <= trial.flips.accumulated < 0.1
    assert trial.flips.isolated == 0
    assert trial.passed


def test_a_kernel_that_the_device_lacks_is_an_error_of_that_candidate() -> None:
    trial = attempt(reference(steps=1), Candidate(Dtype.FP32, AttentionKernel.CUDNN), CPU)
    assert trial.error is not None
    assert not trial.passed
    found, missing = candidates.available(shape.small(MOE), CPU, documents=False)
    assert AttentionKernel.MATH in {candidate.attention for candidate in found}
    assert "fp32/cudnn" in {one.name for one in missing}


@pytest.mark.timeout(400)  # a C++ compiler runs
def test_a_compiled_layer_is_compared_as_a_whole() -> None:
    small = reference(replace(DENSE, layers=1), steps=1)
    trial = attempt(small, Candidate(Dtype.FP32, compiled=True), CPU)
    assert trial.error is None
    assert trial.passed, [row for row in trial.rows if not row.passed][:3]
    assert "layers.0" in {row.operator for row in trial.rows if row.stage is Stage.ISOLATED}


def test_the_report_times_what_passes_and_names_the_fastest_with_its_settings() -> None:
    report = validate(config(), wanted="fp32/*/eager", steps=2, rounds=2)
    assert report.passed
    fastest = report.fastest
    assert fastest is not None
    assert fastest.milliseconds == min(trial.milliseconds for trial in report.trials if trial.milliseconds)
    shown = text(report)
    assert fastest.candidate.settings() in shown
    assert {"loop", "grouped"} <= {trial.candidate.experts for trial in report.trials}
    written = json.loads(json.dumps(json_of(report), allow_nan=False))
    assert written["schema"] == "ltf/numerics/1"
    assert written["fastest"] == fastest.candidate.name
    assert written["candidates"][0]["comparisons"][0].keys() >= {
        "operator",
        "cosine",
        "error",
        "gain",
        "passed",
    }


def test_a_report_of_a_fault_names_the_operator_and_is_valid_json_with_nan() -> None:
    report = validate(config(), wanted="configured", steps=1, rounds=0, around=faults.infinite_activation)
    assert not report.passed
    assert report.fastest is None
    assert "diverges first: layers.0.ffn_norm" in text(report)
    written = json.loads(json.dumps(json_of(report), allow_nan=False))
    assert written["candidates"][0]["first"]["operator"] == "layers.0.ffn_norm"


def test_the_configured_combination_decides() -> None:
    asked = config(compute="bf16", attention_kernel="math", experts_kernel="loop")
    report = validate(asked, wanted="configured", steps=1, rounds=0)
    (trial,) = report.trials
    assert trial.candidate == Candidate(Dtype.BF16, AttentionKernel.MATH, ExpertsKernel.LOOP)


def test_documents_of_a_sample_are_masked_in_the_comparison_when_they_are_in_training() -> None:
    asked = config().model_copy(update={"data": Data(seq_len=16, mask_boundaries=True)})
    args = shape.small(asked.model)
    (batch,) = shape.texts(asked, args, 1)
    assert batch.documents is not None
    assert batch.documents[0].tolist() == [0] * 8 + [1] * 8
    report = validate(asked, wanted="configured", steps=1, rounds=0)
    assert report.passed


@pytest.mark.parametrize(
    "arguments",
    [["--candidates", "fp64/*"], ["--device", "nonsense"], ["--set", "model.layerz=2"], ["no-such-preset"]],
)
def test_a_wrong_request_is_one_line_and_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--set", "data.seq_len=8", "--steps", "1"]
    assert main([*arguments, *small]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_command_prints_a_table_or_json_and_its_status_is_the_verdict(
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = ["--set", "data.seq_len=8", "--steps", "1", "--rounds", "1", "--candidates", "configured"]
    assert main(["tiny", *small]) == 0
    assert "the configured combination, fp32/auto/auto/eager, passes" in capsys.readouterr().out
    assert main(["tiny", *small, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    with faults.function("scaled_dot_product_attention", _wrong_unless_fp64):
        assert main(["tiny", *small]) == 1
    assert "diverges first: layers.0.attention.kernel" in capsys.readouterr().out


def _wrong_unless_fp64(
    original: Callable[..., torch.Tensor], *args: torch.Tensor, **options: Any
) -> torch.Tensor:
    out = original(*args, **options)
    return out if out.dtype == torch.float64 else out * 1.001


def test_differences_of_zeros_and_of_what_is_not_finite() -> None:
    zero, one = torch.zeros(4), torch.ones(4)
    assert difference(zero, zero).cosine == 1
    assert difference(one, zero).cosine == 0
    assert difference(zero, one).cosine == 0
    assert difference(one * float("nan"), one).cosine != difference(one, one).cosine == 1
    assert difference(1.05 * one, one).gain == pytest.approx(0.05)
    tiny = torch.tensor([1e-6, 1.0])
    assert difference(2 * tiny, tiny).error == pytest.approx(1)
    assert difference(tiny + 1e-6, tiny).error < 1e-5, "elements near zero count by the tensor's scale"
