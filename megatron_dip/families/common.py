"""What several families need: configs, an index that all ranks share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args

from megatron_dip.costs.shapes import ExpertsShape
from megatron_dip.errors import ConfigError, DataError
from megatron_dip.families.base import SetLengths
from megatron_dip.families.data.index import CheckedSamples, split_samples
from megatron_dip.families.data.tokenizer import load_tokenizer
from megatron_dip.families.forms import DataForm, LanguageConfig, TransformerForm
from megatron_dip.families.packed.configs import make_language_config
from megatron_dip.integration.same_inputs import check_same_index

__all__ = [
    "check_vocabulary",
    "make_backbone_config",
    "make_on_first_rank",
    "shared_index",
    "skips_bad_samples",
    "split_index",
    "stop_unneeded_dropout",
]


def make_on_first_rank(make: Callable[[], Path], folder: Path) -> Path:
    """The file that ``make`` writes into ``folder``, made by the first rank of the world.

    The folder must be visible to all ranks.

    Raises:
        DataError: The first rank failed to make it; raised on all ranks.
    """
    outcome: list[Any] = [None, None]
    mistake: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome = [str(make()), None]
        except DataError as error:
            outcome = [None, str(error)]
        except OSError as error:
            outcome = [
                None,
                f"the data index cannot be kept in {folder} ({error.strerror}): name a folder "
                f"that can be written to as data.cache_folder",
            ]
        except Exception as error:  # A mistake of ours: the others must not wait for this rank.
            mistake = error
            outcome = [None, f"rank 0 failed at the data index ({error!r}): see its log"]
    dist.broadcast_object_list(outcome, src=0)
    if mistake is not None:
        raise mistake
    shared_path, failure = outcome
    if failure is not None:
        raise DataError(failure)
    return Path(shared_path)


def check_vocabulary(data: DataForm, vocab_size: int, field: str = "language") -> None:
    """
    Raises:
        ConfigError: ``model.<field>.vocab_size`` has no room for all tokens of the tokenizer.
        DataError: The tokenizer cannot be read.
    """
    found = load_tokenizer(data.tokenizer, data.text_form())
    if found.vocab_size > vocab_size:
        raise ConfigError(
            f"{data.tokenizer} has {found.num_tokens} tokens with ids up to "
            f"{found.vocab_size - 1} but model.{field}.vocab_size is {vocab_size} (raise it to "
            f"{found.vocab_size} at least)"
        )


def shared_index[SettingsT, IndexT](
    settings: SettingsT,
    data: DataForm,
    build: Callable[[SettingsT, Path], tuple[IndexT, Path]],
    load: Callable[[Path], IndexT],
) -> IndexT:
    """The index of a data set, made by the first rank of the world and read by all.

    Raises:
        ConfigError: The file is not the same on all ranks, whose folders are not one.
        DataError: It cannot be made, or not be read.
    """
    folder = data.cache_folder or data.path.parent
    path = make_on_first_rank(lambda: build(settings, folder)[1], folder)
    check_same_index(path, get_args().dip_timeout_seconds)
    return load(path)


def skips_bad_samples(data: DataForm) -> bool:
    """Whether the configuration or the command line says so."""
    return data.skip_bad_samples or bool(get_args().skip_bad_samples)


def split_index(
    index: CheckedSamples, data: DataForm, lengths: SetLengths
) -> tuple[Sequence[int], Sequence[int]]:
    """The numbers of the samples for training and validation."""
    return split_samples(
        range(len(index.samples)),
        valid_share=data.valid_share,
        seed=get_args().seed,
        needs_valid=lengths.needs_valid,
    )


def stop_unneeded_dropout(form: TransformerForm, config: TransformerConfig) -> None:
    """No dropout in the layers of a module that is only used: it regularises training."""
    if form.is_only_used:
        config.hidden_dropout = config.attention_dropout = 0.0


def make_backbone_config(
    base: TransformerConfig, form: LanguageConfig, experts: ExpertsShape | None = None
) -> TransformerConfig:
    """Megatron's config of a language model; ``experts`` take the place of its MLPs."""
    return make_language_config(
        base,
        **form.sizes(),
        num_query_groups=form.num_query_groups,
        qkv_bias=form.qkv_bias,
        experts=experts,
        norm_epsilon=form.norm_epsilon,
    )
