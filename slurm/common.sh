# What the job scripts of this folder share. Sourced by them after their settings; docs/cluster.md describes it.
#
#   prepare_job        check the settings, set up the environment, say what runs where
#   check_nodes        look at every node; a bad one is named, and the job is queued again without it
#   train_until_done   train under torchrun, and decide what becomes of the job
#
# Exit codes of a job: 0 complete, 75 stopped before its last step (submit it again to resume), 2 an error to fix first,
# 1 given up. Jobs that wait for this one with afterok start after 0 alone.

EXIT_FIX=2
EXIT_STOPPED=75
signalled= # not empty from the time that SLURM announces the end of the job's time, or preempts it

say() { printf '%s %s: %s\n' "$(date +%FT%T)" "${SLURM_JOB_NAME:-job}" "$*"; }

fail() { # CODE MESSAGE
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}

require() { # NAMES: each is a setting that must not be empty
    local name
    for name in "$@"; do
        [ -n "${!name:-}" ] || fail $EXIT_FIX "$name is empty: give it with sbatch --export=ALL,$name=..., or let tools.launch write the script"
    done
}

prepare_job() {
    [ -n "${SLURM_JOB_ID:-}" ] || fail $EXIT_FIX "this is a job script: submit it with sbatch"
    local word
    for word in "${OVERRIDES[@]:-}"; do
        if [[ $word = train.output_dir=* ]]; then fail $EXIT_FIX "give the run folder as OUTPUT_DIR instead of $word"; fi
    done
    PYTHON=${PYTHON:-}
    if [ -z "$PYTHON" ]; then
        if [ -n "${CONTAINER_IMAGE:-}" ]; then PYTHON=python; else PYTHON=$REPO/.venv/bin/python; fi
    fi
    if [ -z "${CONTAINER_IMAGE:-}" ]; then
        command -v "$PYTHON" >/dev/null || fail $EXIT_FIX "PYTHON=$PYTHON is not there: make it with tools/venv.sh, or set CONTAINER_IMAGE"
    elif [[ $(srun --help) != *--container-image* ]]; then
        fail $EXIT_FIX "CONTAINER_IMAGE needs NVIDIA's plugin pyxis: srun --help does not list --container-image on this node"
    elif [ -n "${OUTPUT_DIR:-}" ]; then
        OUTPUT_DIR=$(realpath -m "$OUTPUT_DIR") # mounted under this name: a link to it would not be found in the container
    fi
    mapfile -t nodes < <(scontrol show hostnames "${SLURM_JOB_NODELIST:-}")
    first_node=0 step_nodes=$SLURM_JOB_NUM_NODES # where commands run: on this many nodes of the job, from this one on
    set_environment
    if [ -n "${GPUS_PER_NODE:-}" ] && [ -z "$NPROC_PER_NODE" ]; then
        [ "$GPUS_PER_NODE" != 0 ] || fail $EXIT_FIX "the job has no GPUs: give NPROC_PER_NODE, the number of processes on a node's CPUs"
        NPROC_PER_NODE=$GPUS_PER_NODE
    fi
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on ${SLURM_JOB_NODELIST:-}"
}

# --- environment ------------------------------------------------------------------------------------------------------

variables=() # what `default` has set

default() { # NAME VALUE: set and export NAME unless the user has
    [ -n "${!1+set}" ] || printf -v "$1" '%s' "$2"
    export "${1?}"
    variables+=("$1")
}

set_environment() {
    default OMP_NUM_THREADS 1 # the loader's workers are the parallelism; more threads would compete with them
    default PYTHONUNBUFFERED 1 # lines appear in the log when they are written

    # NCCL and InfiniBand. What NCCL finds by itself is not set: give these where it finds the wrong thing.
    #   NCCL_SOCKET_IFNAME=ib0       the network of the rendezvous, where nodes have several
    #   NCCL_IB_HCA=mlx5             the InfiniBand adapters to use, where some belong to storage
    #   NCCL_IB_DISABLE=1            without InfiniBand, to find out whether it is the cause of a hang
    default NCCL_DEBUG WARN # problems alone; INFO shows which network is used
    default NCCL_IB_TIMEOUT 22 # about 17 s for a packet: congestion on large fabrics exceeds the 1 s of the default
    default NCCL_IB_RETRY_CNT 7 # retries before a lost link is an error; the most that the hardware takes
    default NCCL_NVLS_ENABLE 0 # NVLink SHARP costs GPU memory, and training here does not need its speed

    # PyTorch.
    default CUDA_DEVICE_MAX_CONNECTIONS 1 # communication starts before the computation with which it overlaps
    default PYTORCH_CUDA_ALLOC_CONF expandable_segments:True # packs differ: less memory is lost in gaps
    default TORCH_ALLOW_TF32_CUBLAS_OVERRIDE 0 # 1 in NVIDIA's image: products of float32, such as the router's, in TF32
    default TORCH_NCCL_AVOID_RECORD_STREAMS 1 # memory of communicated tensors is free again earlier
    default TORCH_NCCL_ASYNC_ERROR_HANDLING 1 # a failed collective ends its process instead of hanging
    default TORCH_FR_BUFFER_SIZE 2000 # the flight recorder keeps the last collectives ...
    default TORCH_NCCL_DUMP_ON_TIMEOUT 1 # ... and writes them where one times out
    if [ -n "${OUTPUT_DIR:-}" ]; then
        default TORCH_FR_DUMP_TEMP_FILE "$OUTPUT_DIR/flight_recorder_"
    fi

    # A new store for every start of the processes, which each node counts for itself: with one store for all starts the
    # nodes would not find each other after a crash.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

    # Compiled kernels: on the node's own disk, because thousands of small files burden a shared one.
    default TRITON_CACHE_DIR "${TMPDIR:-/tmp}/triton-$(id -u)"
    default TORCHINDUCTOR_CACHE_DIR "${TMPDIR:-/tmp}/inductor-$(id -u)"
}

