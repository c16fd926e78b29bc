#!/usr/bin/env bash
# What the batch files beside this one share; each sources it after it has set JOB_KIND, its name in
# messages, and DIP_ROOT. What a cluster may have to change, as variables (given with
# `sbatch --export=ALL,NAME=value`, or edited here):
# shellcheck disable=SC2034  # Those that source this file use the variables.
DIP_SCRIPT="${DIP_SCRIPT:-$DIP_ROOT/examples/pretrain_vlm.py}"  # any Megatron pretrain script
DIP_VENV="${DIP_VENV:-$DIP_ROOT/.venv}"  # environment with the package; not used in a container
DIP_CONTAINER="${DIP_CONTAINER:-}"  # image for pyxis (srun --container-image), with the package inside
DIP_MOUNTS="${DIP_MOUNTS:-$DIP_ROOT:$DIP_ROOT}"  # what the container sees, as for --container-mounts
DIP_RUNS="${DIP_RUNS:-$DIP_ROOT/runs}"  # where the folder of this run is made
DIP_GPUS_PER_NODE="${DIP_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}"
DIP_CPU="${DIP_CPU:-no}"  # yes: on CPUs over gloo; DIP_GPUS_PER_NODE is then ranks per node

say() { printf '%s: %s\n' "$JOB_KIND" "$*"; }
fail() {
    printf '%s: %s\n' "$JOB_KIND" "$*" >&2
    exit 2
}

# prepare CONFIG FOLDER...: checks what the job was given. Sets config, python, container, launcher
# options, hosts, the place of rendezvous and run_dir with the FOLDERs in it.
prepare() {
    [[ -n "${1:-}" ]] ||
        fail "no configuration was given (expected: sbatch scripts/slurm/$JOB_KIND.sbatch CONFIG.yaml [Megatron arguments...])"
    [[ -n "${SLURM_JOB_ID:-}" ]] || fail "this is no SLURM job: submit the file with sbatch"
    local tool folder
    for tool in srun scontrol; do
        command -v "$tool" >/dev/null || fail "$tool is not on PATH: SLURM's client commands must be installed on the nodes"
    done
    cd -- "$DIP_ROOT" || fail "DIP_ROOT=$DIP_ROOT cannot be entered"
    [[ -f "$1" ]] || fail "the configuration $1 does not exist (seen from $DIP_ROOT)"
    config="$(realpath -- "$1")"
    shift
    [[ -f "$DIP_SCRIPT" ]] || fail "the pretrain script $DIP_SCRIPT does not exist: submit from the repository's root, or set DIP_SCRIPT"
    [[ "$DIP_GPUS_PER_NODE" =~ ^[1-9][0-9]*$ ]] || fail "DIP_GPUS_PER_NODE=$DIP_GPUS_PER_NODE is not a number of GPUs"

    container=()
    if [[ -n "$DIP_CONTAINER" ]]; then
        python=python
        container=(--container-image="$DIP_CONTAINER" --container-mounts="$DIP_MOUNTS" --container-workdir="$DIP_ROOT")
    else
        python="$DIP_VENV/bin/python"
        [[ -x "$python" ]] || fail "there is no Python in $DIP_VENV: run scripts/setup.sh on a login node, or set DIP_VENV or DIP_CONTAINER"
    fi
    launcher_options=(--dip-verbose)  # The logs are files, which hold all that is printed.
    if [[ "$DIP_CPU" == yes ]]; then launcher_options+=(--cpu); fi

    run_dir="$DIP_RUNS/${SLURM_JOB_NAME:-megatron-dip}-$SLURM_JOB_ID"
    for folder in logs "$@"; do
        mkdir -p -- "$run_dir/$folder" || fail "cannot make $run_dir/$folder"
    done

    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    ((${#hosts[@]} > 0)) || fail "scontrol names no host in SLURM_JOB_NODELIST=${SLURM_JOB_NODELIST:-}"
    MASTER_ADDR="${hosts[0]}"
    # Below the ports that the system hands out by itself, and not the same for jobs that share a node.
    MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
}

# connections_for ARGUMENTS...: on GPUs before Blackwell Megatron asserts one hardware queue for
# tensor and context parallelism (on Blackwell, set CUDA_DEVICE_MAX_CONNECTIONS=32 yourself). Else
# every stream gets one, because a transfer that waits holds up what is queued behind it.
connections_for() {
    local flag="" word
    for word in "$@"; do
        [[ "$word" != *=* ]] || { flag="${word%%=*}"; word="${word#*=}"; }
        case "$flag" in
            --tensor-model-parallel-size | --context-parallel-size)
                if [[ "$word" != 1 ]]; then echo 1 && return; fi ;;
        esac
        flag="$word"
    done
    echo 32
}

# run_on_nodes ARGUMENTS...: the pretrain script on all nodes, one torchrun on each.
run_on_nodes() {
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-$(connections_for "$@")}"
    say "job $SLURM_JOB_ID, ${#hosts[@]} nodes x $DIP_GPUS_PER_NODE ranks, rendezvous at $MASTER_ADDR:$MASTER_PORT"
    say "logs: $run_dir/logs/node-*.log"
    # Without --cpu-bind=none the one task of a node, and with it all of its ranks, can end on one core.
    srun --kill-on-bad-exit=1 --cpu-bind=none --nodes="${#hosts[@]}" --ntasks-per-node=1 \
        --output="$run_dir/logs/node-%n.log" --open-mode=append \
        ${container[@]+"${container[@]}"} \
        "$python" -m torch.distributed.run \
        --nnodes="${#hosts[@]}" --nproc-per-node="$DIP_GPUS_PER_NODE" --max-restarts=0 \
        --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \
        -m megatron_dip.launch "${launcher_options[@]}" "$DIP_SCRIPT" \
        --dip-schedule --dip-config "$config" "$@"
}

# A kernel that is loaded when it is first used may wait for all that runs, receives among them.
export CUDA_MODULE_LOADING="${CUDA_MODULE_LOADING:-EAGER}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Sizes differ from batch to batch: without it, the allocator's memory falls into pieces.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# A rank that fails ends the job instead of leaving the others in a collective.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
export PYTHONUNBUFFERED=1
