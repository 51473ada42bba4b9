"""Who does what: how a run's ranks are divided among copies, shards, experts and pipeline stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ltf.config.schema import Parallel


class LayoutError(ValueError):
    """The degrees do not make up the ranks there are. One line with the arithmetic and what to do."""


@dataclass(frozen=True, order=True)
class Place:
    """A rank's coordinates in the mesh, outermost first; each counts from 0."""

    pipeline: int
    replicate: int
    expert_shard: int
    expert: int


@dataclass(frozen=True)
class Layout:
    """Degrees whose product is the number of ranks; `expert` divides `shard`.

    Ranks are numbered row by row through the mesh (pipeline, replicate, shard / expert, expert), so the ranks
    that exchange tokens have neighbouring numbers and most often share a node; pipeline stages, which say
    least to each other, lie furthest apart.
    """

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for name in ("pipeline", "replicate", "shard", "expert"):
            if getattr(self, name) < 1:
                raise LayoutError(f"parallel.{name} is {getattr(self, name)}: give 1 or more")
        if self.shard % self.expert:
            fits = ", ".join(str(d) for d in range(1, self.shard + 1) if self.shard % d == 0)
            raise LayoutError(
                f"parallel.expert {self.expert} does not divide parallel.shard {self.shard} "
                f"({self.shard} = {self.shard // self.expert} x {self.expert} + {self.shard % self.expert}): "
                f"experts are divided inside a shard group; give expert one of {fits}, "
                f"or shard a multiple of {self.expert}"
            )

    @classmethod
    def of(cls, parallel: Parallel, world: int) -> Layout:
        """The layout that a configuration asks for on `world` ranks; LayoutError if it cannot be."""
        outer = parallel.pipeline * parallel.replicate
        if parallel.shard == "rest":
            if world % outer:
                raise LayoutError(
                    f"pipeline {parallel.pipeline} x replicate {parallel.replicate} = {outer} does not "
                    f"divide the {_ranks(world)} there are, so no shard fills the rest: give "
                    f"parallel.pipeline and parallel.replicate a product that divides {world}, or start a "
                    f"multiple of {outer} ranks"
                )
            return cls(parallel.pipeline, parallel.replicate, world // outer, parallel.expert)
        product = outer * parallel.shard
        if product != world:
            there = f"there {'is' if world == 1 else 'are'} {_ranks(world)}"
            raise LayoutError(
                f"pipeline {parallel.pipeline} x replicate {parallel.replicate} x shard {parallel.shard} "
                f"= {product}, but {there}: {_remedy(parallel, world)}"
            )
        return cls(parallel.pipeline, parallel.replicate, parallel.shard, parallel.expert)

    @property
    def expert_shard(self) -> int:
        """Ranks that share the parameters of the same experts, inside one copy."""
        return self.shard // self.expert

    @property
    def world(self) -> int:
        return self.pipeline * self.replicate * self.shard

    @property
    def data_ranks(self) -> int:
        """Ranks that read different samples; the stages of one pipeline read the same."""
        return self.replicate * self.shard

    @property
    def units(self) -> int:
        """Groups of ranks that must run the same number of micro-batches."""
        return self.replicate * self.expert_shard

    def place(self, rank: int) -> Place:
        self._check(rank)
        rest, expert = divmod(rank, self.expert)
        rest, expert_shard = divmod(rest, self.expert_shard)
        pipeline, replicate = divmod(rest, self.replicate)
        return Place(pipeline, replicate, expert_shard, expert)

    def rank(self, place: Place) -> int:
        """The rank at that place; the inverse of `place`."""
        rest = place.pipeline * self.replicate + place.replicate
        return (rest * self.expert_shard + place.expert_shard) * self.expert + place.expert

    def data_rank(self, rank: int) -> int:
        """Which share of the samples the rank reads, from 0 to `data_ranks` - 1."""
        self._check(rank)
        return rank % self.data_ranks

    def unit(self, rank: int) -> int:
        """The group, from 0 to `units` - 1, of the ranks that exchange tokens, over all pipeline stages."""
        return self.data_rank(rank) // self.expert

    def unit_ranks(self, unit: int) -> tuple[int, ...]:
        """A unit's ranks in order."""
        return tuple(rank for rank in range(self.world) if self.unit(rank) == unit)

    def _check(self, rank: int) -> None:
        if not 0 <= rank < self.world:
            raise LayoutError(f"rank {rank} is not in a world of {_ranks(self.world)}")


def _remedy(parallel: Parallel, world: int) -> str:
    """A change of one number that would fit, if there is one."""
    assert parallel.shard != "rest"
    outer = parallel.pipeline * parallel.replicate
    product = outer * parallel.shard
    if world % outer == 0 and (world // outer) % parallel.expert == 0:
        return f"give e.g. parallel.shard {world // outer} (or `rest`), or start {product} ranks"
    inner = parallel.pipeline * parallel.shard
    if world % inner == 0:
        return f"give e.g. parallel.replicate {world // inner}, or start {product} ranks"
    return f"start {product} ranks, or give degrees whose product is {world}"


def _ranks(count: int) -> str:
    return f"{count} rank" + ("" if count == 1 else "s")
