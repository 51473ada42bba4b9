"""What touches the device, on every kind of device that is here: the same tests on the CPU and on another."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ltf import metrics
from ltf.checkpoint.pieces import Piece
from ltf.checkpoint.state import Buffers, changed
from ltf.config.schema import Parallel
from ltf.data.corpus import text
from ltf.data.prepare import Recipe, prepare
from ltf.guard.digest import digest
from ltf.model.args import ModelArgs, MoEArgs
from ltf.model.attention import Attention, document_mask
from ltf.model.decoder import Decoder
from ltf.model.experts import Experts, can_group, looped
from ltf.model.init import init_weights
from ltf.model.moe import local_exchange
from ltf.model.rope import positions_in_documents, rope_table
from ltf.model.router import Router
from ltf.parallel.copies import Copies, gather, gather_weighted, spread
from ltf.parallel.exchange import FlatExchange
from ltf.parallel.topology import TopologyExchange
from ltf.parallel.world import join
from ltf.passes import cross_entropy_sum
from ltf.timing import OwnWork
from tests.ltf import ranks
from tests.ltf.train.runs import Runs, Told

HERE = torch.accelerator.current_accelerator(check_available=True)
DEVICES = ["cpu", *([HERE.type] if HERE is not None else [])]
WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""As `python -m ltf train` sets it; CUDA's matrix products repeat with it alone."""
DTYPES = [torch.float32, torch.bfloat16]
ARGS = ModelArgs(
    vocab_size=64,
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    moe=MoEArgs(experts=8, top_k=2, expert_width=16, z_coefficient=1e-3),
)

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture
def strict() -> Iterator[None]:
    """An operator without a deterministic kernel raises in here."""
    os.environ.setdefault(*WORKSPACE)
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    documents = (json.dumps({"text": document}) + "\n" for document in text(seed=1, size=50_000))
    (folder / "grammar.jsonl").write_text("".join(documents))
    prepare([folder / "grammar.jsonl"], folder / "grammar", Recipe())
    return folder / "grammar"


@pytest.fixture
def runs(corpus: Path, device: str, tmp_path: Path) -> Runs:
    """In bf16, and so through FSDP's streams also on one rank."""
    settings: dict[str, Any] = {
        "run": {"steps": 8, "seed": 3, "device": device},
        "model": {
            "vocab_size": 272, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8,
            "moe": {"experts": 8, "top_k": 2, "expert_width": 32, "bias_update_rate": 1e-2},
        },
        "data": {"sources": [{"prefix": str(corpus)}], "seq_len": 32, "pad": 257, "mask_boundaries": True},
        "batch": {"samples": 8, "micro": 4},
        "precision": {"compute": "bf16"},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        "checkpoint": {"every_steps": 4},
        "guard": {"corruption": {"every_steps": 3}},
        "noise": {"slow_factor": 1e6, "jitter_factor": 1e6},
    }  # fmt: skip
    return Runs(settings, tmp_path)


def exact(told: Told) -> dict[int, set[tuple[float, float]]]:
    """By step, the losses and gradient norms of all times that it was made."""
    found: dict[int, set[tuple[float, float]]] = {}
    for event in told.events("step"):
        found.setdefault(event["step"], set()).add((event["loss"], event["gradient_norm"]))
    return found


def test_a_run_learns_and_goes_on_from_a_checkpoint_bit_for_bit(runs: Runs, device: str) -> None:
    first = runs.warm("run")
    assert first.losses[8] < first.losses[1] - 0.3
    # Steps 3 and 6 were computed again: other bits would be a finding.
    assert first.findings == []
    assert all(event["memory_bytes"] > 0 for event in first.events("step"))
    shutil.rmtree(first.folder / "checkpoints" / "step-00000008")
    again = runs.warm("run")
    assert [event["step"] for event in again.events("resumed")] == [4]
    assert len(again.events("step")) == 12
    assert {step for step, values in exact(again).items() if len(values) > 1} == set()


def test_a_flipped_bit_before_the_reduction_is_repaired_to_the_same_bits(runs: Runs, device: str) -> None:
    clean = runs.warm("clean")
    order = {"fault": "bitflip_gradient", "rank": 0, "step": 6, "layer": 1, "bit": 6}
    told = runs.warm("run", environment={"LTF_DRILL": json.dumps(order)})
    [finding] = [event for event in told.events("finding") if event["kind"].startswith("corruption.")]
    assert (finding["kind"], finding["ranks"]) == ("corruption.transient", [0])
    assert finding["where"][0]["device"].startswith(device)
    assert exact(told) == exact(clean)


