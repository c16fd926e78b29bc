"""A tiny Qwen2.5-VL with Hugging Face weights, trained by megatron-bridge's own loop.

Usage: ``megatron_dip.launch --cpu bridge_script.py FOLDER [--dip]``; with ``--dip`` under plans.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bridge_setup


def main() -> None:
    bridge_setup.stand_in()
    from megatron_dip.integration.versions import build_helpers_where_they_can_be_built

    build_helpers_where_they_can_be_built()
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.vlm_step import forward_step

    folder = Path(sys.argv[1])
    if "--dip" in sys.argv:
        ask_for_plans(folder)
    pretrain(configuration(folder), forward_step)


def ask_for_plans(folder: Path) -> None:
    """Uneven stages; single images, videos and sequences."""
    from megatron_dip.config import DipConfig
    from megatron_dip.integration.hooks import enable
    from megatron_dip.integration.options import DipOptions

    modules = {
        "vision": {"layers": [[1, 1], [2, 0]], "sub_microbatch_tokens": 40},
        "language": {"layers": [[1, 1], [0, 1]], "sub_microbatch_tokens": bridge_setup.SEQUENCE},
    }
    config = DipConfig.model_validate({"schedule": {"modules": modules}})
    enable(DipOptions(config=config, log_interval=1, trace_dir=folder / "traces"))


def configuration(folder: Path) -> Any:
    """Of two microbatches of two sequences per step."""
    from megatron.bridge.training.config import (
        CheckpointConfig,
        ConfigContainer,
        DistributedDataParallelConfig,
        LoggerConfig,
        OptimizerConfig,
        SchedulerConfig,
        TokenizerConfig,
        TrainingConfig,
        ValidationConfig,
    )

    return ConfigContainer(
        train=TrainingConfig(train_iters=3, global_batch_size=4, micro_batch_size=2),
        model=provider(folder),
        optimizer=OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=1e-3, clip_grad=1.0),
        scheduler=SchedulerConfig(
            lr_decay_style="constant",
            lr_warmup_iters=0,
            start_weight_decay=0.0,
            end_weight_decay=0.0,
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=False),
        validation=ValidationConfig(eval_interval=3, eval_iters=1),
        dataset=data(),
        logger=LoggerConfig(log_interval=1, tensorboard_dir=None, log_timers_to_tensorboard=False),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=60),
        checkpoint=CheckpointConfig(save=None, async_strategy="mcore"),
    )


def provider(folder: Path) -> Any:
    """With weights of a Hugging Face model, which come out of the stages as they went in."""
    import torch
    from megatron.bridge import AutoBridge

    model = folder / f"model_of_rank_{os.environ['RANK']}"
    bridge_setup.save_hugging_face_model(model)
    bridge = AutoBridge.from_hf_pretrained(str(model))
    given = {name: tensor.clone() for name, tensor in bridge.hf_pretrained.state.items()}

    def export(stages: list[Any]) -> list[Any]:
        exported = dict(bridge.export_hf_weights(stages, cpu=True))
        equal = [name for name, tensor in exported.items() if torch.equal(tensor, given[name])]
        print(f"exported as loaded: {len(equal)} tensors of {len(given)}")
        return stages

    made = bridge_setup.on_cpu(bridge.to_megatron_provider())
    made.register_pre_wrap_hook(export)
    made.pipeline_model_parallel_size = int(os.environ["WORLD_SIZE"])
    made.pipeline_dtype = torch.float32
    return made


def data() -> Any:
    """A microbatch for every two samples."""
    import torch
    from megatron.bridge.data.base import DatasetProvider

    class Samples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> int:
            return index

        def collate_fn(self, indices: list[int]) -> dict[str, Any]:
            return bridge_setup.tiny_batch(indices[0])

    @dataclass(kw_only=True)
    class TinyData(DatasetProvider):
        seq_length: int = bridge_setup.SEQUENCE

        def build_datasets(self, context: Any) -> Any:
            return Samples(), Samples(), None

    return TinyData(dataloader_type="single", num_workers=0, pin_memory=False)


if __name__ == "__main__":
    main()
