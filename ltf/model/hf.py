"""Models on disk in the layout of transformers' Qwen3 and Qwen3-MoE: config.json and safetensors.

Both ways the mapping of names is pure; files are read and written one tensor at a time, in shards of bounded
size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltf.model.args import ModelArgs
from ltf.model.decoder import Decoder
from ltf.model.hf_config import HfError, args_from_config, config_from_args

ENDS = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
# Ours -> theirs. Several names: cut along the first dimension in that order. {e}: one tensor an expert.
LAYER = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.q.weight": ("self_attn.q_proj.weight",),
    "attention.k.weight": ("self_attn.k_proj.weight",),
    "attention.v.weight": ("self_attn.v_proj.weight",),
    "attention.o.weight": ("self_attn.o_proj.weight",),
    "attention.q_norm.weight": ("self_attn.q_norm.weight",),
    "attention.k_norm.weight": ("self_attn.k_norm.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
    "ffn.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "ffn.down.weight": ("mlp.down_proj.weight",),
    "ffn.router.weight": ("mlp.gate.weight",),
    "ffn.experts.gate_up": ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
    "ffn.experts.down": ("mlp.experts.{e}.down_proj.weight",),
}
# transformers 5 keeps experts stacked in memory, and some files have them so.
STACKED = {
    "ffn.experts.gate_up": "mlp.experts.gate_up_proj",
    "ffn.experts.down": "mlp.experts.down_proj",
}
SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"


def load(path: Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Decoder:
    """The model in that folder. HfError if it is not whole, or not of a shape that this decoder has."""
    args = args_from_config(_read_json(path / "config.json"))
    with torch.device("meta"):
        model = Decoder(args)
    model = model.to(dtype).to_empty(device=device)
    load_into(model, path)
    return model


@torch.no_grad()
def load_into(model: Decoder, path: Path) -> None:
    """Fill a model, or a stage's part of one, from that folder; values are cast to the parameters' dtype."""
    with Reader.open(path) as reader:
        for name, parameter in model.named_parameters():
            reader.fill(parameter, name)
        reader.refuse_strangers(model.args)


class Reader:
    """The tensors of such a folder, read one at a time and only as asked for."""

    def __init__(self, path: Path, files: ExitStack) -> None:
        self._path = path
        self._files = files
        self._where = _locations(path)
        self._opened: dict[str, Any] = {}

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Reader]:
        with ExitStack() as files:
            yield cls(path, files)

    def fill(self, target: Tensor, name: str, *, first_expert: int = 0) -> None:
        """Copy their tensors into our parameter, piece by piece, so that no second copy of it is ever whole.

        Of a parameter of experts, `target` may be some experts in a row alone, from `first_expert` on.
        """
        if name not in ENDS:
            prefix, key = _layer(name)
            if key in STACKED and prefix + STACKED[key] in self._where:
                theirs = prefix + STACKED[key]
                _copy(
                    target,
                    self._file(theirs).get_slice(theirs)[first_expert : first_expert + len(target)],
                    theirs,
                )
                return
        for theirs, piece in split(name, target, first_expert=first_expert):
            if theirs not in self._where:
                raise HfError(
                    f"the files lack {theirs}, which {name} needs: the download or export is not whole"
                )
            _copy(piece, self._file(theirs).get_tensor(theirs), theirs)

    def refuse_strangers(self, args: ModelArgs) -> None:
        """HfError if a weight is there that no parameter takes: such a bias would change the answers."""
        with torch.device("meta"):
            whole = Decoder(args)
        known = {"lm_head.weight"} if args.tied_embeddings else set()
        for name, parameter in whole.named_parameters():
            known.update(theirs for theirs, _ in split(name, parameter))
            if name not in ENDS:
                prefix, key = _layer(name)
                known.update([prefix + STACKED[key]] if key in STACKED else [])
        strange = sorted(n for n in set(self._where) - known if not n.endswith("rotary_emb.inv_freq"))
        if strange:
            raise HfError(
                f"{self._path} has {_some(strange)}, for which this decoder has no place: another model"
            )

    def refuse_misfits(self, args: ModelArgs) -> None:
        """HfError if a weight is missing or has another shape; the files' headers alone are read."""
        with torch.device("meta"):
            whole = Decoder(args)
        for name, parameter in whole.named_parameters():
            stacked = STACKED.get(_layer(name)[1]) if name not in ENDS else None
            as_one = None if stacked is None else _layer(name)[0] + stacked
            pieces = [(as_one, parameter)] if as_one in self._where else split(name, parameter)
            for theirs, piece in pieces:
                assert theirs is not None
                if theirs not in self._where:
                    raise HfError(f"{self._path} lacks {theirs}, which this model needs: another model")
                found = tuple(self._file(theirs).get_slice(theirs).get_shape())
                if found != tuple(piece.shape):
                    raise HfError(
                        f"{self._path}: {theirs} has shape {found}, this model's is {tuple(piece.shape)}: "
                        "another model"
                    )

    def _file(self, theirs: str) -> Any:
        name = self._where[theirs]
        if name not in self._opened:
            self._opened[name] = self._files.enter_context(_open(self._path / name))
        if theirs not in self._opened[name].keys():  # noqa: SIM118  (not a mapping)
            raise HfError(
                f"{self._path / INDEX} says that {name} holds {theirs}, which it does not: copy both again"
            )
        return self._opened[name]


