#!/usr/bin/env bash
# Trains on all nodes of a SLURM job, and requeues the job until the run has finished:
#
#     sbatch --nodes=2 --gpus-per-node=8 --time=4:00:00 tools/slurm.sh out/gpt2 config/gpt2.py
#
# The first argument is the out directory, the others are train.py's. Submit it in this repository's folder, which all
# nodes must share, after preparing the data set. Five minutes before the job's time is up, the run saves and ends; the
# requeued job resumes it.
#SBATCH --job-name=quill
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
out_dir=${1:?usage: sbatch [options] tools/slurm.sh OUT_DIR [arguments of train.py]}
shift
if [ -d .venv ]; then source .venv/bin/activate; fi
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export FIRST_NODE=${nodes%%$'\n'*}
minutes=$(((SLURM_JOB_END_TIME - $(date +%s)) / 60 - 5))

# On each node, torchrun starts a worker per GPU. The first node's torchrun hosts the store through which all connect.
srun --kill-on-bad-exit=1 bash -c 'exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node=gpu \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$FIRST_NODE:29500" \
    --rdzv_conf="is_host=$([ "$SLURM_NODEID" = 0 ] && echo 1 || echo 0)" --local_addr="$SLURMD_NODENAME" "$@"' \
    torchrun train.py --resume=auto --out_dir="$out_dir" --max_minutes="$minutes" "$@" || failed=$?

# torchrun returns 1 for every failure. The run's own exit status is in run.json: 75 if it is to be continued.
status=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["starts"][-1].get("status", "none"))' \
    "$out_dir/run.json")
if [ "$status" = 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
else
    exit "${failed:-0}"
fi