# --- running on the nodes ---------------------------------------------------------------------------------------------

# Become a command that runs once on each of the nodes, in the container if there is one.
on_every_node() { # COMMAND...
    local in_container=() options=(--nodes="$step_nodes" --ntasks="$step_nodes" --ntasks-per-node=1 --kill-on-bad-exit=1)
    if [ "$step_nodes" != "$SLURM_JOB_NUM_NODES" ]; then options+=(--relative="$first_node"); fi
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then # srun does not take it from the job by itself
        options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    fi
    if [ -n "${CONTAINER_IMAGE:-}" ]; then # enroot and pyxis
        local mounts="$REPO:$REPO" name file files
        if [ -n "${OUTPUT_DIR:-}" ]; then mounts+=",$OUTPUT_DIR:$OUTPUT_DIR"; fi
        mapfile -d : -t files < <(printf '%s' "${CONFIG:-}")
        for file in "${files[@]}"; do # those beside the clone
            if [[ $file = /* && $file != "$REPO"/* ]]; then mounts+=",$file:$file"; fi
        done
        options+=(
            --container-image="$CONTAINER_IMAGE"
            --container-mounts="$mounts${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
            --container-workdir="$REPO"
            --no-container-mount-home # Python packages of a home directory would be found before the image's
        )
        in_container=(env) # variables of the image would replace ours
        for name in "${variables[@]}"; do in_container+=("$name=${!name}"); done
    fi
    # SIGUSR1 is for this script: torchrun, which does not know it, would die of it. Training takes it (train_until_done).
    exec srun "${options[@]}" bash -c "trap '' USR1; exec \"\$@\"" bash "${in_container[@]}" "$@"
}

torchrun_options() { # sets the array `torchrun`
    torchrun=(
        "$PYTHON" -m torch.distributed.run
        --nnodes "$step_nodes" --nproc_per_node "$NPROC_PER_NODE"
        --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
        # A port per job, below those that the kernel gives to clients: two jobs may share a node.
        --rdzv_endpoint "${nodes[0]}:${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}"
    )
}

# Run in the background, so that signals are heard meanwhile. Ask training to stop when SLURM announces the end, and end
# the step when the run has ended: torchrun would start again what stopped on purpose, on each node by itself.
run_and_wait() { # COMMAND...
    local process status=0 ended=0
    before=$(stat_of_run)
    "$@" &
    process=$!
    while kill -0 "$process" 2>/dev/null; do
        # A run that starts removes a file that it takes to be old, so it is written as long as it takes.
        if [ -n "$signalled" ] && [ ! -e "$OUTPUT_DIR/stop" ] && ! run_has_ended; then
            printf 'job %s\n' "$SLURM_JOB_ID" >"$OUTPUT_DIR/stop" || true
        fi
        if run_may_be_started_again; then ended=$((ended + 1)); fi
        if [ $ended = "${END_SECONDS:-30}" ]; then kill "$process"; fi
        sleep 1
    done
    wait "$process" || status=$?
    rm -f "$OUTPUT_DIR/stop" # one that was written while the run ended
    return "$status"
}

stat_of_run() { stat -c '%Y %i' "$OUTPUT_DIR/state.json" 2>/dev/null || true; }
state_of_run() { sed -n 's/.*"state": *"\([a-z]*\)".*/\1/p' "$OUTPUT_DIR/state.json" 2>/dev/null || true; }
step_of_run() { sed -n 's/.*"step": *\([0-9]*\).*/\1/p' "$OUTPUT_DIR/state.json" 2>/dev/null || true; }

run_has_started() { [ "$(stat_of_run)" != "$before" ]; } # it has written its state since `before`
run_has_ended() { run_has_started && [[ $(state_of_run) == @(stopped|failed|complete) ]]; }
run_may_be_started_again() { run_has_started && [[ $(state_of_run) == @(stopped|failed) ]]; } # by torchrun

on_signal() {
    signalled=yes
    say "SLURM announces the end (USR1): saving a checkpoint"
}

# --- before training --------------------------------------------------------------------------------------------------

check_nodes() {
    if [ "${CHECK_NODES:-1}" = 0 ]; then return; fi
    local before report status=0 bad number
    report=$(mktemp)
    torchrun_options
    # shellcheck disable=SC2016 # the inner shell expands these, on each node
    run_and_wait on_every_node bash -c '
        "$1" -m tools.check_node --gpus "$2" --output-dir "$3" || exit 1
        shift 3
        exec "$@"
    ' bash "$PYTHON" "$GPUS_PER_NODE" "$OUTPUT_DIR" \
        "${torchrun[@]}" --max-restarts 0 -m tools.check_node --all-reduce --gpus "$GPUS_PER_NODE" >"$report" || status=$?
    cat "$report"
    bad=$(sed -n 's/^bad node \([^: ]*\):.*/\1/p' "$report" | sort -u | paste -sd, -)
    rm -f "$report"
    if [ -n "$signalled" ]; then requeue "the time ended during the check of the nodes"; fi
    if [ "$status" = 0 ]; then return; fi
    if [ -z "$bad" ]; then fail 1 "the check of the nodes failed without naming one: see the lines above; CHECK_NODES=0 skips it"; fi
    number=$(tr , '\n' <<<"$bad" | wc -l)
    if [ "$number" -gt 1 ] && [ "$number" = "$step_nodes" ]; then
        fail 1 "all $number nodes fail the check, so that no node is the cause: see the lines above; CHECK_NODES=0 skips it"
    fi
    if [ "${REPLACE_BAD_NODES:-1}" = 0 ] || [ "$(count_requeues bad_nodes)" -gt "${MAX_BAD_NODES:-3}" ]; then
        fail 1 "bad nodes: $bad. Submit again with --exclude=$bad, and tell the cluster's administrators"
    fi
    requeue "bad nodes: $bad" "$bad"
}

# --- training ---------------------------------------------------------------------------------------------------------

train_until_done() { # MODULE ARGUMENTS...
    local before status=0
    before=$(stat_of_run)
    torchrun_options
    if [ -z "$signalled" ]; then
        run_and_wait on_every_node "${torchrun[@]}" --max-restarts "${MAX_RESTARTS:-3}" -m "$@" || status=$?
    fi
    if ! run_has_started; then
        if [ -n "$signalled" ]; then requeue "the time ended before the first step"; fi
        fail $EXIT_FIX "the run did not start (exit code $status): the reason is above; it is not tried again"
    fi
    case $(state_of_run) in
        complete)
            say "complete at step $(step_of_run)"
            exit 0
            ;;
        stopped)
            if [ -n "$signalled" ]; then requeue "stopped at step $(step_of_run)"; fi
            say "stopped at step $(step_of_run) on request; submit again to resume"
            exit $EXIT_STOPPED
            ;;
        failed)
            fail $EXIT_FIX "the run failed at step $(step_of_run): $(sed -n 's/.*"reason": *"\(.*\)".*/\1/p' "$OUTPUT_DIR/state.json")"
            ;;
        *)
            if [ "$(count_requeues crashes)" -gt "${MAX_CRASHES:-3}" ]; then
                fail 1 "the run crashed ${MAX_CRASHES:-3} times without a new checkpoint: given up (exit code $status)"
            fi
            requeue "the run crashed (exit code $status); its newest checkpoint is step $(step_of_run)"
            ;;
    esac
}

# Count how often the run was queued again for this reason since its newest checkpoint, this time included.
count_requeues() { # REASON
    local file=$OUTPUT_DIR/.requeued_$1 count=0 step now
    now=$(step_of_run)
    if read -r count step 2>/dev/null <"$file" && [ "$step" != "${now:-0}" ]; then count=0; fi
    printf '%d %d\n' $((count + 1)) "${now:-0}" >"$file"
    echo $((count + 1))
}

# Put this job into the queue again: the same job number, so that jobs that depend on it keep waiting.
requeue() { # REASON [NODES TO EXCLUDE]
    say "$1; queued again"
    trap '' TERM USR1 # SLURM ends this script as soon as the job is queued
    scontrol requeue "$SLURM_JOB_ID" || fail 1 "the job cannot be queued again: submit it again, it resumes"
    if [ -n "${2:-}" ]; then
        local excluded
        excluded=$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
        if [ "$excluded" = "(null)" ]; then excluded=; fi
        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${excluded:+$excluded,}$2" ||
            say "the bad nodes cannot be excluded: use scontrol update JobId=$SLURM_JOB_ID ExcNodeList=$2"
    fi
    exit $EXIT_STOPPED
}
