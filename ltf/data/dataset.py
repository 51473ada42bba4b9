"""A blend of token files as one endless, shuffled sequence of samples: ``sample(i)`` for any i."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ltf.data import manifest as manifests
from ltf.data.blend import Schedule
from ltf.data.errors import DataError
from ltf.data.megatron import TokenFile
from ltf.data.order import epoch_permutation
from ltf.data.packing import Packing, Part, Sample, pack

# Global sample indices whose places are computed together.
BLOCK = 2048


@dataclass(frozen=True)
class Source:
    """One token file of a blend.

    ``weight``: its share of the samples, relative to the others'; none for any means in proportion to size.
    ``documents``: the part between two fractions of its documents, as (0, 0.99) to train and (0.99, 1) to
    evaluate. ``max_epochs``: how often its samples may come; ``Dataset.check_length`` refuses a run that
    needs more.
    """

    prefix: str | Path
    weight: float | None = None
    documents: tuple[float, float] = (0.0, 1.0)
    max_epochs: float | None = None


@dataclass(frozen=True)
class Place:
    """Where a sample comes from: the ``index``-th sample of a source, in its ``epoch``-th pass (from 0)."""

    source: int
    epoch: int
    index: int


class Dataset:
    """Opens and checks every source before it gives the first sample. Raises ``DataError``.

    ``vocabulary``: the model's number of token ids. ``cache``: a folder for packing indices when those of the
    sources cannot be written. The order depends on ``seed``, on the sources' places in the list and on their
    numbers of samples, not on their paths.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seq_len: int,
        seed: int,
        vocabulary: int,
        packing: Packing = Packing.STREAM,
        mask_boundaries: bool = False,
        pad: int = 0,
        shuffle: bool = True,
        cache: Path | None = None,
    ) -> None:
        if not sources:
            raise DataError("no data sources: name at least one")
        if packing is Packing.BEST_FIT and not 0 <= pad < vocabulary:
            raise DataError(f"padding token {pad}: ids are 0 to {vocabulary - 1}")
        self.sources, self.seq_len, self.seed = tuple(sources), seq_len, seed
        self.vocabulary, self.shuffle = vocabulary, shuffle
        self.files = _open(self.sources, vocabulary)
        self._packed = [
            pack(
                Part.between(file, source.documents),
                seq_len,
                packing,
                mask_boundaries=mask_boundaries,
                pad=pad,
                cache=cache,
            )
            for source, file in zip(self.sources, self.files, strict=True)
        ]
        self.samples_of_sources = [packed.samples for packed in self._packed]
        self.schedule = Schedule(_weights(self.sources, self.samples_of_sources))
        self._places_of_block = lru_cache(maxsize=8)(self._find_places)

    def sample(self, index: int) -> Sample:
        place = self.place(index)
        sample = self._packed[place.source].sample(place.index)
        self._check_ids(sample, place)
        return sample

    def place(self, index: int) -> Place:
        """Where global sample ``index`` (from 0, without end) comes from."""
        if index < 0:
            raise IndexError(f"sample {index}")
        block, offset = divmod(index, BLOCK)
        return Place(*self._places_of_block(block)[offset].tolist())

    def epochs(self, samples: int) -> list[float]:
        """How often each source is passed over in the first ``samples`` samples."""
        counts = self.schedule.counts(samples)
        return [count / size for count, size in zip(counts, self.samples_of_sources, strict=True)]

    def check_length(self, samples: int) -> None:
        """Refuse a run of so many samples that repeats a source more often than it allows."""
        for source, epochs, size in zip(
            self.sources, self.epochs(samples), self.samples_of_sources, strict=True
        ):
            if source.max_epochs is not None and epochs > source.max_epochs:
                raise DataError(
                    f"a run of {samples} samples passes {epochs:.4g} times over its {size}, max_epochs is "
                    f"{source.max_epochs:g}: shorten the run, lower its weight or allow more",
                    source.prefix,
                )

    def _find_places(self, block: int) -> npt.NDArray[np.int64]:
        source, nth = self.schedule(np.arange(block * BLOCK, (block + 1) * BLOCK))
        places = np.empty((BLOCK, 3), np.int64)
        places[:, 0] = source
        for number in np.unique(source).tolist():
            mine = source == number
            size = self.samples_of_sources[number]
            epoch, at = np.divmod(nth[mine], size)
            if self.shuffle:
                for which in np.unique(epoch).tolist():
                    now = epoch == which
                    at[now] = epoch_permutation(size, self.seed, number, which)(at[now])
            places[mine, 1], places[mine, 2] = epoch, at
        return places

    def _check_ids(self, sample: Sample, place: Place) -> None:
        for ids in (sample.tokens, sample.labels):
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.vocabulary:
                raise DataError(
                    f"sample {place.index} holds token id {low if low < 0 else high}, but ids are 0 to "
                    f"{self.vocabulary - 1}: the file is damaged; `python -m ltf data check` finds the byte",
                    self.files[place.source].bin,
                )


def _open(sources: Sequence[Source], vocabulary: int) -> list[TokenFile]:
    files: list[TokenFile] = []
    first: tuple[str, str] | None = None
    for source in sources:
        file = TokenFile(source.prefix)
        manifest = manifests.read(source.prefix)
        if manifest is not None:
            manifests.check(manifest, file)
            if manifest.vocabulary > vocabulary:
                raise DataError(
                    f"made with a vocabulary of {manifest.vocabulary}, the model has {vocabulary}",
                    file.prefix,
                )
            if first is not None and manifest.tokenizer != first[1]:
                raise DataError(
                    f"made with tokenizer {manifest.tokenizer}, but {first[0]} with {first[1]}: "
                    "a blend has one tokenizer",
                    file.prefix,
                )
            first = first or (file.prefix, manifest.tokenizer)
        file.validate(vocabulary)
        files.append(file)
    return files


def _weights(sources: Sequence[Source], sizes: Sequence[int]) -> list[float]:
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(weights) != len(sources):
        without = next(source.prefix for source in sources if source.weight is None)
        raise DataError("has no weight, but others have: give all a weight, or none", without)
    return weights or [float(size) for size in sizes]
