"""The shape of a model as a value, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum


class ModelArgsError(ValueError):
    """A field of the model's shape is wrong. One line: field, found, expected, what to do."""

    def __init__(self, name: str, found: object, expected: str, fix: str) -> None:
        super().__init__(f"model.{name}: found {found!r}, expected {expected}; {fix}")
        self.field = name
        self.found = found
        self.expected = expected
        self.fix = fix


class ScoreFunction(StrEnum):
    """How router logits become scores: over all experts together, or each expert by itself."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


class BalanceLoss(StrEnum):
    """Over which tokens the auxiliary loss asks for an even load."""

    NONE = "none"
    SEQUENCE = "sequence"
    BATCH = "batch"


class InitScheme(StrEnum):
    """One Gaussian for all matrices, or those that write to the residual stream over sqrt(2 * layers)."""

    GAUSSIAN = "gaussian"
    SCALED_OUTPUT = "scaled_output"


@dataclass(frozen=True)
class InitArgs:
    """`std`: standard deviation of every matrix. `router_std`: of the routers; absent: `std`."""

    scheme: InitScheme = InitScheme.GAUSSIAN
    std: float = 0.02
    router_std: float | None = None

    def __post_init__(self) -> None:
        _member("init.scheme", self.scheme, InitScheme)
        _positive("init.std", self.std)
        if self.router_std is not None:
            _positive("init.router_std", self.router_std)


@dataclass(frozen=True)
class MoEArgs:
    """The mixture-of-experts layers.

    `top_k`: experts a token; one number, or one for each MoE layer in order. `expert_width`: hidden width of
    one expert. `shared_experts`: experts every token passes through, built as one SwiGLU of `shared_experts *
    expert_width`. `dense_layers`: how many layers at the start have no experts. `renormalise`: the chosen
    scores of a token sum to one; then all are multiplied by `route_scale`. `bias_update_rate`: step of the
    bias that evens the load without a loss (0: no bias; arXiv 2408.15664).
    """

    experts: int
    top_k: int | tuple[int, ...]
    expert_width: int
    shared_experts: int = 0
    dense_layers: int = 0
    score: ScoreFunction = ScoreFunction.SOFTMAX
    renormalise: bool = True
    route_scale: float = 1.0
    balance_loss: BalanceLoss = BalanceLoss.BATCH
    balance_coefficient: float = 1e-3
    z_coefficient: float = 0.0
    bias_update_rate: float = 0.0

    def __post_init__(self) -> None:
        _at_least("moe.experts", self.experts, 1)
        _at_least("moe.expert_width", self.expert_width, 1)
        _at_least("moe.shared_experts", self.shared_experts, 0)
        _at_least("moe.dense_layers", self.dense_layers, 0)
        _member("moe.score", self.score, ScoreFunction)
        _member("moe.balance_loss", self.balance_loss, BalanceLoss)
        _positive("moe.route_scale", self.route_scale)
        for name in ("balance_coefficient", "z_coefficient", "bias_update_rate"):
            _not_negative(f"moe.{name}", getattr(self, name))
        top_ks = (self.top_k,) if isinstance(self.top_k, int) else self.top_k
        if not top_ks or any(not 1 <= k <= self.experts for k in top_ks):
            raise ModelArgsError(
                "moe.top_k",
                self.top_k,
                f"numbers from 1 to {self.experts} (moe.experts)",
                "choose fewer experts a token or more experts",
            )
        if self.renormalise and min(top_ks) == 1:
            raise ModelArgsError(
                "moe.renormalise",
                True,
                "false where a layer's top_k is 1",
                "set it to false: a single renormalised score is always 1 and the router would learn nothing",
            )


@dataclass(frozen=True)
class ModelArgs:
    """The shape of a decoder. Widths are in elements.

    `ffn_width`: hidden width of a dense layer's SwiGLU, needed where a layer is dense.
    `max_positions`: longest sequence it is meant for, in tokens; written into exports.
    """

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int | None = None
    moe: MoEArgs | None = None
    qk_norm: bool = True
    tied_embeddings: bool = False
    norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_positions: int = 4096
    init: InitArgs = field(default_factory=InitArgs)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "layers", "width", "heads", "kv_heads", "head_dim", "max_positions"):
            _at_least(name, getattr(self, name), 1)
        _positive("norm_eps", self.norm_eps)
        _positive("rope_theta", self.rope_theta)
        if self.heads % self.kv_heads:
            raise ModelArgsError(
                "kv_heads",
                self.kv_heads,
                f"a divisor of {self.heads} (model.heads)",
                f"one of {', '.join(map(str, _divisors(self.heads)))}",
            )
        if self.head_dim % 2:
            raise ModelArgsError(
                "head_dim",
                self.head_dim,
                "an even number",
                "rotary embedding turns pairs of elements: add one",
            )
        self._check_feed_forward()

    def _check_feed_forward(self) -> None:
        moe = self.moe
        if moe is not None and moe.dense_layers >= self.layers:
            raise ModelArgsError(
                "moe.dense_layers",
                moe.dense_layers,
                f"less than {self.layers} (model.layers)",
                "lower it, or leave out model.moe for a dense model",
            )
        dense = self.layers if moe is None else moe.dense_layers
        if dense and self.ffn_width is None:
            raise ModelArgsError(
                "ffn_width",
                None,
                f"a width, as {dense} layers are dense",
                "set it (a common choice: 8/3 of model.width)",
            )
        if self.ffn_width is not None:
            _at_least("ffn_width", self.ffn_width, 1)
        sparse = self.layers - dense
        if moe is not None and isinstance(moe.top_k, tuple) and len(moe.top_k) != sparse:
            raise ModelArgsError(
                "moe.top_k",
                moe.top_k,
                f"{sparse} numbers (model.layers minus moe.dense_layers)",
                f"it has {len(moe.top_k)}; give one for each MoE layer, or a single number for all",
            )

    def is_moe(self, layer: int) -> bool:
        """Whether the layer of that index (from 0) has experts."""
        return self.moe is not None and layer >= self.moe.dense_layers

    def top_k(self, layer: int) -> int:
        """Experts a token in that layer; 0 where the layer is dense."""
        if self.moe is None or layer < self.moe.dense_layers:
            return 0
        chosen = self.moe.top_k
        return chosen if isinstance(chosen, int) else chosen[layer - self.moe.dense_layers]

    @property
    def moe_layers(self) -> range:
        """Indices of the layers that have experts."""
        return range(self.layers if self.moe is None else self.moe.dense_layers, self.layers)


@dataclass(frozen=True)
class Stage:
    """The part of a model that one module holds: layers by index, and whether it has the two ends."""

    layers: tuple[int, ...]
    embed: bool = True
    head: bool = True

    @classmethod
    def whole(cls, args: ModelArgs) -> Stage:
        return cls(tuple(range(args.layers)))

    def check(self, args: ModelArgs) -> None:
        """Raise ModelArgsError unless the stage can be cut out of such a model."""
        wrong = [i for i in self.layers if not 0 <= i < args.layers]
        if wrong or list(self.layers) != sorted(set(self.layers)):
            raise ModelArgsError(
                "stage.layers",
                self.layers,
                f"rising indices from 0 to {args.layers - 1} (model.layers)",
                "give each layer to one stage, in order",
            )
        if args.tied_embeddings and self.embed != self.head:
            raise ModelArgsError(
                "tied_embeddings",
                True,
                "false where one stage has the embedding and another the head",
                "set it to false, or use one pipeline stage",
            )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ModelArgsError(name, value, f"a whole number, {least} or more", "correct the number")


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ModelArgsError(name, value, "a finite number above 0", "correct the number")


def _not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ModelArgsError(
            name, value, "a finite number, 0 or more", "correct the number, or 0 to switch it off"
        )


def _member(name: str, value: object, choices: type[StrEnum]) -> None:
    if not isinstance(value, choices):
        names = [str(choice) for choice in choices]
        raise ModelArgsError(name, value, f"one of {', '.join(names)}", f"as a {choices.__name__}")
