#!/usr/bin/env bash
# Sets up, then runs the linters, the type checker and the tests.
#
#   bash scripts/test.sh [pytest arguments]      paths are relative to the repository's root
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
python="$root/.venv/bin/python"
check_limit_s=300
# A guard against a hang, about twice what the tests take on two slow cores.
pytest_limit_s=3600
failed=()
child=""

stop() {
    # `timeout` passes the signal on to everything that it started.
    if [[ -n "$child" ]]; then kill -TERM "$child" 2>/dev/null || true; fi
    echo "test: interrupted" >&2
    exit 130
}
trap stop INT TERM HUP

# limited SECONDS NAME COMMAND...: in the background, so that an interrupt is acted on at once.
limited() {
    local limit_s="$1" name="$2" rc=0
    shift 2
    timeout --kill-after=15 "$limit_s" "$@" </dev/null &
    child=$!
    wait "$child" || rc=$?
    child=""
    if ((rc == 124 || rc == 137)); then echo "test: $name was stopped after $limit_s s" >&2; fi
    if ((rc != 0)); then failed+=("$name"); fi
}

bash "$root/scripts/setup.sh"
cd -- "$root"
# One thread per process: the tests start several processes, and a thread pool in each of them
# would fight for the same few cores.
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

echo "test: ruff"
limited "$check_limit_s" "ruff check" "$python" -m ruff check .
limited "$check_limit_s" "ruff format" "$python" -m ruff format --check --quiet --diff .
echo "test: mypy"
limited "$check_limit_s" "mypy" "$python" -m mypy
echo "test: pytest"
# All: two files at a time, because most tests compute on one core or wait for another process.
(($#)) || set -- --numprocesses 2 --dist loadfile --no-loadscope-reorder
limited "$pytest_limit_s" "pytest" "$python" -m pytest --durations=10 --durations-min=1 "$@"

if ((${#failed[@]} > 0)); then
    printf 'test: failed: %s\n' "$(printf '%s, ' "${failed[@]}" | sed 's/, $//')" >&2
    exit 1
fi
