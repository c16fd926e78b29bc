"""The page about a model of one's own: its example trains as the model does by itself."""

import re
import shutil
from pathlib import Path

import pytest
from any_model_runs import ScriptRuns, assert_equal
from launching import REPOSITORY

SCRIPTS = Path(__file__).with_name("own_model")
PAGE = REPOSITORY / "docs" / "own_model.md"
ARGUMENTS = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16
    --max-position-embeddings 16 --normalization RMSNorm --untie-embeddings-and-output-weights
    --tokenizer-type NullTokenizer --vocab-size 63 --micro-batch-size 2 --global-batch-size 8
    --lr 0.001 --min-lr 0.001
"""
PIPELINE = "--pipeline-model-parallel-size 2"


def example() -> str:
    """The module that the page shows."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return code


def schedule_of_page() -> dict:
    """``schedule.modules`` that the page shows."""
    import yaml

    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return yaml.safe_load(text)["schedule"]["modules"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> ScriptRuns:
    folder = tmp_path_factory.mktemp("speech")
    for path in SCRIPTS.glob("*.py"):
        shutil.copy(path, folder)
    (folder / "staged_speech.py").write_text(example(), encoding="utf-8")
    return ScriptRuns(folder / "runs", folder / "train_speech.py", ARGUMENTS)


def test_the_example_is_short() -> None:
    assert len(example().splitlines()) < 60


def test_a_model_of_ones_own_trains_as_by_itself(runs: ScriptRuns) -> None:
    stock = runs.run(2, PIPELINE)
    models = f"{PIPELINE} --dip-models staged_speech --dip-check-parts"
    assert_equal(runs.run(2, models, schedule_of_page()), stock)


def test_a_model_that_nobody_registered_is_refused(runs: ScriptRuns) -> None:
    with pytest.raises(AssertionError, match=r"cannot cut my_models\.SpeechModel"):
        runs.run(2, PIPELINE, {})
