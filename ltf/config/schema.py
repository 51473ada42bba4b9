"""Every setting of a training run, with its unit, its default and what it is for.

A file holds these sections; ``read.py`` reads it, ``presets/`` has whole examples. The generated reference is
made of the descriptions below. What two sections must agree on is checked in ``agreement.py``.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ltf.model.args import ModelArgs

Whole = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Unknown keys are refused, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Run(Section):
    name: str = "run"
    """What the run is called in events and logs; LTP_RUN_ID in the environment overrides it."""
    steps: Whole = 1000
    """Optimizer steps in all, those of earlier attempts included."""
    seed: NotNegative = 0
    """Of the initial weights and of the order of the data."""
    deterministic: bool = True
    """Ask torch for kernels whose results repeat bit for bit; a resume is exact only with them."""
    device: str = "auto"
    """`auto` (an accelerator if torch has one, else `cpu`), or a torch device type such as `cuda`, `cpu`."""
    output: Path = Path("ltf-run")
    """Folder for events, logs and, unless set elsewhere, checkpoints. Relative to the working directory."""
    initial_weights: Path | None = None
    """A folder of Hugging Face safetensors (Qwen3 or Qwen3-MoE) to begin from in place of random weights.
    Relative to the file that it is written in."""


class Source(Section):
    prefix: Path
    """A Megatron `.bin/.idx` pair, without the suffix. Relative to the file that it is written in."""
    weight: Positive | None = None
    """Its share of the samples, relative to the others'. None for any: in proportion to size."""
    documents: tuple[Share, Share] = (0.0, 1.0)
    """The part between two fractions of its documents."""
    max_epochs: Positive | None = None
    """Refuse a run that repeats this source more often."""


class Evaluation(Section):
    sources: Annotated[list[Source], Field(min_length=1)]
    """Held-out data: other files, or other `documents` of the training files."""
    every_steps: Whole = 500
    """Steps between two evaluations."""
    batches: Whole = 8
    """Global batches in one evaluation; always the same samples."""


class Data(Section):
    sources: list[Source] = Field(default_factory=list)
    """The blend. `python -m ltf data prepare` makes such files."""
    seq_len: Whole = 4096
    """Tokens in a sample."""
    packing: Literal["stream", "best_fit"] = "stream"
    """`stream`: documents end to end, cut anywhere. `best_fit`: whole where they fit, then padding."""
    mask_boundaries: bool = False
    """Attention and positions begin again with each document of a sample."""
    pad: NotNegative = 0
    """The token id that fills what `best_fit` leaves free."""
    cache: Path | None = None
    """Folder for packing indices where the data's own folder cannot be written."""
    evaluation: Evaluation | None = None
    """Loss on held-out data at an interval."""


class Batch(Section):
    samples: Whole = 8
    """Samples of one optimizer step, all ranks and micro-batches together (the global batch)."""
    micro: Whole = 1
    """Samples that one rank takes through the model at a time."""


class Exchange(StrEnum):
    FLAT = "flat"
    TOPOLOGY = "topology"


class PipelineSchedule(StrEnum):
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZERO_BUBBLE = "zero_bubble"


class Recompute(StrEnum):
    NONE = "none"
    BLOCK = "block"


class Parallel(Section):
    """World size = pipeline x replicate x shard; `expert` divides `shard`."""

    replicate: Whole = 1
    """Copies of the sharded model (the outer dimension of HSDP)."""
    shard: Whole | Literal["rest"] = "rest"
    """Ranks that share one copy's parameters, gradients and optimizer state (FSDP2). `rest`: what remains."""
    expert: Whole = 1
    """Ranks of a shard group among which the experts of a layer are divided."""
    pipeline: Whole = 1
    """Stages in depth."""
    schedule: PipelineSchedule = PipelineSchedule.ONE_F_ONE_B
    """Order of forward and backward passes in the pipeline."""
    stages_per_rank: Whole | None = None
    """Model parts a rank holds; none: 1, or 2 for `interleaved` and `zero_bubble`."""
    exchange: Exchange = Exchange.FLAT
    """How tokens reach experts elsewhere. `topology`: once to each node, then inside the node."""
    recompute: Recompute = Recompute.NONE
    """`block`: keep only the input of each layer and compute it again in the backward pass."""
    reshard: bool = True
    """Free gathered parameters after the forward pass. False needs more memory and fewer collectives."""
    compile: bool = False
    """Run every layer through `torch.compile`."""
    timeout_seconds: Positive = 600.0
    """A collective that takes longer ends the process."""


