"""Five steps of both tiny models in bf16: operations that make the host wait for the device.

``torch.cuda.set_sync_debug_mode("warn")`` names each; steps before the last three warm up.
"""

import argparse
import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

from check_results import ROOT, answers_of, part_arguments, report, start_ranks

_LIMIT_SECONDS = 110.0
_ARGUMENTS = """
    --dip-schedule --micro-batch-size 1 --global-batch-size 4 --train-iters 5 --lr 1e-3
    --lr-decay-style constant --log-interval 1 --eval-iters 0 --num-workers 0 --bf16
    --transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm
    --no-masked-softmax-fusion --make-vocab-size-divisible-by 1
"""


def main() -> None:
    """Run the part."""
    makers = {"vlm": _vlm, "t2v": _t2v}
    parser = part_arguments(__doc__, _LIMIT_SECONDS)
    parser.add_argument("--models", nargs="+", choices=sorted(makers), default=list(makers))
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for name in options.models:
            try:
                script, config = makers[name](Path(folder) / name)
            except ImportError as error:
                found[name] = {"not run": f"its sample data needs {error.name}"}
                continue
            found[name] = _watched(script, config, options)
    report(options.results, "training", options.device, found)


def _watched(script: Path, config: Path, options: argparse.Namespace) -> dict[str, Any]:
    record = config.with_suffix(".record")
    launch = ["-m", "megatron_dip.launch", *(["--cpu"] if options.device == "cpu" else [])]
    arguments = [
        *(*launch[1:], str(ROOT / "scripts" / "gpu_check" / "watched_training.py")),
        *(
            str(record),
            options.device,
            str(script),
            *shlex.split(_ARGUMENTS),
            "--dip-config",
            str(config),
        ),
    ]
    (rank,) = start_ranks(launch[0], arguments, 1, limit_seconds=options.limit_seconds)
    if not record.exists():
        return answers_of(rank)
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def _vlm(folder: Path) -> tuple[Path, Path]:
    from tiny_vlm import make_tiny_data, write_config

    make_tiny_data(folder, num_samples=60)
    config = write_config(folder / "config.yaml", folder, num_ranks=1)
    return ROOT / "examples" / "pretrain_vlm.py", config


def _t2v(folder: Path) -> tuple[Path, Path]:
    from tiny_t2v import make_tiny_clips, write_t2v_config

    make_tiny_clips(folder, num_clips=24)
    config = write_t2v_config(folder / "config.yaml", folder, num_ranks=1)
    return ROOT / "examples" / "pretrain_t2v.py", config


if __name__ == "__main__":
    main()
