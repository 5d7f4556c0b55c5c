# vLLM servers beside a run of reinforcement learning, on the last nodes of its job. Sourced by rl.sbatch after common.sh.
#
#   split_nodes     the first nodes train, the last SERVER_NODES serve
#   start_servers   start the servers, wait until all answer, and set `served` to the key of their addresses
#
# They stop with the job. Their output is in OUTPUT_DIR/servers.
# shellcheck disable=SC2034,SC2154 # variables of common.sh and of rl.sbatch

served=() # the key with their addresses, for the run

split_nodes() {
    if [[ ! $SERVER_NODES =~ ^[0-9]+$ ]] || [ "$SERVER_NODES" -ge "$SLURM_JOB_NUM_NODES" ]; then
        fail "$EXIT_FIX" "SERVER_NODES=$SERVER_NODES: the job has $SLURM_JOB_NUM_NODES nodes, and at least one must train"
    fi
    step_nodes=$((SLURM_JOB_NUM_NODES - SERVER_NODES))
    if [ "$SERVER_NODES" = 0 ]; then return; fi
    require SERVER_MODEL
    if [[ ! $SERVERS_PER_NODE =~ ^[1-9][0-9]*$ ]] || [ $((GPUS_PER_NODE % SERVERS_PER_NODE)) != 0 ]; then
        fail "$EXIT_FIX" "SERVERS_PER_NODE=$SERVERS_PER_NODE must divide the $GPUS_PER_NODE GPUs of a node"
    fi
    if [ -n "${CONTAINER_IMAGE:-}" ]; then
        require SERVER_IMAGE
        SERVER_PYTHON=${SERVER_PYTHON:-python3}
    else
        SERVER_PYTHON=${SERVER_PYTHON:-$REPO/.venv-engines/bin/python}
        command -v "$SERVER_PYTHON" >/dev/null || fail "$EXIT_FIX" "SERVER_PYTHON=$SERVER_PYTHON is not there: give the Python of an environment with vLLM"
        [ -e "$SERVER_MODEL/config.json" ] || fail "$EXIT_FIX" "SERVER_MODEL=$SERVER_MODEL is no Hugging Face folder: it has no config.json"
    fi
}

start_servers() {
    if [ "$SERVER_NODES" = 0 ] || [ -n "$signalled" ]; then return; fi
    local first=$step_nodes logs=$OUTPUT_DIR/servers places=() addresses=() process host number started=$SECONDS
    local ready=$logs/.ready-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    mkdir -p "$logs"
    (
        first_node=$first step_nodes=$SERVER_NODES CONTAINER_IMAGE=${SERVER_IMAGE:-}
        # shellcheck disable=SC2086 # SERVER_OPTIONS are words
        on_every_node bash "$REPO/slurm/serve.sh" "$SERVER_PYTHON" "$SERVER_MODEL" "$SERVER_PORT" "$SERVERS_PER_NODE" \
            "$GPUS_PER_NODE" "$ready" "$logs" $SERVER_OPTIONS
    ) &
    process=$!
    # shellcheck disable=SC2064 # the number of now
    trap "stop_servers $process" EXIT
    for host in "${nodes[@]:first}"; do
        for ((number = 0; number < SERVERS_PER_NODE; number++)); do
            places+=("$host $((SERVER_PORT + number))")
            addresses+=("http://$host:$((SERVER_PORT + number))")
        done
    done
    say "starting ${#places[@]} servers"
    until all_answer "${places[@]}"; do
        if [ -n "$signalled" ]; then requeue "the time ended while the servers started"; fi
        kill -0 "$process" 2>/dev/null || fail "$EXIT_FIX" "a server did not start: the reason is above, and in $logs"
        if [ $((SECONDS - started)) -gt "$SERVER_SECONDS" ]; then
            fail "$EXIT_FIX" "a server does not answer after SERVER_SECONDS=$SERVER_SECONDS: see $logs"
        fi
        sleep 1
    done
    touch "$ready"
    say "${#places[@]} servers answer after $((SECONDS - started)) s"
    served=("rollout.addresses=[$(IFS=, && echo "${addresses[*]}")]")
}

stop_servers() { # PROCESS: with the job; SLURM kills what does not stop
    local waited
    kill "$1" 2>/dev/null || return 0
    for ((waited = 0; waited < 20; waited++)); do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 1
    done
}

all_answer() { # "HOST PORT"...
    local place
    for place in "$@"; do
        # shellcheck disable=SC2086 # two words
        answers $place || return 1
    done
}

answers() ( # HOST PORT: whether /health answers with 200
    exec 2>/dev/null
    exec 3<>"/dev/tcp/$1/$2" || exit 1
    printf 'GET /health HTTP/1.0\r\nHost: %s\r\n\r\n' "$1" >&3
    IFS= read -r -t 10 line <&3 && [[ $line = *' 200 '* ]]
)
