"""The sizes that a profile is measured at."""

from megatron_dip.errors import ConfigError

__all__ = ["size_grid"]

_MOST_POINTS = 1000


def size_grid(smallest: int, largest: int, num_points: int, step: int = 1) -> tuple[int, ...]:
    """About ``num_points`` multiples of ``step`` from ``smallest`` to ``largest``, both included.

    Sizes grow by one factor, so that interpolation errs by about the same share everywhere.

    Raises:
        ConfigError: Fewer than two points: nothing lies between.
    """
    if not 2 <= num_points <= _MOST_POINTS:
        raise ConfigError(
            f"--points {num_points}: expected at least 2 (smallest and largest), at most "
            f"{_MOST_POINTS:,}"
        )
    smallest, largest = (max(step, size // step * step) for size in (smallest, largest))
    factor = (largest / smallest) ** (1.0 / (num_points - 1))
    sizes = {smallest, largest}
    sizes.update(
        min(largest, round(smallest * factor**number / step) * step or step)
        for number in range(1, num_points - 1)
    )
    return tuple(sorted(sizes))
