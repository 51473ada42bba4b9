"""Sets of ranks as people write them: ``0-6,8-511``."""

from collections.abc import Iterable


def fold(ranks: Iterable[int], *, most: int = 12) -> str:
    """``[0, 1, 2, 5]`` -> ``0-2,5``; with more than ``most`` stretches the rest is counted, not listed."""
    stretches: list[tuple[int, int]] = []
    for rank in sorted(set(ranks)):
        if stretches and rank == stretches[-1][1] + 1:
            stretches[-1] = (stretches[-1][0], rank)
        else:
            stretches.append((rank, rank))
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in stretches[:most])
    left = sum(b - a + 1 for a, b in stretches[most:])
    return f"{text} and {left} more" if left else text


def named(ranks: Iterable[int]) -> str:
    """``rank 7`` or ``ranks 0-6,8``."""
    distinct = set(ranks)
    return f"rank{'' if len(distinct) == 1 else 's'} {fold(distinct)}"
