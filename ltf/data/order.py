"""Which sample comes when: a pure function of (seed, global sample index), so that there is no state to lose.

The position of a run in its data is one number, the next global sample index. It means the same whatever the
number of ranks: a step takes the next ``global_batch`` indices and the ranks share them.

Within a source every epoch is a permutation of its own. It is computed point by point by the *swap-or-not*
shuffle (Hoang, Morris, Rogaway, "An Enciphering Scheme Based on a Card Shuffle", CRYPTO 2012). It works on a
domain of any size without rejection: in each round a sample and its mirror image about a random point change
places, or not, by a bit that a hash of the pair decides. Nothing is stored, and any position costs the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ltf.data.errors import DataError

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Permutation:
    """A permutation of ``range(size)``, one of those that ``key`` (64 bits) picks."""

    size: int
    key: int

    def __post_init__(self) -> None:
        if not 1 <= self.size < 1 << 62:
            raise ValueError(f"a permutation of {self.size} things")

    def __call__(self, positions: npt.ArrayLike) -> Int64s:
        """Where each position (0 to ``size`` - 1) goes."""
        given = np.asarray(positions, np.uint64)
        # An array, since NumPy warns of the wanted overflow when it is a scalar's.
        at = given.reshape(-1)
        size = np.uint64(self.size)
        # With 6 lg(size) rounds the paper's bound puts any few positions within size**-1.5 of chance.
        # Small domains, of which all positions are seen, get no fewer than 48; the tests hold them to chance.
        for number in range(6 * max(8, self.size.bit_length())):
            turn = (mix(self.key + 2 * number) * self.size) >> 64
            mirror = np.uint64(turn + self.size) - at
            mirror = np.where(mirror >= size, mirror - size, mirror)
            coin = np.uint64(mix(self.key + 2 * number + 1))
            swap = _mix_all(np.maximum(at, mirror) + coin) >> np.uint64(63)
            at = np.where(swap.astype(bool), mirror, at)
        return at.astype(np.int64).reshape(given.shape)


def epoch_permutation(size: int, seed: int, source: int, epoch: int) -> Permutation:
    """The order of one source's samples in one epoch."""
    return Permutation(size, mix(mix(mix(seed) + source) + epoch))


def samples_of_step(step: int, global_batch: int) -> range:
    """Global sample indices of a step, counted from 0, of a run whose global batch never changed."""
    return range(step * global_batch, (step + 1) * global_batch)


def share_of_rank(samples: range, rank: int, world: int) -> range:
    """A rank's equal, contiguous part of a step's samples; ``rank`` and ``world`` count data-parallel
    ranks."""
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}")
    if len(samples) % world:
        raise DataError(
            f"a global batch of {len(samples)} samples does not divide among {world} data-parallel ranks: "
            f"take {len(samples) // world * world or world} or {(len(samples) // world + 1) * world}"
        )
    each = len(samples) // world
    return samples[rank * each : (rank + 1) * each]


def micro_batches(samples: range, size: int) -> list[range]:
    """A rank's samples, ``size`` at a time."""
    if size < 1 or len(samples) % size:
        raise DataError(f"{len(samples)} samples a rank do not divide into micro-batches of {size}")
    return [samples[first : first + size] for first in range(0, len(samples), size)]


def mix(word: int) -> int:
    """A 64-bit hash: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) after its increment."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def _mix_all(words: UInt64s) -> UInt64s:
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
