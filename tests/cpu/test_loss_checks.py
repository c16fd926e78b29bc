"""The examples measure stragglers and check losses as ``pretrain_gpt.py`` does."""

import re
from pathlib import Path

from failing_runs import run_vlm
from launching import free_port
from tiny_vlm import make_tiny_data, write_config


def test_stragglers_are_reported_and_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    make_tiny_data(tmp_path / "data", num_samples=40)
    config = write_config(tmp_path / "dip.yaml", tmp_path / "data", num_ranks=1)
    measures = ("--log-straggler", "--straggler-ctrlr-port", str(free_port()))
    # The first step makes weights of which nothing finite can be computed.
    diverges = ("--optimizer", "sgd", "--lr", "inf", "--min-lr", "inf", "--clip-grad", "0")
    (rank,) = run_vlm(
        tmp_path / "run",
        1,
        *("--dip-schedule", "--dip-config", str(config), "--rerun-mode", "disabled"),
        *measures,
        *diverges,
    )
    shown = rank.output[-4000:]
    assert re.search(r"MnRtt/Rnk: [1-9]", rank.output), shown
    assert rank.returncode != 0, shown
    assert "found NaN in local forward loss calculation" in rank.output, shown
