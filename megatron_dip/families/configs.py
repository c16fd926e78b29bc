"""The families of models that a configuration may name, and reading one."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from megatron_dip.config.load import resolve_paths, resolve_schedule
from megatron_dip.errors import ConfigError, shown
from megatron_dip.families.forms import FamilyConfig
from megatron_dip.families.lavin.config import LavinConfig
from megatron_dip.families.omni.config import OmniConfig
from megatron_dip.families.t2v.config import T2vConfig
from megatron_dip.families.vlm.config import VlmConfig
from megatron_dip.reading import read_yaml

__all__ = ["DEFAULT_FAMILY", "FAMILIES", "load_config"]

DEFAULT_FAMILY = "vlm"
FAMILIES: Mapping[str, type[FamilyConfig]] = MappingProxyType(
    {"vlm": VlmConfig, "t2v": T2vConfig, "omni": OmniConfig, "lavin": LavinConfig}
)
"""The form of every family, by the name that ``family`` gives in a configuration.

What builds and feeds the models is beside them.
"""


def load_config(path: str | Path) -> FamilyConfig:
    """The configuration in a YAML file; relative paths in it start at the file's folder.

    Raises:
        ConfigError: The file cannot be read, or a key is missing, unknown or out of range.
        PartitionError: The partition that it names cannot be read or does not fit the model.
    """
    path = Path(path)
    data = read_yaml(path)
    family = data.get("family", DEFAULT_FAMILY)
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(f"{path}: family: {shown(family)} (expected one of {sorted(FAMILIES)})")
    config = FAMILIES[family].parse(data, ConfigError, str(path))
    folder = path.resolve().parent
    resolved = config.model_copy(
        update={
            "data": resolve_paths(config.data, folder),
            "schedule": resolve_schedule(config.schedule, folder),
        }
    )
    if config.schedule.partition is not None and config.schedule.num_ranks is not None:
        resolved.partition(config.schedule.num_ranks)
    return resolved