@torch.no_grad()
def export(
    state: Mapping[str, Tensor],
    args: ModelArgs,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write a whole model's `state_dict()` as a folder for `from_pretrained`; returns its weight files.

    The folder appears whole or not at all. HfError if Qwen3 cannot express the model, a parameter is missing,
    or the folder exists. `dtype`: of the weights written; absent: as they are.
    """
    from safetensors.torch import save_file

    config = config_from_args(args, dtype or next(iter(state.values())).dtype)
    if path.exists():
        raise HfError(f"{path} exists: name a new folder, or remove that one")
    shards = plan_shards(state, args, dtype, shard_bytes)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    size = 0
    try:
        for number, names in enumerate(shards, 1):
            file = _shard_name(number, len(shards))
            tensors = dict(_selected(state, names, dtype))
            save_file(tensors, partial / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            size += sum(tensor.nbytes for tensor in tensors.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(path.glob("*.safetensors"))


def plan_shards(
    state: Mapping[str, Tensor], args: ModelArgs, dtype: torch.dtype | None, shard_bytes: int
) -> list[list[tuple[str, int]]]:
    """The pieces of each file in order: our name, and the piece's number in what `split` yields."""
    with torch.device("meta"):
        expected = dict(Decoder(args).named_parameters())
    missing = sorted(set(expected) - set(state))
    if missing:
        raise HfError(f"the state lacks {_some(missing)}: export needs the whole model of all ranks")
    odd = sorted(name for name in expected if state[name].shape != expected[name].shape)
    if odd:
        raise HfError(f"the shape of {_some(odd)} is not that of the model: gather the ranks' parts first")
    shards: list[list[tuple[str, int]]] = [[]]
    filled = 0
    for name in expected:
        for piece, (_, tensor) in enumerate(split(name, state[name])):
            size = _bytes(tensor, dtype)
            if shards[-1] and filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append((name, piece))
            filled += size
    return shards


def split(name: str, tensor: Tensor, *, first_expert: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Our parameter as their tensors with their names, in a fixed order; views, nothing is copied.

    Of a parameter of experts, `tensor` may be some experts in a row alone, from `first_expert` on.
    """
    if name in ENDS:
        yield ENDS[name], tensor
        return
    prefix, key = _layer(name)
    experts = tensor.unbind() if key in STACKED else (tensor,)
    for e, matrix in enumerate(experts, first_expert):
        for theirs, piece in zip(LAYER[key], matrix.chunk(len(LAYER[key])), strict=True):
            yield prefix + theirs.format(e=e), piece


def _copy(target: Tensor, source: Tensor, theirs: str) -> None:
    if target.shape != source.shape:
        raise HfError(
            f"{theirs} has shape {tuple(source.shape)}, config.json says {tuple(target.shape)}: "
            "config.json and weights are not of one model"
        )
    target.copy_(source)


def _locations(path: Path) -> dict[str, str]:
    """Which file holds each tensor."""
    if (path / INDEX).is_file():
        weight_map = _read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(_is_plain(file) for file in weight_map.values()):
            raise HfError(f"{path / INDEX} has no weight_map from tensors to files beside it: copy it again")
        lost = sorted({file for file in weight_map.values() if not (path / file).is_file()})
        if lost:
            raise HfError(f"{path / INDEX} names {_some(lost)}, which is not there: copy the missing files")
        return weight_map
    single = path / "model.safetensors"
    if not single.is_file():
        raise HfError(f"{path} has neither {INDEX} nor model.safetensors: give the folder of a saved model")
    with _open(single) as file:
        return dict.fromkeys(file.keys(), single.name)


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise HfError(f"{file} is cut short or no safetensors file ({error}): copy it again") from error


def _is_plain(file: object) -> bool:
    """A file's bare name, so that an index cannot point outside its folder."""
    return isinstance(file, str) and file == Path(file).name


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise HfError(f"{file}: {error.strerror}: give the folder of a saved model") from error
    except ValueError as error:
        raise HfError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise HfError(f"{file} holds no JSON object: give the folder of a saved model")
    return content


def _layer(name: str) -> tuple[str, str]:
    """`layers.3.ffn.down.weight` -> (`model.layers.3.`, `ffn.down.weight`)."""
    _, index, key = name.split(".", 2)
    if key not in LAYER:
        raise HfError(f"{name} has no counterpart in Qwen3")
    return f"model.layers.{index}.", key


def _selected(
    state: Mapping[str, Tensor], names: list[tuple[str, int]], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    wanted: dict[str, set[int]] = {}
    for name, piece in names:
        wanted.setdefault(name, set()).add(piece)
    for name, pieces in wanted.items():
        for number, (theirs, tensor) in enumerate(split(name, state[name])):
            if number in pieces:
                yield theirs, tensor.detach().to(dtype=dtype, device="cpu").contiguous()


def _bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
