"""What a run prints: lists and notices of every run are left out, and nothing else."""

import io
import logging
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from gpt_runs import launch

from megatron_dip.integration.quiet import LineFilter, quiet_output

LEFT_OUT = """\
WARNING: one_logger package is required to enable e2e metrics tracking. please go to
------------------------ arguments ------------------------
  train_iters ..................................... 100
  inference_dynamic_batching_paused_buffer_size_gb  None
  tokenizer_model ................................. None
  iterations_to_skip .............................. []
-------------------- end of arguments ---------------------
Number of virtual stages per pipeline stage: None
> initialized pipeline model parallel with size 2
>>> done with dataset index builder. Compilation time: 0.000 seconds
time to initialize megatron (seconds): 4.799
[after megatron is initialized] datetime: 2026-11-29 11:24:06.830947 
    train:      24
[Rank 1] (after 1 iterations) memory (MB) | allocated: 0.00 | max allocated: 0.00 | reserved: 0.00
"""  # noqa: W291
KEPT = """\
using world size: 2, data-parallel size: 1
  train_iters ..................................... 100
 [2026-11-29 11:24:55] iteration 3/ 3 | consumed samples: 24 | lm loss: nan | grad norm: 5.755 |
[Rank 1] (after 1 iterations) memory (MB) | allocated: 0.00 | max allocated: 12.50 | reserved: 0.00
[Rank 0] Result validation failed in iteration 3
WARNING: the learning rate is zero
[2026-11-29 11:24:55.379568] saving checkpoint at iteration       3 to runs/checkpoint

    a line of the user's own
"""


def filtered(text: str, size: int) -> str:
    """What passes, where the text is written in pieces of ``size``."""
    stream = io.StringIO()
    lines = LineFilter(stream)
    for start in range(0, len(text), size):
        lines.write(text[start : start + size])
    lines.flush()
    return stream.getvalue()


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_lists_and_notices_of_every_run_are_left_out_and_nothing_else(size: int) -> None:
    assert filtered(LEFT_OUT, size) == ""
    assert filtered(KEPT, size) == KEPT
    assert filtered(LEFT_OUT + KEPT + LEFT_OUT, size) == KEPT


def test_a_list_of_arguments_that_breaks_off_takes_nothing_with_it() -> None:
    begin = "------------------------ arguments ------------------------\n"
    later = "the cause\n  train_iters ..................................... 100\n"
    assert filtered(begin + "  seed ........ 1\n" + later, 100) == later


def test_a_line_that_never_ends_is_passed_on_when_the_stream_is_flushed() -> None:
    stream = io.StringIO()
    lines = LineFilter(stream)
    print("the last words", end="", file=lines)
    assert stream.getvalue() == ""
    lines.flush()
    assert stream.getvalue() == "the last words"


def test_other_records_and_warnings_of_the_same_origin_are_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    buckets = logging.getLogger("megatron.core.distributed.param_and_grad_buffer")
    stdout = io.StringIO()
    with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with redirect_stdout(stdout), quiet_output(on_cpu=True):
            buckets.info("Number of buckets for gradient all-reduce: 1\nParams for bucket 1")
            buckets.info("another message")
            buckets.error("Number of buckets is wrong")
            warnings.warn(
                "Transformer Engine and Apex are not installed. Falling back", stacklevel=1
            )
            warnings.warn("MimoModelConfig is experimental and still", stacklevel=1)
            warnings.warn("the gradient norm is nan", stacklevel=1)
            print("> initializing torch distributed ...")
            print("training ...")
        buckets.info("Number of buckets for gradient all-reduce: 2")
    kept = [record.getMessage() for record in caplog.records]
    assert kept == [
        "another message",
        "Number of buckets is wrong",
        "Number of buckets for gradient all-reduce: 2",
    ]
    assert [str(one.message) for one in warned] == ["the gradient norm is nan"]
    assert stdout.getvalue() == "training ...\n"
    assert not isinstance(sys.stdout, LineFilter)


def test_on_a_gpu_it_is_told_that_kernels_are_missing() -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with quiet_output(on_cpu=False):
            warnings.warn("Transformer Engine and Apex are not installed. Falling", stacklevel=1)
    assert len(warned) == 1


def test_the_launcher_is_quiet_unless_told_otherwise(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "print('training ...')\nprint('Number of virtual stages per pipeline stage: None')\n"
        "raise SystemExit('the last error')\n"
    )
    quiet, verbose = launch(str(script)), launch("--dip-verbose", str(script))
    assert quiet.returncode == verbose.returncode == 1
    for one in (quiet, verbose):
        assert "training ..." in one.output and "the last error" in one.output
    assert "virtual stages" not in quiet.output and "--dip-verbose" in quiet.output
    assert "virtual stages" in verbose.output and "--dip-verbose" not in verbose.output
