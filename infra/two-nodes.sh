#!/usr/bin/env bash
# Runs one command on a cluster of two nodes on this machine: a Ray head and a worker node, each with its own
# processes, connected over TCP with token authentication, as on real machines.
#
#   infra/two-nodes.sh palindrome encode --images photos/ --model checkpoints/cifar10-32 --out runs/photos
#
# The command finds the cluster by $RAY_ADDRESS, and its exit code is this script's. Ctrl-C and SIGTERM are forwarded
# to the command only. Only these two nodes are stopped: `ray stop` would stop other clusters on this machine too.
#
# CPUS=4 sets the number of CPUs of each node (default: half of this machine's).
set -uo pipefail

if [ $# = 0 ]; then
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"
    exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -d "$root/.venv/bin" ] && PATH="$root/.venv/bin:$PATH"
cores=$(nproc)
cpus=${CPUS:-$((cores > 1 ? cores / 2 : 1))}
# A short path: Ray's sockets are below its folder, and the path of a socket has at most 107 bytes.
folder=$(mktemp -d /tmp/ray.XXXXXX)

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
port=$(free_port)
export RAY_ADDRESS="127.0.0.1:$port" RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

set -m # every process below gets its own process group, which Ctrl-C in the terminal does not reach
nodes=() run=
# shellcheck disable=SC2329 # the trap calls it
stop() {
    trap '' INT TERM
    for node in "${nodes[@]}"; do
        kill -0 "$node" 2>/dev/null || tail -n 20 "$folder/nodes.log" >&2 # it has exited by itself: print why
        kill -TERM "$node" 2>/dev/null # which stops the processes of its node
    done
    gone "${nodes[@]}"
    for node in "${nodes[@]}"; do
        kill -KILL -- "-$node" 2>/dev/null
        gone "-$node"
    done
    rm -rf "$folder"
}
gone() { # waits at most 10 seconds for a process, or a -group, to exit
    for _ in $(seq 100); do
        kill -0 -- "$@" 2>/dev/null || return
        sleep 0.1
    done
}
trap stop EXIT
# shellcheck disable=SC2329 # the traps call it
pass() {
    [ -n "$run" ] || exit "$2"
    kill "-$1" -- "-$run" 2>/dev/null
}
trap 'pass INT 130' INT
trap 'pass TERM 143' TERM

node() {
    # It need not drain when it is stopped, as no work is left. Its workers stay in its process group, to be stopped.
    RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 RAY_process_group_cleanup_enabled=0 \
        ray start --block --num-cpus="$cpus" --temp-dir="$folder" "$@" \
        >>"$folder/nodes.log" 2>&1 &
    nodes+=($!)
    disown $! # or bash would report its exit
}
node --head --node-ip-address=127.0.0.1 --port="$port" --ray-client-server-port="$(free_port)" \
    --include-dashboard=false
node --address="$RAY_ADDRESS" --node-ip-address=127.0.0.2 --num-gpus=0 # the head has the GPUs

python -m palindrome.infra.wait --nodes 2 --timeout 120 -- "$@" &
run=$!
code=0
while true; do # a forwarded signal ends `wait` before the command has ended
    wait "$run"
    code=$?
    kill -0 "$run" 2>/dev/null || break
done
exit "$code"
