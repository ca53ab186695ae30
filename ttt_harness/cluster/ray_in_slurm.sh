#!/usr/bin/env bash
# One run on several nodes of a SLURM cluster: starts Ray on each node of the job, runs the command on the first one,
# and ends both. data_parallel_size is the number of all GPUs:
#
#     sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 --time=2:00:00 "$(ttt-harness ray-in-slurm)" \
#         lm_eval --model ttt_vllm --model_args pretrained=...,data_parallel_size=32 --tasks bbh_ttt
#
# `ray symmetric-run` would end all Ray processes of the user's on these nodes, those of other jobs as well.
#SBATCH --ntasks-per-node=1
set -euo pipefail

# Only who knows the token may use the cluster; without one, everybody who reaches the node could.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(</proc/sys/kernel/random/uuid)
export RAY_USAGE_STATS_ENABLED=0
host=$(python -c 'from ray.util import get_node_ip_address as address; print(address())')
port=$((20000 + SLURM_JOB_ID % 10000))

srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" bash -c '
    if ((SLURM_NODEID)); then how=(--address="$0:$1"); else how=(--head --port="$1" --include-dashboard=false); fi
    exec ray start --block --num-cpus="$SLURM_CPUS_ON_NODE" "${how[@]}"' "$host" "$port" >&2 &
step=$!
trap 'kill "$step" 2>/dev/null || true; wait' EXIT

export RAY_ADDRESS=$host:$port
nodes() {
    python -c 'import ray; ray.init(log_to_driver=False); print(sum(n["Alive"] for n in ray.nodes()))' 2>/dev/null
}
until [[ $(nodes) == "$SLURM_JOB_NUM_NODES" ]]; do
    kill -0 "$step" 2>/dev/null || { echo "error: Ray could not be started on all nodes, see above" >&2; exit 1; }
    sleep 1
done

"$@"
