"""Functions that Megatron has torch compile: few versions, whatever the shapes of batches."""

import pytest
import torch
from megatron.core.fusions import fused_bias_gelu
from torch._dynamo import config
from torch._dynamo.testing import CompileCounter

from megatron_dip.integration.compiled_functions import allow_versions

# As Megatron wrote it: its own object may be compiled already, for a device.
GELU = getattr(fused_bias_gelu.bias_gelu, "_torchdynamo_orig_callable", fused_bias_gelu.bias_gelu)


@pytest.fixture(autouse=True)
def _limit_of_torch():
    with config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def versions(rows, widths, *dtypes):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(GELU, backend=counter)
    for dtype in dtypes:
        for num_rows in rows:
            for width in widths:
                compiled(torch.zeros(width, dtype=dtype), torch.zeros(num_rows, 1, width).to(dtype))
    return counter.frame_count


def test_versions_do_not_grow_with_numbers_of_rows():
    few, many = (7, 30), range(20, 60)
    assert versions(few, (32, 48), torch.float32) == versions(many, (32, 48), torch.float32) == 3


def test_more_versions_than_torch_allows_stay_compiled():
    # Every type has versions of its own, and so has a single row.
    cases = (5, 6, 1), (32, 48), torch.float32, torch.bfloat16, torch.float16, torch.float64
    stopped = versions(*cases)
    allow_versions()
    assert versions(*cases) > stopped == 8
