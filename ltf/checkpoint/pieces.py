"""A rank's share of the state as torch.distributed.checkpoint writes and reads it.

A piece is the part of a named tensor that one rank holds and where in the whole it lies. Pieces that several
ranks hold are written once; a rank of any other layout reads the overlap of its own pieces with those saved.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ltf.checkpoint.beside import DigestBeside
from ltf.checkpoint.manifest import METADATA, FileRecord, Unfit

# One process that reads or writes by itself is what is meant here, and no mistake.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@dataclass(frozen=True)
class Piece:
    """`shape`: of the whole tensor. `offset`: where `local` begins in it, by dimension."""

    name: str
    shape: torch.Size
    offset: torch.Size
    local: Tensor

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> Piece:
        return cls(name, tensor.shape, torch.Size([0] * tensor.ndim), tensor)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(self.offset, self.local.shape)

    @property
    def counts(self) -> bool:
        """A rank without rows of an unevenly cut tensor has nothing to write or read."""
        return self.local.numel() > 0 or math.prod(self.shape) == 0


class SavePieces(DefaultSavePlanner):
    def __init__(self, pieces: Iterable[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = {piece.name: piece for piece in pieces if piece.counts}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(piece) for piece in self.pieces.values()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index.fqn].local


class LoadPieces(DefaultLoadPlanner):
    """Fills the pieces' `local` tensors in place, on whatever device they are."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = {piece.name: piece for piece in pieces if piece.counts}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None  # set_up_planner comes first
        saved = self.metadata.state_dict_metadata
        items: list[ReadItem] = []
        for piece in self.pieces.values():
            found = saved[piece.name]
            assert isinstance(found, TensorStorageMetadata)  # `differences` came first
            items += create_read_items_for_chunk_list(piece.name, found, [piece.chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index.fqn].local


def differences(pieces: Iterable[Piece], metadata: Metadata) -> list[str]:
    """Why these pieces cannot be read from that checkpoint: one line for each tensor that does not fit."""
    found = []
    for piece in pieces:
        saved = metadata.state_dict_metadata.get(piece.name)
        if not isinstance(saved, TensorStorageMetadata):
            found.append(f"{piece.name} is not in it")
        elif saved.size != piece.shape:
            found.append(f"{piece.name} is {tuple(saved.size)} in it, expected {tuple(piece.shape)}")
        elif saved.properties.dtype != piece.local.dtype:
            found.append(f"{piece.name} is {saved.properties.dtype} in it, expected {piece.local.dtype}")
    return found


class DigestingWriter(FileSystemWriter):
    """Keeps size and SHA-256 of the bytes given to each file; files are durable when their writing ends."""

    def __init__(self, folder: Path) -> None:
        # The tensors are on the CPU already: nothing to copy ahead.
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0, overwrite=False)
        self._tensors: list[Tensor] = []
        self.fs = self._files = _DigestingFiles(lambda: self._tensors)

    @property
    def records(self) -> dict[str, FileRecord]:
        return self._files.records

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if isinstance(planner, SavePieces):
            self._tensors = [piece.local for piece in planner.pieces.values()]
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # torch's archive writer makes a riddle ("unexpected pos") of a full disk.
            if self._files.error is not None:
                raise self._files.error from error
            raise


class RestrictedReader(FileSystemReader):
    """torch's `.metadata` is a pickle: only the classes that it consists of may be made from it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))


def read_metadata(folder: Path) -> Metadata:
    """Unfit if it holds anything else than metadata; its digest is for the caller to check before."""
    try:
        with (folder / METADATA).open("rb") as stream:
            found = _Unpickler(stream).load()
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        TypeError,
        ValueError,
        IndexError,
    ) as error:
        raise Unfit(METADATA, f"cannot be read ({error})") from error
    if not isinstance(found, Metadata):
        raise Unfit(METADATA, f"holds {type(found).__name__}, expected Metadata")
    if found.storage_meta is None:
        found.storage_meta = StorageMeta()
    return found


_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)},
    "pathlib": {"Path", "PosixPath"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # `pathlib._local` is where Python 3.13 keeps its paths.
        home = "pathlib" if module == "pathlib._local" else module
        if name in _ALLOWED.get(home, ()):
            return super().find_class(home, name)
        raise pickle.UnpicklingError(f"refers to {module}.{name}, which metadata never does")


class _DigestingFiles(FileSystem):
    def __init__(self, lasting: Callable[[], Iterable[Tensor]]) -> None:
        self.records: dict[str, FileRecord] = {}
        self.error: OSError | None = None
        self._lasting = lasting

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        with Path(path).open(mode) as stream:
            if "w" not in mode:
                yield cast(io.IOBase, stream)
                return
            with DigestBeside(self._lasting()) as digest:
                digesting = _DigestingStream(cast(io.BufferedWriter, stream), digest)
                try:
                    yield cast(io.IOBase, digesting)
                finally:
                    self.error = self.error or digesting.error
                self.records[Path(path).name] = FileRecord(digesting.size, digest.finish())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _DigestingStream:
    """What torch's writer uses of a file, write by write in order."""

    def __init__(self, stream: io.BufferedWriter, digest: DigestBeside) -> None:
        self.stream = stream
        self.digest = digest
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        self.digest.update(view)
        self.size += view.nbytes
        try:
            return self.stream.write(view)
        except OSError as error:
            self.error = self.error or error
            raise

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        # torch asks for it in order to fsync, which knows nothing of bytes still in Python's buffer.
        self.stream.flush()
        return self.stream.fileno()

    def close(self) -> None:
        self.stream.close()


def _write_item(piece: Piece) -> WriteItem:
    properties = TensorProperties(dtype=piece.local.dtype)
    return WriteItem(
        index=MetadataIndex(piece.name, piece.offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk=piece.chunk, properties=properties, size=piece.shape),
    )
