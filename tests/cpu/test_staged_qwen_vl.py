"""Qwen2.5-VL of megatron-bridge in stages, where megatron-bridge is installed."""

import importlib.util
from pathlib import Path

import pytest
from forked_ranks import fork_ranks

WORKER = Path(__file__).with_name("qwen_vl_worker.py")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is None,
    reason="megatron-bridge is not installed (pip install -e '.[bridge]')",
)


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bridge") / "run"
    return fork_ranks(folder, 1, [str(WORKER)], timeout_seconds=300)[0]


def test_tower_and_language_cut_anywhere_give_the_same_loss_and_gradients(completed):
    assert completed.output.count("equal: ") == 3, completed.output


def test_single_images_and_videos_as_items_give_the_same_loss_and_gradients(completed):
    assert completed.output.count("equal in single items: ") == 3, completed.output
    assert completed.returncode == 0
