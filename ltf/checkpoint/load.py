"""The newest checkpoint that is good, chosen and read by all ranks together.

Every file is read in full and compared with its recorded digest before any of it is used, the work divided
among the ranks. One that fails is set aside (`Store.quarantine`) and the one before is tried. What one rank
finds or meets is told to all, so none is left waiting in a collective.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_state

from ltf.checkpoint import manifest as manifests
from ltf.checkpoint.manifest import FileRecord, Manifest, Unfit
from ltf.checkpoint.peers import Failed, Peers
from ltf.checkpoint.pieces import LoadPieces, Piece, RestrictedReader, differences, read_metadata
from ltf.checkpoint.state import MODEL, OPTIMIZER, State, generators, restore_generators
from ltf.checkpoint.store import Entry, Store
from ltf.config.schema import Config
from ltf.findings import Finding, Json, Severity
from ltf.model.decoder import Decoder

T = TypeVar("T")
TIMEOUT_SECONDS = 1800.0


class LoadError(RuntimeError):
    """Checkpoints are there, but none can be loaded into this model; one line with what to do."""


@dataclass(frozen=True)
class Loaded:
    """What was loaded besides tensors, and what was wrong with newer ones. All the same on all ranks."""

    entry: Entry
    manifest: Manifest
    findings: list[Finding]

    @property
    def version(self) -> int:
        return self.manifest.version

    @property
    def progress(self) -> Mapping[str, Json]:
        return self.manifest.progress


@dataclass(frozen=True)
class NothingLoaded:
    """There is no good checkpoint; state and generators are as they were."""

    findings: list[Finding]


def load(
    store: Store,
    state: State,
    *,
    seed: int,
    device: torch.device | None = None,
    at_most: int | None = None,
    abandon_newer: bool = False,
) -> Loaded | NothingLoaded:
    """Fill `state` and set this rank's random number generators. All ranks call it, from the main thread.

    The layout may differ from the one that saved. Generators of a rank that did not exist then are seeded
    from (seed, rank, version). A saver must have nothing in hand (`Saver.wait`), lest it delete what is being
    read.

    `at_most`: only versions up to it. `abandon_newer`: set newer ones aside, as a roll-back does, so that no
    restart takes them up again. LoadError if a good checkpoint does not fit the model, or if none is good
    after one was read in part.
    """
    peers = Peers.join(TIMEOUT_SECONDS)
    try:
        return _load(store, state, peers, seed, device or torch.device("cpu"), at_most, abandon_newer)
    finally:
        peers.leave()


def load_tensors(entry: Entry, prefix: str = MODEL) -> tuple[Manifest, dict[str, Tensor]]:
    """Whole tensors on the CPU by name without the prefix, read by one process without torch.distributed.

    Unfit if the checkpoint is not as it was written.
    """
    manifest = entry.verify()
    metadata = read_metadata(entry.path)
    pieces = []
    for name, saved in metadata.state_dict_metadata.items():
        if name.startswith(prefix) and isinstance(saved, TensorStorageMetadata):
            pieces.append(Piece.whole(name, torch.empty(saved.size, dtype=saved.properties.dtype)))
    _fill(pieces, entry)
    return manifest, {piece.name.removeprefix(prefix): piece.local for piece in pieces}


def load_model(entry: Entry) -> tuple[Config, Decoder]:
    """The model that a checkpoint holds, whole, on the CPU; nothing but the checkpoint is needed."""
    manifest, tensors = load_tensors(entry)
    config = Config.model_validate(manifest.config)
    with torch.device("meta"):
        model = Decoder(config.model)
    model.load_state_dict(tensors, assign=True)
    return config, model


def _load(
    store: Store,
    state: State,
    peers: Peers,
    seed: int,
    device: torch.device,
    at_most: int | None,
    abandon_newer: bool,
) -> Loaded | NothingLoaded:
    findings: list[Finding] = []
    touched = False
    entries = _first(peers, store.entries)
    newer = [entry for entry in entries if at_most is not None and entry.version > at_most]
    if abandon_newer:
        for entry in newer:
            findings.append(_set_aside(store, peers, entry, "abandoned", "", "the run went back behind it"))
    for entry in reversed([entry for entry in entries if entry not in newer]):
        try:
            manifest = _verified(peers, entry)
            metadata = peers.agree(lambda entry=entry: read_metadata(entry.path))[peers.rank]  # type: ignore[misc]
            _check_fit(peers, state, metadata, entry)
            touched = True
            _read(peers, state, metadata, entry, seed, device)
        except _Bad as bad:
            findings.append(_set_aside(store, peers, entry, "bad", bad.file, bad.what, bad.ranks))
            continue
        except Failed as failure:
            what = failure.problems[0]
            ranks = tuple(sorted({problem.rank for problem in failure.problems}))
            findings.append(_set_aside(store, peers, entry, "unreadable", what.path or "", what.text, ranks))
            continue
        return Loaded(entry, manifest, findings)
    if touched:
        raise LoadError(f"no checkpoint in {store.root} could be read whole; start again without it")
    return NothingLoaded(findings)


class _Bad(Exception):
    """Raised on all ranks alike: the entry is not what was written."""

    def __init__(self, file: str, what: str, ranks: tuple[int, ...]) -> None:
        super().__init__(f"{file}: {what}")
        self.file = file
        self.what = what
        self.ranks = ranks


def _first(peers: Peers, work: Callable[[], T]) -> T:
    """Rank 0's result, on all ranks."""
    found = peers.agree(lambda: work() if peers.rank == 0 else None)[0]
    assert found is not None
    return found


