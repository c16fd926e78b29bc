"""What holds for all tests."""

from hypothesis import HealthCheck, settings

# What a property takes says how busy the machine is.
settings.register_profile(
    "no limits on time", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("no limits on time")
