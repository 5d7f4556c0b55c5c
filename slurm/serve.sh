# Serves rollouts on one node: vLLM servers, each on its share of the node's GPUs. slurm/servers.sh runs it once per node.
#
#   bash serve.sh PYTHON MODEL PORT SERVERS GPUS READY LOGS [OPTIONS OF VLLM...]
#
# A server that ends is started again: the run gives it the next weights. One that ends MOST_ENDS times in a
# row within ENDS_SECONDS of its start is not started again; the others of this node and of other nodes continue. One that ends before the file
# READY exists has never answered: then this script ends, too.
set -u

MOST_ENDS=5
ENDS_SECONDS=600

python=$1 model=$2 port=$3 servers=$4 gpus=$5 ready=$6 logs=$7
shift 7
host=${SLURMD_NODENAME:-$(hostname)}
share=$((gpus / servers)) # GPUs of each server
IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"

# What the run asks of a server: docs/rl.md. The address is the node's own, because who reaches it can change what it serves.
export VLLM_SERVER_DEV_MODE=1 PYTHONPATH=$PWD HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
if [[ $python = */* ]]; then PATH=$(dirname "$(realpath -s "$python")"):$PATH; fi

serve() { # NUMBER OPTIONS...
    local number=$1 log=$logs/$host-$1.log own=() ends=0 started status
    shift
    if [ "$share" -gt 0 ]; then
        CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${devices[*]:number * share:share}")
        export CUDA_VISIBLE_DEVICES
        own+=(--tensor-parallel-size "$share")
    fi
    if [ "$share" -gt 1 ]; then own+=(--mm-encoder-tp-mode data); fi # 8 do not divide the 12 heads of the vision encoder
    while true; do
        status=0 started=$SECONDS
        "$python" -m vllm.entrypoints.openai.api_server --model "$model" --host "$host" --port $((port + number)) \
            --enable-scale-out --worker-extension-cls rl.engines.vllm_worker.PolicyWorker \
            --generation-config vllm --logprobs-mode processed_logprobs "${own[@]}" "$@" >>"$log" 2>&1 </dev/null || status=$?
        if [ ! -e "$ready" ]; then
            printf 'error: the server on %s ended with exit code %d before it answered: see %s\n' "$host" "$status" "$log" >&2
            return 1
        fi
        if [ $((SECONDS - started)) -gt $ENDS_SECONDS ]; then ends=0; fi
        ends=$((ends + 1))
        if [ $ends = $MOST_ENDS ]; then
            printf 'error: server %d on %s ended %d times in a row within %d s of its start, at last with exit code %d (%s), and is not started again: see %s\n' \
                "$number" "$host" $ends $ENDS_SECONDS "$status" "$(last_error "$log")" "$log" >&2
            exec sleep infinity # a task that ends would end the servers of other nodes
        fi
        printf 'server %d on %s ended with exit code %d and is started again\n' "$number" "$host" "$status" | tee -a "$log" >&2
        sleep 5
    done
}

last_error() { # LOG: its last line that is an error, or its last line but this script's own
    grep -v ' and is started again$' "$1" | awk '/Error|error:/ { error = $0 } NF { last = $0 } END { print error ? error : last }' | cut -c -300
}

trap 'trap - TERM; kill 0' TERM # all servers of the node
for ((number = 0; number < servers; number++)); do serve "$number" "$@" & done
wait -n # for one that has never answered
kill 0
