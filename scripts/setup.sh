#!/usr/bin/env bash
# Makes .venv in the repository's root and installs this package into it, in editable mode with
# what its tests and examples need. Does nothing where that is up to date.
#
#   bash scripts/setup.sh            from any folder; as root or not
#   PYTHON=/path/to/python3.12 bash scripts/setup.sh    to use a certain interpreter
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
stamp="$venv/.megatron-dip-setup"
log="$root/build/setup.log"
lock="$root/build/setup.lock"
install_limit_s=1800
# Settings made for other Python programs must not reach the environment made here.
unset PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX

say() { printf 'set-up: %s\n' "$*"; }
fail() {
    printf 'set-up: %s\n' "$*" >&2
    exit 1
}

# What .venv must have been made from to count as up to date; empty where its Python doesn't run.
wanted_stamp() {
    "$venv/bin/python" -I - "$root" 2>/dev/null <<'PYTHON' || true
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256()
for name in ("setup.py", "pyproject.toml"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest(), sys.version.split()[0], root)
PYTHON
}

is_up_to_date() {
    [[ -r "$stamp" && -x "$venv/bin/python" ]] && [[ "$(cat -- "$stamp")" == "$(wanted_stamp)" ]]
}

# Every interpreter worth trying, one per line, the likeliest first. The globs that match nothing
# stay as they are and are dropped by the test for an executable file.
list_candidates() {
    local home="${HOME:-/nonexistent}" name
    for name in python3.12 python3.13 python3.14 python3 python; do type -aP "$name" || true; done
    printf '%s\n' \
        "${PYENV_ROOT:-$home/.pyenv}"/versions/*/bin/python3 \
        "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$home/.local/share}/uv/python}"/*/bin/python3 \
        "${CONDA_PREFIX:-/opt/conda}"/bin/python3 \
        {"$home",/opt}/{miniconda3,anaconda3,miniforge3,mambaforge,conda}{,/envs/*}/bin/python3 \
        "$home"/.asdf/installs/python/*/bin/python3 \
        "$home"/.local/share/mise/installs/python/*/bin/python3 \
        /opt/*/bin/python3 /opt/python/*/bin/python3 \
        /usr/local/bin/python3.1[2-9] /usr/bin/python3.1[2-9] /opt/homebrew/bin/python3.1[2-9]
}

# Prints "<version> <what is wrong with it, or ok>" for one interpreter. It is really run: the
# shims of version managers are executable files even where the version behind them is missing.
probe() {
    local answer
    if answer="$(timeout 30 "$1" -I -c '
import sys
version = "%d.%d.%d" % sys.version_info[:3]
problem = "ok"
if sys.version_info < (3, 12):
    problem = "too old"
else:
    try:
        import ensurepip, ssl, venv
    except ImportError as error:
        problem = "lacks %s (on Debian and Ubuntu: apt install python%d.%d-venv)" % (
            error.name, sys.version_info[0], sys.version_info[1])
print(version, problem)' 2>&1 </dev/null)"; then
        printf '%s\n' "$answer"
    else
        printf -- '- does not run: %s\n' "${answer##*$'\n'}"
    fi
}

# Sets `python` to the one that was asked for, else to the first 3.12 that runs, else to the first
# later version.
find_python() {
    local candidate answer later="" tried="" seen=$'\n'
    python=""
    if [[ -n "${PYTHON:-}" ]]; then
        python="$(type -P -- "$PYTHON" || true)"
        answer="$(probe "${python:-$PYTHON}")"
        if [[ "$answer" == *" ok" ]]; then return; fi
        say "PYTHON=$PYTHON cannot be used (${answer#- }); looking for another"
        tried+="  $PYTHON: ${answer#- }"$'\n'
        python=""
    fi
    while IFS= read -r candidate; do
        [[ -x "$candidate" && ! -d "$candidate" && "$candidate" != "$venv"/* ]] || continue
        [[ "$seen" != *$'\n'"$candidate"$'\n'* ]] || continue
        seen+="$candidate"$'\n'
        answer="$(probe "$candidate")"
        case "$answer" in
            3.12.*" ok") python="$candidate" && return ;;
            *" ok") later="${later:-$candidate}" ;;
            *) tried+="  $candidate: ${answer#- }"$'\n' ;;
        esac
    done < <(list_candidates 2>/dev/null)
    python="$later"
    [[ -n "$python" ]] || fail "no Python >= 3.12 with venv and ensurepip was found. Tried:
${tried:-  nothing: there is no Python on PATH or in the usual folders
}Install one (apt install python3.12 python3.12-venv, or pyenv, uv or conda), or name one:
  PYTHON=/path/to/python3.12 bash scripts/setup.sh"
}

# Leaves a .venv whose Python is new enough, runs, and has pip.
make_venv() {
    local version
    if version="$("$venv/bin/python" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)"; then
        case "$version" in
            2.* | 3.[0-9] | 3.1[01])
                fail "$venv holds Python $version, and this needs 3.12 or later: remove that folder, then run this again" ;;
        esac
        if "$venv/bin/python" -I -m pip --version >/dev/null 2>&1; then return; fi
        if "$venv/bin/python" -I -m ensurepip >>"$log" 2>&1; then return; fi
    fi
    find_python
    say "making .venv with $python"
    "$python" -I -m venv --clear "$venv" >>"$log" 2>&1 || {
        tail -n 20 -- "$log" >&2
        fail "$python could not make $venv (its output is above)"
    }
}

run_pip() {
    # From the root and with a relative path, because pip reads spaces and brackets in a path as
    # parts of a requirement.
    (cd -- "$root" && timeout "$install_limit_s" "$venv/bin/python" -m pip install \
        --disable-pip-version-check --root-user-action=ignore --no-input \
        --progress-bar off --editable '.[dev]' >>"$log" 2>&1 </dev/null 9>&-)
}

install_package() {
    local rc=0
    local network='connection broken|from versions: none|ConnectionError|ConnectTimeout|ReadTimeout|timed out|IncompleteRead|ProtocolError|name resolution|Connection (reset|refused|aborted)|HTTP error 5'
    say "installing megatron-dip and what it needs (PyTorch is large: a few minutes the first time)"
    run_pip || rc=$?
    if ((rc != 0)) && grep -qE "$network" -- "$log"; then
        say "the network failed; trying once more"
        rc=0
        run_pip || rc=$?
    fi
    if ((rc != 0)); then
        tail -n 40 -- "$log" >&2
        if ((rc == 124)); then fail "pip was stopped after $install_limit_s s (all of its output: $log)"; fi
        fail "pip could not install the package, exit status $rc (all of its output: $log)"
    fi
}

main() {
    if is_up_to_date; then
        say "up to date"
        return
    fi
    mkdir -p -- "$root/build" 2>/dev/null && [[ -w "$root" && -w "$root/build" ]] ||
        fail "cannot write to $root: run this as the owner of the folder, or clone the repository into your own"
    exec 9>"$lock"
    if command -v flock >/dev/null && ! flock -n 9; then
        say "another set-up of this folder is at work; waiting for it"
        flock -w "$install_limit_s" 9 || fail "the other set-up has not ended after $install_limit_s s"
        if is_up_to_date; then
            say "up to date"
            return
        fi
    fi
    : >"$log"
    make_venv
    rm -f -- "$stamp"
    install_package
    wanted_stamp >"$stamp.new"
    mv -f -- "$stamp.new" "$stamp"
    say "ready after $SECONDS s: $venv/bin/python"
}

main
