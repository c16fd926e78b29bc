"""What holds for all tests."""

from hypothesis import HealthCheck, settings

# What a property takes says how busy the machine is; and the same code gets the same examples.
settings.register_profile(
    "the same verdict everywhere",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("the same verdict everywhere")
