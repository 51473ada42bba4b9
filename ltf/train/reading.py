"""The data of a run: the blend that it trains on, the one that it is judged by, and who reads what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ltf import balance
from ltf.config.schema import Config, Source
from ltf.data import dataset
from ltf.data.loader import Loader
from ltf.data.packing import Packing
from ltf.model.hf import Reader
from ltf.parallel.layout import Layout
from ltf.train.feed import Assignment


def open_training(config: Config) -> Loader:
    """DataError if a file is missing or damaged, or if the run would repeat a source too often."""
    data = open_dataset(config, config.data.sources)
    data.check_length(config.run.steps * config.batch.samples)
    return Loader(data, global_batch=config.batch.samples, micro_batch=config.batch.micro)


def open_evaluation(config: Config) -> Loader | None:
    if config.data.evaluation is None:
        return None
    data = open_dataset(config, config.data.evaluation.sources)
    return Loader(data, global_batch=config.batch.samples, micro_batch=config.batch.micro)


def check_first_weights(config: Config) -> None:
    """HfError if `run.initial_weights` is of another model, seen before ranks need each other to build it."""
    if config.run.initial_weights is not None:
        with Reader.open(config.run.initial_weights) as reader:
            reader.refuse_strangers(config.model)
            reader.refuse_misfits(config.model)


def open_dataset(config: Config, sources: Sequence[Source]) -> dataset.Dataset:
    return dataset.Dataset(
        [
            dataset.Source(source.prefix, source.weight, source.documents, source.max_epochs)
            for source in sources
        ],
        seq_len=config.data.seq_len,
        seed=config.run.seed,
        vocabulary=config.model.vocab_size,
        packing=Packing(config.data.packing),
        mask_boundaries=config.data.mask_boundaries,
        pad=config.data.pad,
        cache=config.data.cache,
    )


@dataclass(frozen=True)
class Share:
    """A rank's part of any step by a plan: `counts` micro-batches for each unit (see `ltf.balance`)."""

    layout: Layout
    rank: int
    micro: int
    counts: tuple[int, ...]

    @property
    def assignment(self) -> Assignment:
        return self.of

    def of(self, samples: range) -> list[range]:
        """The step's samples -> this rank's micro-batches."""
        members = self.layout.expert
        data_rank = self.layout.data_rank(self.rank)
        unit, member = divmod(data_rank, members)
        return balance.share(samples, self.counts, unit, member, members, self.micro)

    @property
    def micro_batches(self) -> int:
        """This rank's, in one step."""
        return self.counts[self.layout.unit(self.rank)]


def micro_batches_of_a_step(config: Config, layout: Layout) -> int:
    """Over all units: what a plan divides among them."""
    return config.batch.samples // (config.batch.micro * layout.expert)
