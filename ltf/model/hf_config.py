"""config.json of transformers' Qwen3 and Qwen3-MoE, to and from a model's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ltf.model.args import InitArgs, ModelArgs, ModelArgsError, MoEArgs, ScoreFunction

# What our decoder does not do: (field, the one value that it can take).
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "decoder_sparse_step": 1,
}


class HfError(ValueError):
    """A folder, config.json or model that cannot be carried over. One line: what, and what to do."""


def args_from_config(config: Mapping[str, Any]) -> ModelArgs:
    """The shape in a config.json of transformers 4 or 5; HfError if this decoder has no such shape."""
    kind = config.get("model_type")
    if kind not in ("qwen3", "qwen3_moe"):
        raise HfError(f"config.json: model_type is {kind!r}, only qwen3 and qwen3_moe are read")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise HfError(f"config.json: {name} is {config[name]!r}, only {value!r} can be carried over")
    moe = _moe(config) if kind == "qwen3_moe" else None
    all_sparse = moe is not None and moe.dense_layers == 0
    heads, width = _number(config, "num_attention_heads"), _number(config, "hidden_size")
    try:
        return ModelArgs(
            vocab_size=_number(config, "vocab_size"),
            layers=_number(config, "num_hidden_layers"),
            width=width,
            heads=heads,
            kv_heads=_number(config, "num_key_value_heads"),
            head_dim=config.get("head_dim") or width // heads,
            ffn_width=None if all_sparse else _number(config, "intermediate_size"),
            moe=moe,
            qk_norm=True,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=_rope_theta(config),
            max_positions=int(config.get("max_position_embeddings", 32768)),
            init=InitArgs(std=float(config.get("initializer_range", 0.02))),
        )
    except ModelArgsError as error:
        raise HfError(f"config.json describes a model that cannot be built: {error}") from error


def config_from_args(args: ModelArgs, dtype: torch.dtype) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read alike; HfError if Qwen3 cannot express the model."""
    _check_expressible(args)
    moe = args.moe
    kind, architecture = "qwen3", "Qwen3ForCausalLM"
    if moe is not None:
        kind, architecture = "qwen3_moe", "Qwen3MoeForCausalLM"
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": kind,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": args.vocab_size,
        "num_hidden_layers": args.layers,
        "hidden_size": args.width,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        # Qwen3-MoE wants a number even where no layer is dense.
        "intermediate_size": args.ffn_width or args.width,
        "tie_word_embeddings": args.tied_embeddings,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
        "max_position_embeddings": args.max_positions,
        "initializer_range": args.init.std,
        **{name: value for name, value in FIXED.items() if moe is not None or name != "decoder_sparse_step"},
    }
    if moe is not None:
        config |= {
            "num_experts": moe.experts,
            "num_experts_per_tok": args.top_k(args.moe_layers[0]),
            "moe_intermediate_size": moe.expert_width,
            "norm_topk_prob": moe.renormalise,
            "mlp_only_layers": list(range(moe.dense_layers)),
        }
    return config


def _check_expressible(args: ModelArgs) -> None:
    def refuse(field: str, found: object, only: str) -> None:
        raise HfError(f"model.{field} is {found!r}; Qwen3 has only {only}: it cannot be exported as one")

    if not args.qk_norm:
        refuse("qk_norm", False, "normalised queries and keys")
    moe = args.moe
    if moe is None:
        return
    if moe.shared_experts:
        refuse("moe.shared_experts", moe.shared_experts, "routed experts")
    if moe.score is not ScoreFunction.SOFTMAX:
        refuse("moe.score", str(moe.score), "softmax scores")
    if moe.route_scale != 1.0:
        refuse("moe.route_scale", moe.route_scale, "a scale of 1")
    if moe.bias_update_rate > 0:
        refuse("moe.bias_update_rate", moe.bias_update_rate, "routers without a bias")
    if len({args.top_k(layer) for layer in args.moe_layers}) > 1:
        refuse("moe.top_k", moe.top_k, "one top_k for all layers")


def _moe(config: Mapping[str, Any]) -> MoEArgs:
    dense = sorted(config.get("mlp_only_layers") or [])
    if dense != list(range(len(dense))):
        raise HfError(f"config.json: mlp_only_layers is {dense}, only the first layers can be dense here")
    experts = "num_experts" if "num_experts" in config else "num_local_experts"
    return MoEArgs(
        experts=_number(config, experts),
        top_k=_number(config, "num_experts_per_tok"),
        expert_width=_number(config, "moe_intermediate_size"),
        dense_layers=len(dense),
        renormalise=bool(config.get("norm_topk_prob", False)),
    )


def _rope_theta(config: Mapping[str, Any]) -> float:
    """transformers 5 has it inside `rope_parameters`, 4 beside `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise HfError(f"config.json: rope type is {kind!r}, only 'default' can be carried over")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise HfError("config.json has no rope_theta: add it, the model's angles depend on it")
    return float(theta)


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise HfError(f"config.json: {name} is {value!r}, expected a whole number")
    return value
