"""Reading what a configuration file says of the schedule."""

from collections.abc import Collection
from pathlib import Path

from megatron_dip.config.schedule import DipConfig, ScheduleConfig
from megatron_dip.errors import ConfigError
from megatron_dip.forms import Form
from megatron_dip.reading import read_yaml

__all__ = ["load_dip_config", "resolve_paths", "resolve_schedule"]


def load_dip_config(path: str | Path, read_by_script: Collection[str] = ()) -> DipConfig:
    """What the YAML file at ``path`` says of the schedule; relative paths start at its folder.

    Args:
        read_by_script: Keys of the file that the run's script reads.

    Raises:
        ConfigError: The file cannot be read, a key is missing or out of range, or nobody reads it.
    """
    path = Path(path)
    data = read_yaml(path)
    own = set(DipConfig.model_fields)
    unread = sorted(map(str, set(data) - own - set(read_by_script)))
    if unread:
        raise ConfigError(
            f"{path}: nobody reads {', '.join(unread)} (expected {' and '.join(sorted(own))}: "
            f"family, model and data are keys for scripts like those of examples/, which say so by "
            f"Megatron's extra_args_provider; other models and data have flags of their scripts)"
        )
    form = {key: value for key, value in data.items() if key in own}
    config = DipConfig.parse(form, ConfigError, str(path))
    schedule = resolve_schedule(config.schedule, path.resolve().parent)
    return config.model_copy(update={"schedule": schedule})


def resolve_schedule(schedule: ScheduleConfig, folder: Path) -> ScheduleConfig:
    """``schedule`` with its relative paths starting at ``folder``."""
    costs = resolve_paths(schedule.costs, folder)
    return resolve_paths(schedule, folder).model_copy(update={"costs": costs})


def resolve_paths[FormT: Form](form: FormT, folder: Path) -> FormT:
    """``form`` with its relative paths starting at ``folder``."""
    paths = {
        name: folder / value
        for name, value in form
        if isinstance(value, Path) and not value.is_absolute()
    }
    return form.model_copy(update=paths)
