"""With the hooks installed and without ``--dip-schedule``, Megatron does what it does alone."""

import hashlib
import io
import json
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from any_model_runs import GPT_ARGUMENTS, GPT_SCRIPT
from launching import run_ranks
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from training_runs import train

STOCK = Path(__file__).with_name("stock_setup.py")
HOOKED = {
    "megatron.core.parallel_state.initialize_model_parallel",
    "megatron.core.pipeline_parallel.get_forward_backward_func",
    "megatron.core.pipeline_parallel.schedules.get_forward_backward_func",
    "megatron.training.arguments.add_megatron_arguments",
    "megatron.training.models.dist_utils.build_virtual_pipeline_stages",
    "megatron.training.training.dummy_train_step",
    "megatron.training.training.get_forward_backward_func",
    "megatron.training.training.get_model",
}
OF_A_RUN = re.compile(r"\[20[^]]*\]|time per iteration \(ms\): \S+|\S*/(?:plain|hooked)\S*")


def test_hooks_stand_before_few_functions_and_choose_megatrons_schedules() -> None:
    (rank,) = run_ranks(1, [sys.executable, str(STOCK), "--list-hooks"], 120.0)
    assert rank.returncode == 0, rank.output
    found = json.loads(rank.output.splitlines()[-1])
    assert set(found["changed"]) >= HOOKED
    by_function = {name.rpartition(".")[2] for name in found["changed"]}
    assert by_function == {name.rpartition(".")[2] for name in HOOKED}
    assert all(found["changed"].values()), "something else than the original stands behind a hook"
    assert found["chosen"] == [
        "forward_backward_no_pipelining",
        "forward_backward_pipelining_without_interleaving",
        "forward_backward_pipelining_with_interleaving",
    ]


def test_a_run_without_the_flag_logs_and_saves_what_megatron_alone_does(tmp_path: Path) -> None:
    before = hash_of_megatron()
    arguments = f"{GPT_ARGUMENTS} --pipeline-model-parallel-size 2 --train-iters 2 --eval-iters 1"
    options = "--log-interval 1 --eval-interval 2 --distributed-timeout-minutes 4 --save-interval 2"
    text = f"{arguments} {options} --lr-decay-style constant --make-vocab-size-divisible-by 1"
    words = shlex.split(f"{text} --hidden-dropout 0 --attention-dropout 0 --eval-interval 1000")
    command = [sys.executable, str(STOCK), str(GPT_SCRIPT), *words]
    plain = run_ranks(2, [*command, "--save", str(tmp_path / "plain")], 250.0)
    assert [rank.returncode for rank in plain] == [0, 0], plain[-1].output[-3000:]
    hooked = train(
        tmp_path / "run", 2, *words, "--save", str(tmp_path / "hooked"), script=GPT_SCRIPT
    )
    assert steps_of(hooked.log) == steps_of(plain[-1].output)
    assert len(steps_of(hooked.log)) >= 3, hooked.log[-3000:]
    ours, theirs = (tensors_of(tmp_path / name / "iter_0000002") for name in ("plain", "hooked"))
    assert ours.keys() == theirs.keys() and len(ours) > 10
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert hash_of_megatron() == before


def steps_of(log: str) -> list[str]:
    """Lines about iterations, evaluations and checkpoints, without times and folders; the launcher
    leaves notices out."""
    about = ("elapsed time per", "validation loss", "successfully saved")
    return [
        OF_A_RUN.sub("", line) for line in log.splitlines() if any(one in line for one in about)
    ]


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and the optimizer's state, by name and place."""
    metadata = FileSystemReader(checkpoint).read_metadata()
    found = {}
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata[index.fqn], TensorStorageMetadata):
            raw = (checkpoint / place.relative_path).read_bytes()[place.offset :][: place.length]
            found[f"{index.fqn} {index.offset}"] = torch.load(io.BytesIO(raw), weights_only=True)
    return found


def hash_of_megatron() -> str:
    """Of all sources and data of the installed packages."""
    digest = hashlib.sha256()
    for package in ("megatron.core", "megatron.training"):
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations is not None
        for path in sorted(Path(next(iter(spec.submodule_search_locations))).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()
