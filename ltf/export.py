"""``python -m ltf export CHECKPOINT OUT``: a folder that transformers loads and generates text with."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltf.checkpoint.load import load_model
from ltf.checkpoint.manifest import Unfit
from ltf.checkpoint.store import PREFIX, Entry, Store
from ltf.data import tokenizer as tokenizers
from ltf.data.errors import DataError
from ltf.data.tokenizer import ByteTokenizer, FileTokenizer
from ltf.model import hf
from ltf.model.args import ModelArgs
from ltf.model.hf_config import HfError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
END, PADDING = "<|endoftext|>", "<|pad|>"
MOST_BYTES = 1024
"""A model whose vocabulary is no larger is taken to read bytes, unless a tokenizer is named."""


def main(argv: Sequence[str] | None = None) -> int:
    """0: done. 2: the checkpoint cannot be read, or Qwen3 cannot express the model; one line on stderr."""
    options = _parser().parse_args(argv)
    try:
        entry = _entry(options.checkpoint)
        with warnings.catch_warnings():
            # One process reads all; torch takes the absence of others for a slip.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            config, model = load_model(entry)
        args = config.model
        tokenizer = options.tokenizer or _usual(args)
        files = export(
            model.state_dict(), args, options.output, dtype=DTYPES[options.dtype], tokenizer=tokenizer
        )
    except Unfit as error:
        print(f"error: {entry.path}: {error}; export another checkpoint: {_before(entry)}", file=sys.stderr)
        return 2
    except (HfError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in files)
    number = f"{len(files)} weight file{'' if len(files) == 1 else 's'}"
    print(f"{options.output}: step {entry.version}, {number}, {size / 2**20:,.1f} MiB, {options.dtype}")
    if tokenizer is None:
        print("no tokenizer: name the data's with --tokenizer for text in and out", file=sys.stderr)
    return 0


def export(
    state: Mapping[str, Tensor],
    args: ModelArgs,
    output: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: str | None = None,
) -> list[Path]:
    """Write the folder, whole or not at all; returns its weight files.

    `tokenizer`: `bytes`, or the path of a tokenizer.json; None: none is written. HfError where Qwen3 cannot
    express the model or `output` exists, DataError where the tokenizer does not fit the model.
    """
    loaded = None if tokenizer is None else tokenizers.load(tokenizer)
    if loaded is not None and loaded.vocabulary > args.vocab_size:
        raise DataError(
            f"has {loaded.vocabulary} tokens, the model {args.vocab_size}: name the one it was trained with",
            tokenizer,
        )
    if output.exists():
        raise HfError(f"{output} exists: name a new folder, or remove that one")
    making = output.with_name(f".{output.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    try:
        hf.export(state, args, making, dtype=dtype)
        if isinstance(loaded, ByteTokenizer):
            _write_json(making / "tokenizer.json", byte_tokenizer())
            _write_json(making / "tokenizer_config.json", _byte_settings(args))
        elif isinstance(loaded, FileTokenizer):
            assert tokenizer is not None  # it was loaded from there
            _copy_tokenizer(Path(tokenizer), loaded, making, args)
        if loaded is not None:
            _write_json(making / "generation_config.json", _generation(loaded, args))
        making.rename(output)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return sorted(output.glob("*.safetensors"))


def byte_tokenizer() -> dict[str, Any]:
    """A tokenizer.json whose ids are those of `ltf.data.tokenizer.ByteTokenizer`."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    vocabulary = {character: byte for byte, character in enumerate(_characters())}
    vocabulary |= {END: ByteTokenizer.end_of_document, PADDING: ByteTokenizer.padding}
    made = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END, PADDING])
    content: dict[str, Any] = json.loads(made.to_str())
    return content


def _characters() -> list[str]:
    """What the ByteLevel pre-tokenizer writes for each byte: itself where it prints, else from U+0100 on."""
    prints = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    replaced = iter(range(0x100, 0x200))
    return [chr(byte if byte in prints else next(replaced)) for byte in range(256)]


def _byte_settings(args: ModelArgs) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PADDING,
        "model_max_length": args.max_positions,
        "clean_up_tokenization_spaces": False,
        # The names of the specials inside a text are text there, as they were in training.
        "split_special_tokens": True,
    }


def _copy_tokenizer(source: Path, loaded: FileTokenizer, folder: Path, args: ModelArgs) -> None:
    file = source / "tokenizer.json" if source.is_dir() else source
    content = json.loads(file.read_text())
    _write_json(folder / "tokenizer.json", content)
    beside = file.with_name("tokenizer_config.json")
    if beside.is_file():
        shutil.copyfile(beside, folder / beside.name)
        return
    end = loaded.token(loaded.end_of_document)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "pad_token": end,
            "model_max_length": args.max_positions,
            "clean_up_tokenization_spaces": False,
        },
    )


def _generation(loaded: tokenizers.Tokenizer, args: ModelArgs) -> dict[str, Any]:
    """Ids that only fill the vocabulary up are never chosen."""
    end = loaded.end_of_document
    return {
        "eos_token_id": end,
        "pad_token_id": loaded.padding if isinstance(loaded, ByteTokenizer) else end,
        **_unused(loaded.vocabulary, args.vocab_size),
    }


def _unused(first: int, end: int) -> dict[str, list[int]]:
    return {"suppress_tokens": list(range(first, end))} if first < end <= first + MOST_BYTES else {}


def _entry(path: Path) -> Entry:
    """A checkpoint by its own folder, or the newest good one of a run's folder."""
    if path.name.startswith(PREFIX):
        chosen = [entry for entry in Store(path.parent).entries() if entry.path.name == path.name]
        found = chosen[0] if chosen else None
    else:
        found = Store(path).latest() or Store(path / "checkpoints").latest()
    if found is None:
        raise HfError(
            f"{path} is no checkpoint and holds no good one: give a folder {PREFIX}NUMBER or a run's"
        )
    return found


def _before(entry: Entry) -> str:
    """What can be exported in its place: the newest that is whole, of those before it."""
    for other in reversed(Store(entry.path.parent).entries()):
        if other.version < entry.version:
            try:
                other.verify()
            except Unfit:
                continue
            return f"{other.path} is good"
    return "no older one is good"


def _usual(args: ModelArgs) -> str | None:
    return tokenizers.BYTES if ByteTokenizer.vocabulary <= args.vocab_size <= MOST_BYTES else None


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ltf export",
        description="A checkpoint as a folder that transformers loads.",
        epilog="example: python -m ltf export ltf-run exported",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="its folder, or the run's")
    parser.add_argument("output", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="bf16", help="of the weights (default bf16)"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="a tokenizer.json to go with it; default: bytes for a model of bytes, else none",
    )
    return parser
