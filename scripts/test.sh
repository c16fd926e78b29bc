#!/usr/bin/env bash
# Sets up, then runs the linters, the type checker and the tests.
#
#   bash scripts/test.sh [pytest arguments]      paths are relative to the repository's root
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
python="$root/.venv/bin/python"
check_limit_s=300
type_limit_s=900
type_log="$root/build/mypy.log"
# A guard against a hang, about twice what the tests take on two slow cores.
pytest_limit_s=3600
failed=()
child=""
type_checker=""

stop() {
    # `timeout` passes the signal on to everything that it started.
    for one in $child $type_checker; do kill -TERM "$one" 2>/dev/null || true; done
    echo "test: interrupted" >&2
    exit 130
}
trap stop INT TERM HUP

# ended NAME STATUS SECONDS
ended() {
    if (($2 == 124 || $2 == 137)); then echo "test: $1 was stopped after $3 s" >&2; fi
    if (($2 != 0)); then failed+=("$1"); fi
}

# limited SECONDS NAME COMMAND...: in the background, so that an interrupt is acted on at once.
limited() {
    local limit_s="$1" name="$2" rc=0
    shift 2
    timeout --kill-after=15 "$limit_s" "$@" </dev/null &
    child=$!
    wait "$child" || rc=$?
    child=""
    ended "$name" "$rc" "$limit_s"
}

bash "$root/scripts/setup.sh"
cd -- "$root"
# One thread per process: the tests start several processes, and a thread pool in each of them
# would fight for the same few cores.
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

echo "test: ruff"
limited "$check_limit_s" "ruff check" "$python" -m ruff check .
limited "$check_limit_s" "ruff format" "$python" -m ruff format --check --quiet --diff .
mkdir -p -- "$root/build"
# Beside the tests: it computes on one core for a minute or more.
echo "test: mypy, whose output comes last where it finds something"
timeout --kill-after=15 "$type_limit_s" "$python" -m mypy >"$type_log" 2>&1 </dev/null &
type_checker=$!
echo "test: pytest"
# All: two files at a time, because most tests compute on one core or wait for another process.
(($#)) || set -- --numprocesses 2 --dist loadfile --no-loadscope-reorder
limited "$pytest_limit_s" "pytest" "$python" -m pytest --durations=10 --durations-min=1 "$@"

type_status=0
wait "$type_checker" || type_status=$?
type_checker=""
ended "mypy" "$type_status" "$type_limit_s"
if ((type_status != 0)); then cat -- "$type_log"; fi

if ((${#failed[@]} > 0)); then
    printf 'test: failed: %s\n' "$(printf '%s, ' "${failed[@]}" | sed 's/, $//')" >&2
    exit 1
fi
