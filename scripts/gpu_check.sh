#!/usr/bin/env bash
# Asks one GPU what this package has to assume about it; at most 12 minutes.
#
#   bash scripts/gpu_check.sh [FOLDER]      results go to benchmarks/results where none is given
#   PYTHON=/path/to/python bash scripts/gpu_check.sh
#
# Exits with 2 where there is no GPU, with 1 where a part failed. Every part has a time limit of its
# own; what it found is a line of JSON in gpu_check_<GPU>_<date>.jsonl, and text in the .txt beside.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
if (($# > 1)) || [[ "${1:-}" == -* ]]; then
    printf 'gpu-check: %s: expected at most the folder for results: bash scripts/gpu_check.sh [FOLDER]\n' "$*" >&2
    exit 2
fi
folder="${1:-$root/benchmarks/results}"
python="${PYTHON:-$root/.venv/bin/python}"
# Each with its limit in seconds; 720 together. Later parts read what the first one found.
parts=(machine_versions:60 hardware_queues:100 host_copies:40 offloading:40 late_peer:80
    executor_orders:120 training_syncs:210 layer_times:70)

fail() {
    printf 'gpu-check: %s\n' "$*" >&2
    exit 2
}

command -v "$python" >/dev/null || fail "there is no Python at $python: run scripts/setup.sh, or set PYTHON"
kind="$(timeout 60 "$python" -c '
import torch
print(torch.cuda.get_device_name(0).replace(" ", "_") if torch.cuda.is_available() else "")')" ||
    fail "$python cannot ask torch for a GPU (its error is above)"
[[ -n "$kind" ]] || fail "torch sees no GPU here, and nothing was checked: run this where there is one"

mkdir -p -- "$folder" || fail "cannot make $folder"
name="$folder/gpu_check_${kind}_$(date -u +%Y%m%dT%H%M%SZ)"
failed=0
for part in "${parts[@]}"; do
    rc=0
    timeout --kill-after=10 "${part#*:}" "$python" "$root/scripts/gpu_check/${part%:*}.py" \
        --device cuda --results "$name.jsonl" 2>&1 </dev/null | tee -a "$name.txt" || rc=$?
    if ((rc != 0)); then
        failed=1
        reason="ended with $rc"
        ((rc != 124 && rc != 137)) || reason="ended by its limit of ${part#*:} s"
        printf '{"part": "%s", "device": "cuda", "failed": "%s"}\n' "${part%:*}" "$reason" >>"$name.jsonl"
        printf '%s: %s\n' "${part%:*}" "$reason" | tee -a "$name.txt"
    fi
done
printf 'gpu-check: results are in %s.jsonl and .txt\n' "$name"
exit "$failed"
