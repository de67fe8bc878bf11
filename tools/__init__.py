"""Measurements and plans.

    python -m tools.bench       how fast this machine trains, samples and starts
    python -m tools.scaling     what a GPT needs in memory, FLOPs and time, on paper
    sbatch tools/slurm.sh ...   a run on the nodes of a cluster, queued again until it has finished
"""
