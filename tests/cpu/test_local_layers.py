"""Layers for which scripts have Transformer Engine on a GPU do the same under CPU mode."""

from pathlib import Path

import pytest
from forked_ranks import fork_ranks

WORKER = Path(__file__).with_name("local_layers_worker.py")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local") / "run"
    return fork_ranks(folder, 1, [str(WORKER)], timeout_seconds=180)[0].output


@pytest.mark.parametrize(
    "line",
    [
        "packed sequences attend to themselves",
        "positions end with the packed sequences",
        "a padded batch is causal",
        "values have their own width",
        "CLIP is built without Transformer Engine",
    ],
)
def test_a_local_layer_does_what_transformer_engine_does(output, line):
    assert line in output, output
