"""The collapse guard, on synthetic profiles and on a model whose middle layers really shrink."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from ltf.config.schema import CollapseGuard
from ltf.findings import Finding
from ltf.guard.collapse import CollapseWatch, measure
from ltf.model.args import MoEArgs
from tests.ltf.model.shapes import MOE, decoder

SETTINGS = CollapseGuard()

# Norm of a layer at `place` (0 to 1 in depth) when `time` (0 to 1) of the run is over.
HEALTHY: dict[str, Callable[[float, float], float]] = {
    "grows with depth": lambda place, time: 10 + 8 * time * place,
    "grows steeply at the end": lambda place, time: 10 + 20 * time * place**4,
    "flat": lambda place, time: 10 + 5 * time,
    "falls to the end": lambda place, time: 10 - 6 * time * place,
    "a hill in the middle": lambda place, time: 10 + 8 * time * math.sin(math.pi * place),
    "odd first and last layer": lambda place, time: (30 if place in (0, 1) else 10) + 3 * time * place,
}


def run(
    norm: Callable[[float, float], float], layers: int, noise: float = 0.0, profiles: int = 300
) -> list[Finding]:
    watch, chance = CollapseWatch(SETTINGS), random.Random(layers)
    found = []
    for profile in range(profiles):
        norms = {
            layer: norm(layer / (layers - 1), profile / profiles) * (1 + chance.gauss(0, noise))
            for layer in range(layers)
        }
        found += watch.look(profile * 100, norms)
    return found


@pytest.mark.parametrize("layers", [5, 6, 8, 12, 24, 56])
@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("kind", HEALTHY)
def test_a_healthy_profile_never_fires(kind: str, noise: float, layers: int) -> None:
    assert run(HEALTHY[kind], layers, noise) == []


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("layers", [5, 8, 12, 24, 56])
def test_a_valley_that_opens_slowly_is_found_before_it_is_15_percent_deep(layers: int, noise: float) -> None:
    middle = range(layers // 2 - layers // 8, layers // 2 + layers // 8 + 1)

    def opening(place: float, time: float) -> float:
        inside = round(place * (layers - 1)) in middle
        return 10 * (1 - 0.5 * time * inside)

    first = run(opening, layers, noise)[0]
    opened = 0.5 * first.step / 100 / 300
    assert opened < 0.15
    assert first.kind == "collapse.valley"
    named = first.evidence["layers"]
    assert isinstance(named, list)
    assert set(named) & set(middle) == set(named) != set()
    assert first.evidence["profile"].keys() == {str(layer) for layer in range(layers)}  # type: ignore[union-attr]


def test_a_valley_is_measured_from_the_lower_shoulder_and_its_layers_are_named() -> None:
    valley = measure(dict(enumerate([10.0, 10, 9, 6, 5, 9, 12, 14])))
    assert valley is not None
    assert valley.depth == pytest.approx(1 - 5.5 / 10)
    assert valley.layers == (3, 4)


def test_dense_first_layers_of_another_size_are_left_out_when_the_layers_that_compare_are_named() -> None:
    watch = CollapseWatch(SETTINGS, layers=range(3, 12))
    for profile in range(100):
        norms = {layer: 40.0 if layer < 3 else 10 + 0.05 * profile * layer / 12 for layer in range(12)}
        assert watch.look(profile, norms) == []


def test_what_was_there_from_the_beginning_is_a_finding_only_when_it_deepens() -> None:
    watch = CollapseWatch(SETTINGS)
    profile = {layer: 40.0 if layer < 3 else 10.0 + layer for layer in range(12)} | {10: 40.0, 11: 40.0}
    beginning = measure(profile)
    assert beginning is not None
    assert beginning.depth > SETTINGS.depth
    assert not any(watch.look(step, profile) for step in range(100))
    deeper = {layer: norm * (0.8 if 3 <= layer < 10 else 1) for layer, norm in profile.items()}
    assert [bool(watch.look(step, deeper)) for step in range(3)] == [False, False, True]


def test_a_valley_that_lasts_for_fewer_profiles_than_the_patience_is_none() -> None:
    watch = CollapseWatch(SETTINGS)
    flat = dict.fromkeys(range(8), 10.0)
    valley = flat | {3: 7.0, 4: 7.0}
    for step in range(0, 300, 3):
        for profile in (flat, valley, valley):
            assert watch.look(step, profile) == []


def test_a_known_valley_is_told_again_only_when_it_has_grown() -> None:
    watch = CollapseWatch(SETTINGS)
    flat = dict.fromkeys(range(8), 10.0)
    for step in range(3):
        watch.look(step, flat)
    told = [len(watch.look(step, flat | {3: 8.5, 4: 8.5})) for step in range(20)]
    assert sum(told) == 1
    assert sum(len(watch.look(step, flat | {3: 7.5, 4: 7.5})) for step in range(20)) == 1


def test_fewer_than_five_layers_are_not_judged() -> None:
    watch = CollapseWatch(SETTINGS)
    assert measure({0: 10.0, 1: 1.0, 2: 1.0, 3: 10.0}) is None
    assert not any(watch.look(step, {0: 10.0, 1: 10.0 / (step + 1), 2: 1.0, 3: 10.0}) for step in range(50))


def test_a_profile_with_a_number_that_is_not_finite_is_left_out() -> None:
    watch, clean = CollapseWatch(SETTINGS), CollapseWatch(SETTINGS)
    flat = dict.fromkeys(range(8), 10.0)
    watch.look(0, flat)
    clean.look(0, flat)
    assert watch.look(1, flat | {4: math.nan}) == []
    assert watch.state() == clean.state()


def test_a_watch_that_was_saved_as_json_goes_on_as_if_it_had_not_stopped() -> None:
    profiles = [
        {layer: 10.0 * (1 - 0.01 * profile * (2 < layer < 6)) for layer in range(8)} for profile in range(40)
    ]
    whole, watch = CollapseWatch(SETTINGS), CollapseWatch(SETTINGS)
    expected = [whole.look(step, norms) for step, norms in enumerate(profiles)]
    got = []
    for step, norms in enumerate(profiles):
        saved = json.dumps(watch.state())
        watch = CollapseWatch(SETTINGS)
        watch.restore(json.loads(saved))
        got.append(watch.look(step, norms))
    assert any(expected)
    assert got == expected


@cache
def trained(collapsing: bool) -> list[tuple[float, dict[int, float]]]:
    """Loss and profile at every fourth of 120 steps of a real mixture of experts with 8 layers.

    Collapsing means, honestly: layers 3 and 4 decay a hundred times as fast as the others (rate times decay
    0.01 a step against 0.0001), which starves them as vanishing gradients would. All else is the same.
    """
    args = replace(MOE, layers=8, width=16, heads=2, kv_heads=1, head_dim=8, moe=MoEArgs(4, 2, 16))
    model = decoder(args)
    starved = [p for i, block in model.blocks() if i in (3, 4) for p in block.parameters()]
    ids = {id(p) for p in starved}
    others = [p for p in model.parameters() if id(p) not in ids]
    optimizer = torch.optim.AdamW(
        [
            {"params": others, "weight_decay": 0.05},
            {"params": starved, "weight_decay": 5.0 if collapsing else 0.05},
        ],
        lr=2e-3,
    )
    generator = torch.Generator().manual_seed(0)
    profiles = []
    for step in range(120):
        start = torch.randint(args.vocab_size, (4, 1), generator=generator)
        text = (start + torch.arange(13) * 3) % args.vocab_size
        loss = F.cross_entropy(model(text[:, :-1]).out.flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if step % 4 == 0:
            norms = {
                i: math.sqrt(sum(p.detach().square().sum().item() for p in block.parameters()))
                for i, block in model.blocks()
            }
            profiles.append((loss.item(), norms))
    return profiles


def test_a_healthy_model_in_training_never_fires() -> None:
    watch = CollapseWatch(SETTINGS)
    run = trained(collapsing=False)
    assert run[-1][0] < 0.8 * run[0][0], "the run did not learn: it is no healthy example"
    assert [watch.look(step, norms) for step, (_, norms) in enumerate(run)] == [[]] * len(run)


def test_a_model_whose_middle_layers_starve_is_found_while_its_loss_still_falls() -> None:
    watch = CollapseWatch(SETTINGS)
    run = trained(collapsing=True)
    found = [finding for step, (_, norms) in enumerate(run) for finding in watch.look(step, norms)]
    assert found
    assert found[0].evidence["layers"] == [3, 4]
    assert found[0].evidence["depth"] < 0.2  # type: ignore[operator]
    assert run[-1][0] < run[found[0].step][0] < run[0][0]
