"""The spike guard: what it must find, and what it must leave alone."""

import json
import math
import random
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from ltf.config.schema import SpikeGuard
from ltf.guard.spikes import SpikeWatch
from tests.ltf.model.shapes import MOE, decoder

SETTINGS = SpikeGuard()


def decaying(chance: random.Random, step: int, noise: float) -> float:
    """A power law from 11 to 2 nats, as losses fall."""
    return 2.0 + 9.0 / math.sqrt(1 + step / 50) + chance.gauss(0, noise)


def student(chance: random.Random, degrees: int) -> float:
    chi_square = chance.gammavariate(degrees / 2, 2 / degrees)
    normal: float = chance.gauss(0, 1)
    return normal / math.sqrt(chi_square)


FAMILIES: dict[str, Callable[[random.Random, int], float]] = {
    "a loss with Gaussian noise": lambda c, s: decaying(c, s, 0.05),
    "a loss with next to no noise": lambda c, s: decaying(c, s, 1e-4),
    "a loss with heavy tails (Student, 8 degrees)": lambda c, s: decaying(c, s, 0.0) + 0.05 * student(c, 8),
    "a loss that slowly swings": lambda c, s: decaying(c, s, 0.03) + 0.2 * math.sin(s / 40),
    "a norm, log-normal": lambda c, s: c.lognormvariate(-0.5, 0.3),
    "a norm that grows tenfold over the run": lambda c, s: (
        0.3 * 10 ** (s / 20_000) * c.lognormvariate(0, 0.2)
    ),
    "a norm that falls and settles": lambda c, s: (5 * math.exp(-s / 100) + 0.2) * c.lognormvariate(0, 0.2),
    "a norm of zeros (a frozen layer)": lambda c, s: 0.0,
}


def healthy(kind: str, steps: int, seed: int = 0) -> Iterator[float]:
    chance = random.Random(f"{kind} {seed}")
    return (FAMILIES[kind](chance, step) for step in range(steps))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_healthy_series_never_fires_in_20_000_steps(kind: str) -> None:
    """Eight series of 20,000 values, each as a loss (the tighter limit), a norm and a layer's norm."""
    watch = SpikeWatch(SETTINGS)
    series = healthy(kind, 20_000)
    assert [watch.look(step, value, value, {0: value}) for step, value in enumerate(series)] == [[]] * 20_000


def test_noise_with_wilder_tails_than_losses_have_raises_about_one_false_alarm_in_five_thousand() -> None:
    """The limit of a z-score: P(t > 11) of Student's t with 4 degrees of freedom is 0.0002."""
    watch, chance = SpikeWatch(SETTINGS), random.Random(0)
    alarms = sum(bool(watch.look(step, 3 + 0.05 * student(chance, 4), 1.0, {})) for step in range(40_000))
    assert 1 <= alarms <= 20