class Dtype(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"


class AttentionKernel(StrEnum):
    AUTO = "auto"
    MATH = "math"
    EFFICIENT = "efficient"
    FLASH = "flash"
    CUDNN = "cudnn"


class ExpertsKernel(StrEnum):
    AUTO = "auto"
    GROUPED = "grouped"
    LOOP = "loop"


class Precision(Section):
    """Parameters and optimizer state are always fp32 (the master copy)."""

    compute: Dtype = Dtype.FP32
    """Of matrix products and activations."""
    reduce: Dtype = Dtype.FP32
    """Of the gradients' reduction between ranks."""
    attention_kernel: AttentionKernel = AttentionKernel.AUTO
    """`auto`: torch chooses among those that work. `python -m ltf numerics` tries each."""
    experts_kernel: ExpertsKernel = ExpertsKernel.AUTO
    """`auto`: one kernel for all experts where torch has it. `loop`: one expert after the other."""


class Optimizer(Section):
    """AdamW (arXiv 1711.05101); norms and routers' biases do not decay."""

    lr: Positive = 3e-4
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled, of matrices only."""
    clip: Positive | None = 1.0
    """Largest global gradient norm; none: not clipped."""
    warmup_steps: NotNegative = 100
    """Steps of linear growth from 0 to `lr`."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How `lr` falls after the warm-up."""
    decay_steps: Whole | None = None
    """The last steps of the run over which it falls; none: all after the warm-up."""
    final_fraction: Share = 0.1
    """`lr` at the end, as a fraction of the peak."""


class Checkpoint(Section):
    directory: Path | None = None
    """None: `checkpoints` in the run's output folder."""
    every_steps: Whole | None = 1000
    """Steps between two checkpoints; none: by time, by signal and at the end only."""
    every_minutes: Positive | None = None
    """Minutes between two checkpoints, beside `every_steps`."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Good checkpoints that stay, the newest; never fewer than two."""
    keep_every: Whole | None = None
    """Steps whose multiples stay for ever."""
    at_end: bool = True
    """Save after the last step."""
    background: bool = True
    """Write while training goes on; otherwise training stands still until all is durable."""
    grace_seconds: Positive = 60.0
    """On SIGTERM, how long saving may take before the process ends anyway."""
    give_up_after_minutes: Positive = 120.0
    """The run stops when no save has worked for so long since one was first due."""


class Answer(StrEnum):
    """What a finding of a guard leads to."""

    LOG = "log"
    SKIP = "skip"
    ROLL_BACK = "roll_back"
    STOP = "stop"


class FiniteGuard(Section):
    """Loss, activations and gradients are numbers."""

    enabled: bool = True
    """Look at all."""
    answer: Answer = Answer.SKIP
    """`skip`: this batch changes nothing. `roll_back`: also return to the last good checkpoint."""
    give_up_after: Whole = 10
    """Findings in a row after which the run stops."""


class SpikeGuard(Section):
    """Loss and gradient norm against their own recent past: z = 0.6745 (x - median) / MAD."""

    enabled: bool = True
    """Look at all."""
    window: Annotated[int, Field(ge=8)] = 128
    """Steps of the past that are compared with."""
    warmup: Whole = 64
    """Steps before anything is flagged."""
    loss_z: Positive = 10.0
    """A loss above this robust z-score is a spike."""
    norm_z: Positive = 20.0
    """A gradient norm, global or of a layer, above this is a spike."""
    floor: Positive = 0.01
    """Smallest deviation that counts as one, relative to the median."""
    answer: Answer = Answer.LOG
    """What a spike leads to."""
    give_up_after: Whole = 10
    """Roll-backs after which the run stops."""


class CollapseGuard(Section):
    """Parameter norms by layer: in a healthy mixture of experts they grow with depth."""

    enabled: bool = True
    """Look at all."""
    every_steps: Whole = 100
    """Steps between two profiles."""
    depth: Share = 0.1
    """How far, relative to the shoulders, the middle layers may lie below them."""
    patience: Whole = 3
    """Profiles in a row that show a deepening valley before it is a finding."""
    answer: Answer = Answer.LOG
    """What a valley leads to."""


class CorruptionGuard(Section):
    """Compute a step again and compare the bits (silent data corruption)."""

    enabled: bool = True
    """Look at all."""
    every_steps: Whole | None = 1000
    """Steps between two replays; none: on suspicion only."""
    on_suspicion: bool = True
    """Also when a step is not finite or spikes."""
    partner: bool = True
    """Also let another rank compute the same and compare."""
    answer: Answer = Answer.STOP
    """What a proven fault leads to; a transient one is always repaired by the replay."""


class Guard(Section):
    finite: FiniteGuard = FiniteGuard()
    """Non-finite numbers."""
    spikes: SpikeGuard = SpikeGuard()
    """Sudden rises."""
    collapse: CollapseGuard = CollapseGuard()
    """A valley in the parameter norms."""
    corruption: CorruptionGuard = CorruptionGuard()
    """Silent data corruption."""


class Balance(Section):
    mode: Literal["static", "auto"] = "static"
    """`auto`: slow ranks take fewer micro-batches of the same global batch. Results then repeat only within
    rounding, since who computes what follows measured speed."""
    every_steps: Whole = 20
    """Steps between two plans."""
    window: Whole = 20
    """Steps whose measured speed a plan follows."""
    threshold: Annotated[float, Field(ge=1)] = 1.05
    """A new plan must promise this factor in speed, by either half of the window alone."""
    saved_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    """Seconds of forward work that it would have saved in the window: less is not worth a change."""


class Noise(Section):
    gc_every_steps: Whole | None = 50
    """Python's garbage is collected at these steps, on all ranks together; none: whenever Python likes."""
    drop_page_cache: bool = False
    """Ask the kernel to drop its page cache before the run (needs the right to write to /proc/sys/vm)."""
    slow_factor: Annotated[float, Field(gt=1)] = 1.3
    """A rank whose own work takes this many times its peers' median is a finding."""
    slow_steps: Whole = 20
    """Steps over which it must do so."""
    jitter_factor: Annotated[float, Field(gt=1)] = 2.0
    """A rank whose slow steps (95th percentile) take this many times its own median is a finding, if it is
    unsteadier than its peers by this factor too."""
    lost_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Seconds of forward work that either must have cost before it is one: what a shared host does to steps
    of milliseconds is no rank's fault."""


class Output(Section):
    log_every: Whole = 10
    """Steps between two lines for people; events have every step."""
    heartbeat_seconds: Positive = 10.0
    """Between two heartbeats of every rank."""
    tensorboard: bool = False
    """Also write TensorBoard files (needs the `tensorboard` package)."""
    peak_flops: Positive | Literal["measure"] | None = None
    """Peak FLOP/s of one device at the compute dtype, for MFU. `measure`: by a matrix product at the start.
    None: from the table of known devices; for an unknown one MFU is not shown."""


class Config(Section):
    run: Run = Run()
    """The run as a whole."""
    model: ModelArgs
    """The shape of the model."""
    data: Data = Data()
    """What it reads."""
    batch: Batch = Batch()
    """How much it reads at a time."""
    parallel: Parallel = Parallel()
    """How the ranks share the work."""
    precision: Precision = Precision()
    """In which numbers."""
    optimizer: Optimizer = Optimizer()
    """How weights move."""
    checkpoint: Checkpoint = Checkpoint()
    """What survives."""
    guard: Guard = Guard()
    """What is watched."""
    balance: Balance = Balance()
    """Who takes how much."""
    noise: Noise = Noise()
    """What disturbs the step."""
    output: Output = Output()
    """What is told."""
