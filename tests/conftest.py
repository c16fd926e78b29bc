"""What holds for all tests."""

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from hypothesis import HealthCheck, settings

# What a property takes says how busy the machine is; and the same code gets the same examples.
settings.register_profile(
    "the same verdict everywhere",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("the same verdict everywhere")


@pytest.fixture
def files_no_longer_than() -> Callable[[int], AbstractContextManager[None]]:
    """As on a disk that is full from then on: writes stop in the middle of a line."""

    @contextmanager
    def limit(num_bytes: int) -> Iterator[None]:
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)

    return limit