@cache
def recorded() -> tuple[tuple[float, float, dict[int, float]], ...]:
    """Loss, norm and layers' norms of 250 real steps of a tiny mixture of experts that learns a cycle."""
    model = decoder(MOE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    past = []
    for _ in range(250):
        start = torch.randint(MOE.vocab_size, (4, 1), generator=generator)
        text = (start + torch.arange(17) * 3) % MOE.vocab_size
        loss = F.cross_entropy(model(text[:, :-1]).out.flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        layers = {
            i: math.sqrt(sum(p.grad.square().sum().item() for p in block.parameters() if p.grad is not None))
            for i, block in model.blocks()
        }
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        past.append((loss.item(), norm.item(), layers))
    return tuple(past)


def test_a_real_run_of_a_tiny_model_never_fires() -> None:
    watch = SpikeWatch(SETTINGS)
    run = recorded()
    assert run[-1][0] < run[0][0] / 2, "the run did not learn: it is no healthy example"
    assert [watch.look(step, *seen) for step, seen in enumerate(run)] == [[]] * len(run)


def test_a_spike_planted_in_a_real_run_is_found_in_its_step_with_its_layer() -> None:
    watch = SpikeWatch(SETTINGS)
    found = []
    for step, (loss, norm, layers) in enumerate(recorded()):
        spike = step == 200
        seen = (loss + 3, norm * 50, layers | {1: layers[1] * 50}) if spike else (loss, norm, layers)
        found += watch.look(step, *seen)
    assert {(finding.step, finding.kind) for finding in found} == {
        (200, "spike.loss"), (200, "spike.norm"), (200, "spike.layer"),
    }  # fmt: skip
    (layer,) = (finding for finding in found if finding.kind == "spike.layer")
    assert "layer 1" in layer.message


@pytest.mark.parametrize("rise", [0.75, 1.5, 3.0, 8.0, 100.0])
def test_a_spike_of_the_loss_is_found_in_its_step_and_only_there(rise: float) -> None:
    watch = SpikeWatch(SETTINGS)
    losses = list(healthy("a loss with Gaussian noise", 4000))
    losses[3000] += rise
    found = [finding for step, loss in enumerate(losses) for finding in watch.look(step, loss, 1.0, {})]
    assert [(finding.step, finding.kind) for finding in found] == [(3000, "spike.loss")]
    evidence = found[0].evidence
    assert isinstance(evidence["z"], float)
    assert evidence["z"] > SETTINGS.loss_z
    assert isinstance(evidence["limit"], float)
    assert isinstance(evidence["value"], float)
    assert evidence["value"] == losses[3000] > evidence["limit"]


def test_ten_times_the_largest_of_the_first_hundred_losses_misses_what_this_finds() -> None:
    losses = list(healthy("a loss with Gaussian noise", 4000))
    losses[3000] += 8.0
    frozen = 10 * max(losses[:100])
    assert not any(loss > frozen for loss in losses[100:])
    watch = SpikeWatch(SETTINGS)
    assert [step for step, loss in enumerate(losses) if watch.look(step, loss, 1.0, {})] == [3000]


def test_a_spike_of_one_layer_that_the_global_norm_hides_is_found_and_named() -> None:
    watch = SpikeWatch(SETTINGS)
    chance = random.Random(1)
    found = []
    for step in range(500):
        layers = {layer: chance.lognormvariate(0, 0.1) for layer in range(48)} | {
            20: 0.01 * chance.uniform(0.9, 1.1)
        }
        if step == 400:
            layers[20] *= 30
        norm = math.sqrt(sum(value**2 for value in layers.values()))
        found += watch.look(step, 2.0, norm, layers)
    assert [(finding.step, finding.kind) for finding in found] == [(400, "spike.layer")]
    assert found[0].evidence["layers"].keys() == {"20"}  # type: ignore[union-attr]


def test_nothing_is_flagged_during_the_warm_up() -> None:
    watch = SpikeWatch(SETTINGS)
    losses = [100.0 if step == SETTINGS.warmup - 1 else 2.0 for step in range(SETTINGS.warmup)]
    assert not any(watch.look(step, loss, loss, {0: loss}) for step, loss in enumerate(losses))
    assert watch.look(SETTINGS.warmup, 100.0, 1.0, {}), "the first step after it is judged"


def test_a_flagged_value_leaves_the_judgement_of_the_next_as_it_was() -> None:
    watch = SpikeWatch(SETTINGS)
    for step, loss in enumerate(healthy("a loss with Gaussian noise", 1000)):
        watch.look(step, loss, 1.0, {})
    first = watch.look(1000, 50.0, 1.0, {})
    second = watch.look(1001, 50.0, 1.0, {})
    assert first[0].evidence == second[0].evidence


def test_a_new_level_is_flagged_then_accepted_and_spikes_above_it_are_found() -> None:
    watch = SpikeWatch(SETTINGS)
    chance = random.Random(3)
    kinds: dict[int, list[str]] = {}
    for step in range(1500):
        loss = (2.0 if step < 1000 else 6.0) + chance.gauss(0, 0.05) + (4.0 if step == 1400 else 0.0)
        kinds[step] = [finding.kind for finding in watch.look(step, loss, 1.0, {})]
    doubts = SETTINGS.window // 8
    last = 1000 + doubts - 1
    assert all(kinds[step] == ["spike.loss"] for step in range(1000, last))
    assert kinds[last] == ["spike.loss", "spike.level"]
    assert {step for step in kinds if kinds[step] and step > last} == {1400}


def test_a_level_that_comes_and_goes_every_other_step_is_accepted_too() -> None:
    watch = SpikeWatch(SETTINGS)
    found = [bool(watch.look(step, 6.0 if step > 500 and step % 2 else 2.0, 1.0, {})) for step in range(1000)]
    assert any(found[500:540])
    assert not any(found[540:])


def test_a_fall_is_no_spike() -> None:
    watch = SpikeWatch(SETTINGS)
    assert not any(watch.look(step, 8.0 if step < 500 else 0.5, 1.0, {}) for step in range(1000))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_left_out_and_poison_nothing(value: float) -> None:
    watch, clean = SpikeWatch(SETTINGS), SpikeWatch(SETTINGS)
    for step, loss in enumerate(healthy("a loss with Gaussian noise", 500)):
        watch.look(step, loss, loss, {0: loss})
        clean.look(step, loss, loss, {0: loss})
    assert watch.look(500, value, value, {0: value}) == []
    assert watch.state() == clean.state()
    assert watch.look(501, 50.0, value, {}) == clean.look(501, 50.0, value, {}) != []


def test_a_watch_that_was_saved_as_json_goes_on_as_if_it_had_not_stopped() -> None:
    chance = random.Random(5)
    seen = [
        (
            chance.gauss(3, 0.1) + (4 if step % 97 == 0 else 0),
            chance.lognormvariate(0, 0.3),
            {7: chance.random()},
        )
        for step in range(600)
    ]
    whole = SpikeWatch(SETTINGS)
    expected = [whole.look(step, *values) for step, values in enumerate(seen)]
    watch = SpikeWatch(SETTINGS)
    got = []
    for step, values in enumerate(seen):
        if step % 50 == 21:
            saved = json.dumps(watch.state())
            watch = SpikeWatch(SETTINGS)
            watch.restore(json.loads(saved))
        got.append(watch.look(step, *values))
    assert any(expected)
    assert got == expected
    assert watch.state() == whole.state()


def test_a_smaller_window_than_the_saved_one_keeps_the_newest_values() -> None:
    wide, narrow = SpikeWatch(SETTINGS), SpikeWatch(SpikeGuard(window=16))
    for step in range(200):
        wide.look(step, float(step), 1.0, {})
    narrow.restore(json.loads(json.dumps(wide.state())))
    kept = narrow.state()["loss"]
    assert isinstance(kept, dict)
    assert kept["window"] == [float(step) for step in range(184, 200)]


def test_a_guard_that_is_off_says_nothing() -> None:
    watch = SpikeWatch(SpikeGuard(enabled=False))
    assert not any(watch.look(step, 1000.0 if step == 900 else 1.0, 1.0, {}) for step in range(1000))