def test_a_rank_that_makes_nan_is_named_and_its_step_changes_nothing(runs: Runs, device: str) -> None:
    order = {"fault": "nan_activation", "rank": 0, "step": 4, "layer": 1}
    told = runs.warm(
        "run", environment={"LTF_DRILL": json.dumps(order)}, guard__corruption={"on_suspicion": False}
    )
    [finding] = [event for event in told.events("finding") if event["kind"].startswith("finite.")]
    assert (finding["kind"], finding["ranks"]) == ("finite.activation", [0])
    assert [event["step"] for event in told.events("step") if event["skipped"]] == [4]


def made(function: Callable[[], Tensor], *leaves: Tensor) -> list[Tensor]:
    """A result and its gradients on the CPU, the same bits in two passes."""

    def once() -> list[Tensor]:
        out = function()
        out.float().square().sum().backward()  # type: ignore[no-untyped-call]
        found = [out.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves if leaf.grad is not None)]
        for leaf in leaves:
            leaf.grad = None
        return found

    first, second = once(), once()
    assert len(first) == len(leaves) + 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return first


def close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    for a, b in zip(found, expected, strict=True):
        scale = float(b.float().abs().max())
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(a.float(), b.float(), atol=tolerance * scale, rtol=tolerance)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaf(tensor: Tensor, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensor.to(device, dtype).requires_grad_()


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[3, 0, 7, 1], [0, 0, 11, 0], [1, 0, 0, 0]])
def test_grouped_experts_are_those_of_the_loop(device: str, dtype: torch.dtype, counts: list[int]) -> None:
    experts = Experts(4, 32, 16)
    for seed, parameter in enumerate(experts.parameters()):
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(seed))
    experts.to(device, dtype)
    x, sizes = leaf(values(sum(counts), 32), device, dtype), torch.tensor(counts, device=device)
    assert can_group(x, experts.gate_up)
    leaves = [x, *experts.parameters()]
    found = made(lambda: experts(x, sizes), *leaves)
    with looped():
        expected = made(lambda: experts(x, sizes), *leaves)
    close(found, expected, dtype)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_grouped_heads_is_that_of_the_cpu(device: str, dtype: torch.dtype, masked: bool) -> None:
    def attended(where: str, dtype: torch.dtype) -> list[Tensor]:
        module = Attention(ARGS)
        for seed, parameter in enumerate(module.parameters()):
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(seed))
        module.to(where, dtype)
        x = leaf(values(2, 48, ARGS.width, seed=9), where, dtype)
        documents = (torch.arange(48, device=where) // 20).expand(2, -1)
        positions = positions_in_documents(documents) if masked else torch.arange(48, device=where)[None]
        rope = rope_table(positions, ARGS.head_dim, ARGS.rope_theta, dtype)
        mask = document_mask(documents) if masked else None
        return made(lambda: module(x, rope, mask), x, *module.parameters())

    close(attended(device, dtype), attended("cpu", torch.float32), dtype)


@pytest.mark.usefixtures("strict")
def test_a_step_of_the_model_needs_no_operator_whose_results_vary(device: str) -> None:
    model = Decoder(ARGS)
    init_weights(model, 1)
    model.to(device)
    tokens = torch.randint(ARGS.vocab_size, (2, 33), generator=torch.Generator().manual_seed(2)).to(device)
    kept = torch.ones_like(tokens[:, 1:])

    def loss() -> Tensor:
        out = model(tokens[:, :-1], document_ids=tokens[:, :-1].cummax(1).values)
        return cross_entropy_sum(out.out, tokens[:, 1:], kept) / kept.numel()

    made(loss, *model.parameters())


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_and_their_sums_are_those_of_plain_indexing(device: str, dtype: torch.dtype) -> None:
    source = torch.tensor([4, 0, 0, 2, 4, 4, 1, 2])  # row 3 has no copy
    copies = Copies.of(source.to(device), 5)
    x, y = leaf(values(5, 16), device, dtype), leaf(values(8, 16, seed=1), device, dtype)
    weights = leaf(values(8, seed=2).abs(), device)
    kept = [x.detach().cpu().float(), y.detach().cpu().float()]
    plain_x, plain_y = (each.requires_grad_() for each in kept)
    plain_w = weights.detach().cpu().requires_grad_()
    order = copies.order.cpu()
    by_copy = torch.zeros(8).index_put((order,), plain_w)
    close(made(lambda: spread(x, copies), x), made(lambda: plain_x[source], plain_x), dtype)

    def summed(each: Tensor) -> Tensor:
        return torch.zeros(5, 16).index_add(0, source, each)

    close(made(lambda: gather(y, copies), y), made(lambda: summed(plain_y), plain_y), dtype)
    expected = summed(plain_y * by_copy[:, None])
    expected.square().sum().backward()  # type: ignore[no-untyped-call]
    assert plain_y.grad is not None
    assert plain_w.grad is not None
    found = made(lambda: gather_weighted(y, copies, weights), y, weights)
    close(found, [expected.detach(), plain_y.grad, plain_w.grad], dtype)


@pytest.mark.parametrize("topology", [False, True])
def test_exchanged_tokens_come_back_as_if_one_rank_had_all_experts(device: str, topology: bool) -> None:
    world = 2 if device == "cpu" else min(2, torch.accelerator.device_count())
    for found, expected in ranks.run(_exchanged, world, device, topology):
        close(found, expected)


def _exchanged(device: str, topology: bool) -> tuple[list[Tensor], list[Tensor]]:
    world = join(Parallel(expert=dist_size()), device)
    try:
        os.environ.setdefault(*WORKSPACE)
        torch.use_deterministic_algorithms(True)
        group = world.mesh.get_group("ep")
        exchange = TopologyExchange(group, list(range(group.size()))) if topology else FlatExchange(group)
        assert ARGS.moe is not None
        router, whole = Router(32, ARGS.moe, 2), Experts(8, 32, 16)
        for seed, parameter in enumerate([*router.parameters(), *whole.parameters()]):
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(seed))
        share = 8 // group.size()
        mine = Experts(share, 32, 16)
        with torch.no_grad():
            for part, full in zip(mine.parameters(), whole.parameters(), strict=True):
                part.copy_(full.narrow(0, world.rank * share, share))
        x = leaf(values(1, 24, 32, seed=5 + world.rank), str(world.device))
        for module in (router, whole, mine):
            module.to(world.device)
        leaves = [x, *router.parameters()]
        # Of the experts' gradients each rank has those of all tokens for its share: another test's matter.
        found = made(lambda: exchange(x[0], router(x), mine), *leaves)
        expected = made(lambda: local_exchange(x[0], router(x), whole), *leaves)
        return found, expected
    finally:
        world.close()


