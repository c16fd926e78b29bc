"""The examples in ``docs/workloads.md`` are read by the code."""

import json
import re

from cost_cases import ROOT

from megatron_dip.costs.mixtures import draw_microbatches, load_workload

TEXT = (ROOT / "docs" / "workloads.md").read_text(encoding="utf-8")


def test_the_statistics_files_shown_are_valid(tmp_path):
    examples = re.findall(r"```json\n(.*?)```", TEXT, flags=re.DOTALL)
    assert [json.loads(example)["kind"] for example in examples] == [
        "vlm",
        "t2v",
        "packed",
        "grouped",
    ]
    for example in examples:
        path = tmp_path / "example.json"
        path.write_text(example)
        assert len(draw_microbatches(load_workload(path), 4, 0)) == 4
