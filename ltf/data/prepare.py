"""Text into token files: read in order, tokenised by several processes, written in order.

The result depends on the inputs and the tokenizer alone, not on the number of processes. Memory is bounded by
the longest document and the number of processes. Nothing appears at the output until all of it is whole.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ltf.data import manifest as manifests
from ltf.data import tokenizer as tokenizers
from ltf.data.errors import DataError
from ltf.data.inputs import Broken, Documents, Input, Raw, find, text_of
from ltf.data.manifest import Manifest
from ltf.data.megatron import idx_file, token_type
from ltf.data.writer import TokenWriter

# Documents go to a process together until they make this many bytes.
BATCH_BYTES = 1 << 20
LONGEST_DOCUMENT = 256 << 20
SIDES = ("train", "held-out")


@dataclass(frozen=True)
class Recipe:
    """How text becomes tokens.

    ``held_out`` is the share of documents, from 0 to below 1, that goes to ``OUTPUT-held-out``: those whose
    text's BLAKE2b hash is low, so that a document stays on its side whatever else is prepared, and its copies
    with it. ``field`` is the text's in JSON lines. ``longest`` is the longest document, in bytes.
    """

    tokenizer: str = tokenizers.BYTES
    end_of_document: str | None = None
    field: str = "text"
    documents: Documents = Documents.FILE
    held_out: float = 0.0
    skip_broken: bool = False
    overwrite: bool = False
    longest: int = LONGEST_DOCUMENT

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise DataError(f"held-out share {self.held_out}: expected 0 to below 1")
        if self.longest < 1:
            raise DataError(f"longest document of {self.longest} bytes: expected at least 1")


@dataclass(frozen=True)
class Progress:
    """``read`` and ``size`` are bytes of the inputs as they lie on the disk."""

    documents: int = 0
    tokens: int = 0
    held_out: int = 0
    empty: int = 0
    broken: int = 0
    read: int = 0
    size: int = 0


@dataclass(frozen=True)
class Prepared:
    """What was made. ``examples`` are the first of the broken lines that were skipped."""

    train: Manifest
    held_out: Manifest | None
    total: Progress
    examples: tuple[Broken, ...]


@dataclass
class _Batch:
    """Documents tokenised: ids end to end, lengths, and which are held out."""

    tokens: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.bool_]
    empty: int
    broken: list[Broken] = field(default_factory=list)


def held_out_prefix(output: str | Path) -> str:
    return f"{output}-held-out"


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    recipe: Recipe | None = None,
    *,
    processes: int = 1,
    progress: Callable[[Progress], None] | None = None,
) -> Prepared:
    """Write ``OUTPUT.bin``, ``.idx`` and ``.json``, and the same for the documents held out, if any are.

    With more than one process the caller's main module must be importable without side effects. Raises
    ``DataError``; then the output is as it was before.
    """
    recipe = recipe or Recipe()
    tokenizer = tokenizers.load(recipe.tokenizer, recipe.end_of_document)
    sources = find(inputs, recipe.documents, recipe.longest)
    prefixes = [str(output)] + ([held_out_prefix(output)] if recipe.held_out else [])
    if not recipe.overwrite:
        for prefix in prefixes:
            if idx_file(prefix).exists():
                raise DataError("exists already: choose another output or --overwrite", idx_file(prefix))
    if not recipe.held_out and idx_file(held_out_prefix(output)).exists():
        raise DataError(
            "lies here from an earlier run, and its documents would now be trained on: "
            "remove it or hold out again",
            idx_file(held_out_prefix(output)),
        )
    done = Progress(size=sum(source.bytes for source in sources))
    examples: list[Broken] = []
    with ExitStack() as stack:
        writers = [stack.enter_context(TokenWriter(p, token_type(tokenizer.vocabulary))) for p in prefixes]
        batches = stack.enter_context(closing(_tokenised(_batches(sources), recipe, processes)))
        for batch in batches:
            if batch.broken and not recipe.skip_broken:
                raise DataError(f"{batch.broken[0]} (to go without such lines: --skip-broken)")
            examples += batch.broken[: 10 - len(examples)]
            for is_held_out, writer in zip((False, True), writers, strict=False):
                chosen = batch.held_out == is_held_out
                writer.add_documents(batch.tokens[np.repeat(chosen, batch.lengths)], batch.lengths[chosen])
            done = replace(
                done,
                documents=done.documents + len(batch.lengths),
                tokens=done.tokens + len(batch.tokens),
                held_out=done.held_out + int(batch.held_out.sum()),
                empty=done.empty + batch.empty,
                broken=done.broken + len(batch.broken),
                read=sum(source.read for source in sources),
            )
            if progress is not None:
                progress(done)
        for side, writer in zip(SIDES, writers, strict=False):
            if not writer.documents:
                raise DataError(
                    f"no document for the {side} part: the inputs hold {done.documents} documents "
                    f"and {done.empty} empty ones",
                    writer.prefix,
                )
        made = [
            Manifest(
                tokenizer=tokenizer.identity,
                vocabulary=tokenizer.vocabulary,
                end_of_document=tokenizer.end_of_document,
                documents=writer.documents,
                tokens=writer.tokens,
                held_out=recipe.held_out,
                side=side,
                skipped=done.broken,
                bin=tokens,
                idx=index,
            )
            for side, writer in zip(SIDES, writers, strict=False)
            for tokens, index in [writer.finish()]
        ]
        # All old indices go before the first new file comes: parts of two runs never stand side by side.
        for prefix in prefixes:
            idx_file(prefix).unlink(missing_ok=True)
        for writer, manifest in zip(writers, made, strict=True):
            manifests.write(manifest, writer.prefix)
            writer.publish()
    return Prepared(made[0], made[1] if recipe.held_out else None, done, tuple(examples))


def _batches(sources: Sequence[Input]) -> Iterator[list[Raw | Broken]]:
    """Some documents of one file at a time, with what gave none."""
    for source in sources:
        batch: list[Raw | Broken] = []
        size = 0
        for document in source:
            batch.append(document)
            size += len(document.data) if isinstance(document, Raw) else 0
            if size >= BATCH_BYTES or len(batch) >= 8192:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def _tokenised(
    batches: Iterator[list[Raw | Broken]], recipe: Recipe, processes: int
) -> Generator[_Batch, None, None]:
    """In the order of ``batches``; no more than two for each process are under way."""
    if processes < 2:
        work = _Work(recipe)
        yield from map(work, batches)
        return
    # Not fork: the caller may have threads (torch's, say), and a fork copies their locks as they are.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(recipe,))
    under_way: deque[Future[_Batch]] = deque()
    try:
        for batch in batches:
            under_way.append(pool.submit(_do, batch))
            if len(under_way) >= 2 * processes:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenising process died (out of memory?): try fewer --processes or a lower --longest"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


class _Work:
    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._tokenizer = tokenizers.load(recipe.tokenizer, recipe.end_of_document)

    def __call__(self, batch: Sequence[Raw | Broken]) -> _Batch:
        texts: list[str] = []
        broken: list[Broken] = []
        empty = 0
        for document in batch:
            text = text_of(document, self._recipe.field) if isinstance(document, Raw) else document
            if isinstance(text, Broken):
                broken.append(text)
            elif not text.strip():
                empty += 1
            else:
                texts.append(text)
        end = np.array([self._tokenizer.end_of_document], np.uint32)
        pieces = [np.concatenate([ids, end]) for ids in self._tokenizer.encode(texts)]
        return _Batch(
            np.concatenate(pieces) if pieces else np.zeros(0, np.uint32),
            np.array([len(piece) for piece in pieces], np.int64),
            np.array([_is_held_out(text, self._recipe.held_out) for text in texts], np.bool_),
            empty,
            broken,
        )


def _is_held_out(text: str, share: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


_work: _Work | None = None


def _begin(recipe: Recipe) -> None:
    """In a tokenising process: Ctrl-C is the first process's to answer, and threads would compete with
    processes."""
    global _work  # noqa: PLW0603 - a pool's processes have no other place to keep what they begin with
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _work = _Work(recipe)


def _do(batch: Sequence[Raw | Broken]) -> _Batch:
    assert _work is not None
    return _work(batch)