def _verified(peers: Peers, entry: Entry) -> Manifest:
    """Marker and manifest by rank 0, then every rank its share of the files."""

    def manifest() -> Manifest | Unfit | None:
        if peers.rank:
            return None
        try:
            return entry.manifest()
        except Unfit as unfit:
            return unfit

    found = peers.agree(manifest)[0]
    if isinstance(found, Unfit):
        raise _Bad(found.file, found.what, ())
    assert found is not None

    def share() -> Unfit | None:
        try:
            for name in shares(found.files, peers.size)[peers.rank]:
                manifests.check_file(entry.path, name, found.files[name])
        except Unfit as unfit:
            return unfit
        return None

    for unfit in peers.agree(share):
        if unfit is not None:
            raise _Bad(unfit.file, unfit.what, ())
    return found


def shares(files: Mapping[str, FileRecord], ranks: int) -> list[list[str]]:
    """Files for each rank, about equal in bytes: the largest first, each to the rank with least so far."""
    loads = [(0, rank) for rank in range(ranks)]
    found: list[list[str]] = [[] for _ in range(ranks)]
    for name, record in sorted(files.items(), key=lambda item: (-item[1].size, item[0])):
        size, rank = heapq.heappop(loads)
        found[rank].append(name)
        heapq.heappush(loads, (size + record.size, rank))
    return found


def _check_fit(peers: Peers, state: State, metadata: Metadata, entry: Entry) -> None:
    state.make_optimizer_state(any(name.startswith(OPTIMIZER) for name in metadata.state_dict_metadata))
    pieces = state.pieces()
    names = [piece.name for piece in pieces if piece.name.startswith(MODEL)]
    gathered = peers.gather((differences(pieces, metadata), names))
    wrong = sorted({line for lines, _ in gathered for line in lines})
    # What no rank has a place for would be lost without a word.
    held = {name for _, names in gathered for name in names}
    left = sorted(
        name for name in metadata.state_dict_metadata if name.startswith(MODEL) and name not in held
    )
    wrong += [f"{name.removeprefix(MODEL)} is not in this model" for name in left]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise LoadError(
            f"{entry.path} is of another model: {'; '.join(wrong[:3])}{more}; "
            "use the configuration it was saved with, or another checkpoint.directory"
        )


def _read(
    peers: Peers, state: State, metadata: Metadata, entry: Entry, seed: int, device: torch.device
) -> None:
    own = generators(peers.rank, device)
    known = [piece for piece in own if not differences([piece], metadata)]

    def read() -> None:
        _fill([*state.pieces(), *known], entry)
        if len(known) < len(own):
            torch.manual_seed(_rank_seed(seed, peers.rank, entry.version))
        restore_generators(known, device)

    peers.agree(read, entry.path)


@torch.no_grad()
def _fill(pieces: Sequence[Piece], entry: Entry) -> None:
    # Each rank reads for itself: the digests are right, and what remains can fail on one rank alone.
    reader = RestrictedReader(entry.path)
    read_state({}, storage_reader=reader, planner=LoadPieces(pieces), no_dist=True)


def _rank_seed(seed: int, rank: int, version: int) -> int:
    digest = hashlib.sha256(f"{seed}:{rank}:{version}:generator".encode()).digest()
    return int.from_bytes(digest[:7])


def _set_aside(
    store: Store,
    peers: Peers,
    entry: Entry,
    reason: str,
    file: str,
    what: str,
    ranks: Iterable[int] = (),
) -> Finding:
    evidence: dict[str, Json] = {"checkpoint": entry.path.name, "file": file, "wrong": what}
    try:
        where = _first(peers, lambda: store.quarantine(entry, reason))
        evidence["moved_to"] = str(where)
        done = f"it is kept as {where}"
    except Failed as failure:
        done = f"it could not be set aside ({failure})"
    named = f"{file}: {what}" if file else what
    severity = Severity.WARNING if reason == "abandoned" else Severity.ERROR
    message = f"checkpoint {entry.path.name} is not used: {named}; {done}"
    return Finding("checkpoint.quarantined", severity, entry.version, message, tuple(ranks), evidence)
