"""``python -m ltf data prepare|check|corpus``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from ltf.data import corpus
from ltf.data import manifest as manifests
from ltf.data.errors import DataError
from ltf.data.inputs import Documents
from ltf.data.megatron import TokenFile
from ltf.data.prepare import LONGEST_DOCUMENT, Progress, Recipe, held_out_prefix, prepare


def main(argv: Sequence[str] | None = None) -> int:
    """0: done. 2: the request or the data is wrong; one line on stderr says how."""
    options = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or 'input or output'}: {error.strerror}", file=sys.stderr)
    return 2


def _prepare(options: argparse.Namespace) -> int:
    recipe = Recipe(
        tokenizer=options.tokenizer,
        end_of_document=options.eod,
        field=options.field,
        documents=Documents(options.documents),
        held_out=options.held_out,
        skip_broken=options.skip_broken,
        overwrite=options.overwrite,
        longest=options.longest,
    )
    began = time.monotonic()
    shown = _Shown(quiet=options.quiet or not sys.stderr.isatty())
    made = prepare(options.inputs, options.output, recipe, processes=options.processes, progress=shown)
    shown.clear()
    seconds = time.monotonic() - began
    for broken in made.examples:
        print(f"skipped: {broken}", file=sys.stderr)
    if made.total.broken > len(made.examples):
        print(f"skipped: {made.total.broken} lines in all", file=sys.stderr)
    if options.json:
        print(json.dumps({"schema": "ltf/data-prepare/1", "seconds": seconds} | asdict(made)))
        return 0
    for prefix, side in ((options.output, made.train), (held_out_prefix(options.output), made.held_out)):
        if side is not None:
            print(f"{prefix}: {side.documents} documents, {side.tokens} tokens, vocabulary {side.vocabulary}")
    print(f"{made.total.tokens / seconds:,.0f} tokens/s, {made.total.empty} empty documents left out")
    return 0


def _check(options: argparse.Namespace) -> int:
    for prefix in options.prefixes:
        file = TokenFile(prefix)
        manifest = manifests.read(prefix)
        vocabulary = options.vocabulary or (manifest.vocabulary if manifest else None)
        file.validate(vocabulary)
        if options.whole and vocabulary is not None:
            file.scan(vocabulary)
        if manifest is not None:
            manifests.check(manifest, file, whole=options.whole)
        extent = "every token" if options.whole else "the index and a sample of the tokens"
        if vocabulary is None:
            extent = "the index; no manifest and no --vocabulary to hold the tokens to"
        print(
            f"{prefix}: {file.documents} documents, {file.tokens} {file.dtype.name} tokens; checked {extent}"
        )
    return 0


def _corpus(options: argparse.Namespace) -> int:
    output = Path(options.output)
    if output.suffix != ".jsonl":
        raise DataError("expected a name that ends in .jsonl", output)
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        with part.open("w") as file:
            for document in corpus.text(options.seed, options.bytes):
                file.write(json.dumps({"text": document}) + "\n")
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    return 0


class _Shown:
    """One line on a terminal, at most ten times a second."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet, self._next = quiet, 0.0

    def __call__(self, now: Progress) -> None:
        if self._quiet or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 0.1
        share = now.read / now.size if now.size else 1.0
        line = (
            f"{share:4.0%}  {now.documents:,} documents  {now.tokens:,} tokens  {now.broken:,} broken lines"
        )
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._next:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ltf data", description="Token files for training.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    made = commands.add_parser("prepare", help="turn text into a .bin/.idx pair")
    made.set_defaults(run=_prepare)
    made.add_argument(
        "inputs", nargs="+", help="text or JSON-lines files, .gz or .zst too, or folders of them"
    )
    made.add_argument(
        "--output", "-o", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx and .json"
    )
    made.add_argument("--tokenizer", default="bytes", help="'bytes' (default) or a tokenizer.json")
    made.add_argument(
        "--eod", help="the tokenizer's token that ends a document, if its name is not a usual one"
    )
    made.add_argument("--field", default="text", help="the field of JSON lines that holds the text")
    made.add_argument(
        "--documents",
        choices=[kind.value for kind in Documents],
        default=Documents.FILE.value,
        help="what a document is in a text file",
    )
    made.add_argument(
        "--held-out", type=float, default=0.0, metavar="SHARE", help="share of the documents, by hash"
    )
    made.add_argument("--processes", type=_positive, default=1)
    made.add_argument(
        "--longest", type=_positive, default=LONGEST_DOCUMENT, metavar="BYTES", help="of a document"
    )
    made.add_argument("--skip-broken", action="store_true", help="go without lines that cannot be read")
    made.add_argument("--overwrite", action="store_true")
    made.add_argument("--quiet", action="store_true", help="no progress")
    made.add_argument("--json", action="store_true")

    checked = commands.add_parser("check", help="find damage in .bin/.idx pairs")
    checked.set_defaults(run=_check)
    checked.add_argument("prefixes", nargs="+", metavar="PREFIX")
    checked.add_argument(
        "--vocabulary", type=_positive, help="token ids must be below; default: the manifest's"
    )
    checked.add_argument(
        "--whole", action="store_true", help="read every token, and every digest of the manifest"
    )

    grammar = commands.add_parser("corpus", help="write English-like text from a grammar, to try things with")
    grammar.set_defaults(run=_corpus)
    grammar.add_argument("output", metavar="FILE.jsonl")
    grammar.add_argument(
        "--bytes", type=_positive, default=400_000, help="of text, at least (default 400000)"
    )
    grammar.add_argument("--seed", type=int, default=0)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)
