#!/usr/bin/env bash
# Trains a small vision-language model on this machine's cores, under Megatron's own schedule and
# under plans, from the same weights; prints both and writes a timeline.  Needs no GPU.
#
#   bash scripts/quickstart.sh [--iterations N] [--output DIR]
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$root/scripts/setup.sh"
exec "$root/.venv/bin/python" "$root/scripts/quickstart.py" "$@"
