"""Sets that a run does not need are not made: too few samples for them refuse nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_lavin import make_tiny_scienceqa, write_lavin_config

from megatron_dip.errors import DataError
from megatron_dip.families import common
from megatron_dip.families.base import SetLengths
from megatron_dip.families.configs import load_config
from megatron_dip.families.lavin import model as lavin_family

TRAIN = SetLengths(train=8, valid=0)
VALID = SetLengths(train=0, valid=8)
BOTH = SetLengths(train=8, valid=8)


def test_a_split_by_chance_keeps_nothing_where_nothing_is_evaluated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That of text-to-video and omni."""
    monkeypatch.setattr(common, "get_args", lambda: SimpleNamespace(seed=1))
    index: Any = SimpleNamespace(samples=[None] * 4)
    data: Any = SimpleNamespace(valid_share=0.05)
    assert common.split_index(index, data, TRAIN) == ((0, 1, 2, 3), ())
    for lengths in (VALID, BOTH):
        with pytest.raises(DataError, match="of 4 samples for validation"):
            common.split_index(index, data, lengths)


def test_a_part_of_scienceqa_that_is_not_needed_may_be_missing(tmp_path: Path) -> None:
    make_tiny_scienceqa(tmp_path / "data")

    def parts(lengths: SetLengths, **names: str) -> tuple[Any, Any]:
        path = write_lavin_config(tmp_path / "config.yaml", tmp_path / "data", **names)
        config: Any = load_config(str(path))
        return lavin_family._read_parts(config, 1, lengths)

    train, valid = parts(TRAIN, valid_split="missing")
    assert train is not None and len(train.samples) > 0 and valid is None
    train, valid = parts(VALID, train_split="missing")
    assert train is None and valid is not None and len(valid.samples) > 0
    with pytest.raises(DataError, match="missing"):
        parts(BOTH, valid_split="missing")
