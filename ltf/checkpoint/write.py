"""One save, by all ranks together: the files, their digests, the manifest, the commit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from ltf.checkpoint.manifest import FileRecord, Manifest
from ltf.checkpoint.peers import Failed, Peers, problem
from ltf.checkpoint.pieces import DigestingWriter, Piece, SavePieces
from ltf.checkpoint.store import Store, fsync_folder
from ltf.findings import Json


@dataclass(frozen=True)
class About:
    """What a manifest says beside tensors and files; the same on all ranks."""

    version: int
    progress: Mapping[str, Json]
    config: Mapping[str, Json]
    about: Mapping[str, Json]


def write(store: Store, peers: Peers, pieces: Iterable[Piece], about: About, nonce: str) -> Manifest:
    """All ranks call it with pieces on the CPU. The checkpoint is durable and committed on return.

    `Failed` on all ranks if it failed on one; then nothing of it is left, if the disk lets it be removed.
    """
    folder = store.writing(about.version, nonce)
    try:
        peers.agree(lambda: store.begin(folder) if peers.rank == 0 else None, store.root)
        files = _write_pieces(folder, peers, pieces)
        manifest = Manifest(about.version, about.progress, about.config, about.about, files)
        peers.agree(lambda: store.commit(folder, manifest) if peers.rank == 0 else None, folder)
    except Failed as failure:
        _discard(store, peers, folder, failure)
        raise
    return manifest


def _write_pieces(folder: Path, peers: Peers, pieces: Iterable[Piece]) -> dict[str, FileRecord]:
    writer = DigestingWriter(folder)
    try:
        save(
            {},
            storage_writer=writer,
            planner=SavePieces(pieces),
            process_group=peers.group,
            no_dist=peers.group is None,
        )
    except CheckpointException as error:
        # All ranks get the same.
        failures = sorted(error.failures.items())
        raise Failed([problem(rank, wrapped[0], folder) for rank, wrapped in failures]) from error

    def finish() -> dict[str, FileRecord]:
        fsync_folder(folder)
        return writer.records

    return {name: record for records in peers.agree(finish, folder) for name, record in records.items()}


def _discard(store: Store, peers: Peers, folder: Path, failure: Failed) -> None:
    def remove() -> None:
        if peers.rank == 0:
            store.discard(folder)

    try:
        peers.agree(remove, folder)
    except Failed as second:
        failure.problems.extend(second.problems)