def dist_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def test_a_side_thread_s_copy_is_the_state_behind_its_mark(device: str) -> None:
    where = torch.device(device)
    tensor = values(512, 512).to(where)
    for _ in range(20):
        tensor = tensor @ tensor / tensor.norm()
    mark = changed(where)
    buffers = Buffers(where)
    [copied] = buffers.copy([Piece.whole("x", tensor)], mark)
    assert copied.local.device.type == "cpu"
    assert torch.equal(copied.local, tensor.cpu())
    tensor.zero_()
    [again] = buffers.copy([Piece.whole("x", tensor)], changed(where))
    assert again.local is copied.local
    assert not again.local.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("size", [1, 7, 4096, 2**17 + 3])
def test_a_digest_is_of_the_bits_and_not_of_the_device(device: str, dtype: torch.dtype, size: int) -> None:
    tensor = (values(size) * 100).to(dtype)
    assert int(digest(tensor.to(device))) == int(digest(tensor))


def test_own_work_and_memory_are_measured(device: str) -> None:
    where = torch.device(device)
    module = nn.Linear(512, 512).to(where)
    work = OwnWork([module], where)
    for _ in range(3):
        module(values(64, 512).to(where))
    taken = work.take()
    assert taken.rows == 3 * 64
    assert 0 < taken.seconds < 10
    assert work.take().seconds == 0
    memory = metrics.memory(where)
    assert 0 < memory.peak <= (memory.total or memory.peak)


def test_a_world_of_one_knows_its_device_and_gathers(device: str) -> None:
    assert ranks.run(_alone, 1, device) == [(device, [[1.0, 2.0]], 3.0)]


def _alone(device: str) -> tuple[str, list[list[float]], float]:
    world = join(Parallel(), device)
    try:
        summed = torch.tensor(3.0, device=world.device)
        dist.all_reduce(summed)
        return world.device.type, world.gather([1.0, 2.0]), float(summed)
    finally:
        world.close()
