"""Training speed, side by side in one run: ``python -m benchmarks.training [--shape moe,dense]``.

Each contender takes a whole step (forward, loss, router loss, backward, clipping, AdamW) on the same tokens
with a model of the same shape in the same dtype on the same device; they take turns, and medians count. All
losses are of the same tokens again and again, and fall at about the same rate: nobody leaves work out.

- *ltf*: `ltf.model.Decoder` with what `python -m ltf train` uses around it.
- *transformers*: `Qwen3MoeForCausalLM` or `Qwen3ForCausalLM` as it comes (SDPA attention, its own choice of
  kernel for the experts), `torch.optim.AdamW` as it comes.
- *transformers, fused AdamW*: the same with the optimizer that ltf uses, so that what is left is the model.

On an accelerator ``--device cuda --dtype bf16 --shape moe-large`` fills the device, and MFU is shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ltf.config.schema import Optimizer
from ltf.metrics import find_peak
from ltf.metrics import mfu as mfu_of
from ltf.model.args import ModelArgs, MoEArgs
from ltf.model.count import count_parameters, token_flops
from ltf.model.decoder import Decoder
from ltf.model.hf_config import config_from_args
from ltf.model.init import init_weights
from ltf.optim import adamw
from ltf.passes import Totals, cross_entropy_sum, router_share

SETTINGS = Optimizer(lr=1e-4)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    args: ModelArgs
    samples: int
    seq_len: int


SHAPES = {
    "moe": Shape(
        ModelArgs(
            vocab_size=4096, layers=6, width=384, heads=6, kv_heads=2, head_dim=64,
            moe=MoEArgs(experts=32, top_k=4, expert_width=192),
        ),
        samples=4, seq_len=512,
    ),
    "dense": Shape(
        ModelArgs(vocab_size=4096, layers=6, width=384, heads=6, kv_heads=2, head_dim=64, ffn_width=1024),
        samples=4, seq_len=512,
    ),
    "moe-large": Shape(
        ModelArgs(
            vocab_size=32768, layers=16, width=2048, heads=16, kv_heads=4, head_dim=128,
            moe=MoEArgs(experts=32, top_k=4, expert_width=1024),
        ),
        samples=8, seq_len=4096,
    ),
    "dense-large": Shape(
        ModelArgs(
            vocab_size=32768, layers=24, width=2560, heads=20, kv_heads=4, head_dim=128, ffn_width=8192
        ),
        samples=4, seq_len=4096,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    shape: str
    contender: str
    tokens_per_second: float
    seconds: float
    cpu_seconds: float
    ratio: float
    """Of tokens a second to those of transformers as it comes."""
    mfu: float | None
    loss: float


Step = Callable[[], float]


def ltf_step(shape: Shape, tokens: Tensor, dtype: torch.dtype, *, compiled: bool) -> Step:
    model = Decoder(shape.args)
    init_weights(model, 0)
    model = model.to(tokens.device, dtype)
    if compiled:
        for _, block in model.blocks():
            block.compile()
    optimizer = adamw(model.named_parameters(), SETTINGS)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    totals = Totals(inputs.numel(), inputs.numel(), inputs.shape[0], {})
    mask = torch.ones_like(labels)

    def step() -> float:
        out = model(inputs)
        loss = own = cross_entropy_sum(out.out, labels, mask) / totals.loss_tokens
        if shape.args.moe is not None:
            loss = own + router_share(out.routing, shape.args.moe, totals)[0]
        return _finish(loss, own, model, optimizer)

    return step


def transformers_step(shape: Shape, tokens: Tensor, dtype: torch.dtype, *, fused: bool) -> Step:
    import transformers

    known = config_from_args(shape.args, dtype)
    moe = shape.args.moe is not None
    values = {key: value for key, value in known.items() if key not in ("architectures", "model_type")}
    kind: Any = transformers.Qwen3MoeConfig if moe else transformers.Qwen3Config
    config = kind(**values, **({"output_router_logits": True} if moe else {}))
    torch.manual_seed(0)
    maker: Any = transformers.Qwen3MoeForCausalLM if moe else transformers.Qwen3ForCausalLM
    model = maker(config).to(tokens.device, dtype)
    # None is the default: torch chooses.
    optimizer = torch.optim.AdamW(model.parameters(), lr=SETTINGS.lr, fused=fused or None)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        # shift_labels: its own shift would leave one label of each sample out.
        out = model(input_ids=inputs, labels=labels, shift_labels=labels, use_cache=False)
        return _finish(out.loss, out.loss, model, optimizer)

    return step


def _finish(loss: Tensor, shown: Tensor, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(shown.detach())


def measure(name: str, shape: Shape, options: argparse.Namespace) -> list[Row]:
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(shape.args.vocab_size, (shape.samples, shape.seq_len + 1), generator=generator).to(
        device
    )
    contenders: dict[str, Step] = {
        "transformers": transformers_step(shape, tokens, dtype, fused=False),
        "transformers, fused AdamW": transformers_step(shape, tokens, dtype, fused=True),
        "ltf": ltf_step(shape, tokens, dtype, compiled=False),
    }
    if options.compile:
        contenders["ltf, compiled blocks"] = ltf_step(shape, tokens, dtype, compiled=True)
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    cpu_seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    losses: dict[str, float] = {}
    for round_ in range(options.rounds + options.warmup):
        for contender, step in contenders.items():
            began, cpu = time.perf_counter(), time.process_time()
            losses[contender] = step()
            if round_ >= options.warmup:
                seconds[contender].append(time.perf_counter() - began)
                cpu_seconds[contender].append(time.process_time() - cpu)
    peak = find_peak(None, device, dtype)
    flops = token_flops(shape.args, shape.seq_len).training
    count = shape.samples * shape.seq_len
    base = statistics.median(seconds["transformers"])
    rows = []
    for contender, taken in seconds.items():
        middle = statistics.median(taken)
        mfu = mfu_of(count / middle, flops, 1, peak)
        own = statistics.median(cpu_seconds[contender])
        rows.append(Row(name, contender, count / middle, middle, own, base / middle, mfu, losses[contender]))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--shape", default="moe,dense", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of torch's operators on a CPU; default: torch's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--compile", action="store_true", help="ltf with torch.compile as well")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for name in options.shape.split(","):
        if name not in SHAPES:
            parser.error(f"no shape {name!r}; expected one of {', '.join(SHAPES)}")
        rows += measure(name, SHAPES[name], options)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return 0
    for name in options.shape.split(","):
        count = count_parameters(SHAPES[name].args)
        shape = SHAPES[name]
        print(
            f"{name}: {count.total / 1e6:.1f} M parameters, {count.active / 1e6:.1f} M active, "
            f"{shape.samples} x {shape.seq_len} tokens, {options.dtype} on {options.device}"
        )
        for row in rows:
            if row.shape == name:
                mfu = "-" if row.mfu is None else f"{row.mfu:.1%}"
                speed = f"{row.tokens_per_second:10.0f} tokens/s {row.ratio:6.2f}x"
                rest = f"{row.cpu_seconds:8.2f} CPU s  MFU {mfu}  loss {row.loss:.3f}"
                print(f"  {row.contender:26} {speed} {rest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
