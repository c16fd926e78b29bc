"""Megatron's GPT builder in CPU mode, which is let take the stand-in for Transformer Engine.

With ``--fused-accumulation`` layers add to their gradients themselves, as on GPUs.  In the end
every rank says how many weight gradients its layers have put off, and how many bytes of activations
went to the host.
"""

import runpy
import sys
from pathlib import Path

from megatron.core.extensions.transformer_engine import HAVE_TE
from transformer_engine.pytorch.module.base import WeightGradStore

from megatron_dip.integration.cpu_mode import arguments
from megatron_dip.runtime.offload import Offloader

assert HAVE_TE
FUSES = "--fused-accumulation" in sys.argv
if FUSES:
    sys.argv.remove("--fused-accumulation")
arguments.CPU_RULES = tuple(
    rule for rule in arguments.CPU_RULES if rule.destination not in ("transformer_impl", "fp8")
)
arguments.CPU_DEFAULTS |= {
    "transformer_impl": "transformer_engine",
    "apply_rope_fusion": True,
    "gradient_accumulation_fusion": FUSES,
}
stored = []
put = WeightGradStore.put


def count_and_put(self, *given):
    stored.append(self)
    put(self, *given)


WeightGradStore.put = count_and_put
offloaders = []
make = Offloader.__init__


def note_and_make(self, *given):
    offloaders.append(self)
    make(self, *given)


Offloader.__init__ = note_and_make
runpy.run_path(str(Path(__file__).with_name("gpt_builder_script.py")), run_name="__main__")
assert not any(store.context.qsize() for store in stored)
moved = sum(offloader.moved_bytes for offloader in offloaders)
print(f"bytes moved: {moved} weight gradients put off: {len(stored)}", flush=True)
