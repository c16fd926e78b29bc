"""What a run asks of this package: from Megatron-LM's arguments, or from a call of ``enable``."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_dip.config import DipConfig
from megatron_dip.errors import ConfigError

__all__ = ["DEFAULT_TIMEOUT_SECONDS", "DipOptions"]

DEFAULT_TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class DipOptions:
    """What the flags of ``--dip-schedule`` say."""

    config: DipConfig = field(default_factory=DipConfig)
    """Schedule and planning; one even segment per module where they say nothing."""
    models: tuple[str, ...] = ()
    """Python modules that register models."""
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    """Limit of every wait for another rank or for a plan."""
    planner_cores: tuple[int, ...] = ()
    """Cores for planner processes; those of the rank that starts them where empty."""
    check_parts: bool = False
    """Compare the loss of the first split microbatch with that of the whole one."""
    vary_parts: bool = False
    """Split microbatches one way in some steps and another way in others."""
    optimizer_shards: int = 1
    """Ranks that share one optimizer state."""
    trace_dir: Path | None = None
    """Folder for measured timelines and records; of runs without Megatron-LM's arguments, which say
    it by ``--dip-trace-dir``, as also the two below."""
    trace_interval: int = 20
    """After the first 20 iterations, timelines of every so-many-th."""
    log_interval: int = 10
    """Iterations between two lines of the log."""

    def __post_init__(self) -> None:
        if self.vary_parts and self.config.schedule.plan is not None:
            raise ConfigError(
                "--dip-vary-parts does not work with schedule.plan, which has split the "
                "microbatches of all batches (leave one of the two out)"
            )
