"""The settings as a tree, from the schema: what each may be, its default and what it is for."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ltf.config.document import Place
from ltf.config.schema import Config, Section

MODEL = {
    "vocab_size": "Token ids are below it. A multiple of 64 or more suits accelerators.",
    "layers": "Layers, dense and sparse together.",
    "width": "Of the residual stream.",
    "heads": "Of queries.",
    "kv_heads": "Of keys and values; divides `heads`.",
    "head_dim": "Width of a head, even.",
    "ffn_width": "Hidden width of a dense layer's SwiGLU; needed where a layer is dense.",
    "moe": "The mixture-of-experts layers; nothing: a dense model.",
    "qk_norm": "Normalise queries and keys.",
    "tied_embeddings": "The head is the embedding's matrix.",
    "norm_eps": "Added to the mean square in RMSNorm.",
    "rope_theta": "Base of the rotary embedding's wavelengths.",
    "max_positions": "Longest sequence the model is meant for, in tokens; written into exports.",
    "init": "First values of the weights.",
    "moe.experts": "Of a layer.",
    "moe.top_k": "Experts a token; one number, or one for each sparse layer in order.",
    "moe.expert_width": "Hidden width of one expert.",
    "moe.shared_experts": "Experts that every token passes through, built as one, that many times as wide.",
    "moe.dense_layers": "Layers at the start that have no experts.",
    "moe.score": "How router logits become scores: over all experts, or each by itself.",
    "moe.renormalise": "The chosen scores of a token sum to one. False where `top_k` is 1.",
    "moe.route_scale": "Factor on the chosen scores.",
    "moe.balance_loss": "Over which tokens the auxiliary loss asks for an even load.",
    "moe.balance_coefficient": "Weight of that loss.",
    "moe.z_coefficient": "Weight of the z-loss, which keeps router logits small (arXiv 2202.08906).",
    "moe.bias_update_rate": "Step of the bias that evens load without a loss; 0: none (arXiv 2408.15664).",
    "init.scheme": "One Gaussian for all matrices, or outputs to the residual stream over sqrt(2 x layers).",
    "init.std": "Standard deviation of every matrix.",
    "init.router_std": "Of the routers; nothing: `init.std`.",
}
"""Meanings below `model`, whose types are plain dataclasses."""


class _Required:
    """Stands where a setting has no default."""


REQUIRED = _Required()


@dataclass(frozen=True)
class Setting:
    """`children`: the settings of a section; where `listed`, of each in a list. `notes`: on a section."""

    expected: str
    default: Any
    meaning: str
    children: Mapping[str, Setting]
    listed: bool
    notes: str

    @property
    def required(self) -> bool:
        return self.default is REQUIRED


@cache
def settings() -> Mapping[str, Setting]:
    """The sections of a configuration by key."""
    return _section(Config, "")


def at(place: Place) -> Setting | None:
    """The setting that a place in a file belongs to; None where the schema knows none."""
    found: Setting | None = None
    children = settings()
    for index, key in enumerate(place):
        if isinstance(key, int):
            if found is None or (not found.listed and index != len(place) - 1):
                return None
            continue
        found = children.get(key)
        if found is None:
            return None
        children = found.children
    return found


def describe(annotation: Any) -> str:
    """What a value of that type is, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return describe(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        return _choices(arguments)
    if origin in (Union, types.UnionType):
        return _alternatives(arguments)
    if origin is list:
        return f"a list of {'sections' if _is_section(arguments[0]) else describe(arguments[0])}"
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list of {describe(arguments[0]).removeprefix('a ')}s"
        return f"a list of {len(arguments)}, each {describe(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return _choices(tuple(annotation))
    return _PLAIN.get(annotation, "a section")


_PLAIN = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    types.NoneType: "nothing",
}


def _section(of: type[Any], path: str) -> dict[str, Setting]:
    hints = typing.get_type_hints(of, include_extras=True)
    return {key: _setting(of, key, hints[key], path) for key in _keys(of)}


def _keys(of: type[Any]) -> list[str]:
    if issubclass(of, BaseModel):
        return list(of.model_fields)
    return [field.name for field in dataclasses.fields(of)]


def _setting(of: type[Any], key: str, hint: Any, path: str) -> Setting:
    inner, listed = _sections_in(hint)
    below = f"{path}.{key}" if path else key
    children = {} if inner is None else _section(inner, below)
    if issubclass(of, BaseModel):
        info: FieldInfo = of.model_fields[key]
        default, meaning = info.get_default(call_default_factory=True), info.description or ""
        if default is PydanticUndefined:
            default = REQUIRED
    else:
        field = next(one for one in dataclasses.fields(of) if one.name == key)
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        default = REQUIRED if made is dataclasses.MISSING else made
        meaning = MODEL[below.removeprefix("model.")]
    notes = inner.__doc__ if inner is not None and issubclass(inner, Section) else None
    # A section without words of its own would show those of its parent class.
    own = "" if notes is None or notes == Section.__doc__ else notes
    return Setting(
        describe(hint), default, " ".join(meaning.split()), children, listed, " ".join(own.split())
    )


def _sections_in(hint: Any) -> tuple[type[Any] | None, bool]:
    """The section type inside `X`, `X | None`, `list[X]`, and whether it is a list."""
    if _is_section(hint):
        return hint, False
    for part in typing.get_args(hint):
        found, listed = _sections_in(part)
        if found is not None:
            return found, listed or typing.get_origin(hint) is list
    return None, False


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and (issubclass(hint, BaseModel) or dataclasses.is_dataclass(hint))


def _alternatives(arguments: tuple[Any, ...]) -> str:
    words = [describe(one) for one in arguments]
    return (", or " if any("," in word for word in words) else " or ").join(words)


def _choices(values: tuple[Any, ...]) -> str:
    names = [str(value) for value in values]
    return f"`{names[0]}`" if len(names) == 1 else f"one of {', '.join(names)}"


def _bounds(metadata: tuple[Any, ...]) -> str:
    flat: list[Any] = []
    for one in metadata:
        flat += one.metadata if isinstance(one, FieldInfo) else [one]
    least = next((f"{one.ge:g}" for one in flat if isinstance(one, Ge)), None)
    most = next((f"{one.le:g}" for one in flat if isinstance(one, Le)), None)
    if least is not None and most is not None:
        return f" from {least} to {most}"
    words = {Gt: " above {:g}", Lt: " below {:g}"}
    if least is not None:
        return f", {least} or more"
    if any(isinstance(one, MinLen) for one in flat):
        return ", not empty"
    for one in flat:
        for bound, text in words.items():
            if isinstance(one, bound):
                return text.format(getattr(one, bound.__name__.lower()))
    return ""
