"""Measurements, comparisons and plans; and the command that publishes a run.

    python -m tools.bench       how fast this machine trains, samples and starts
    python -m tools.scaling     what a GPT needs in memory, FLOPs and time, on paper
    python -m tools.compare     runs side by side: a table, and their curves in one picture
    python -m tools.figures     what README.md and EXPERIMENTS.md claim, measured again: does it hold?
    python -m tools.ladder      the lecture's models, from bigram to GPT, beside the lecture's losses
    python -m tools.alignments  does cross-attention look at the right word?
    python -m tools.publish     a finished run's model, for other programs
    python -m tools.versus      two recipes, seed by seed: which is better, and how sure that is
    sbatch tools/slurm.sh ...   a run on the nodes of a cluster, requeued until it has finished
"""

import shlex

from configurator import UserError


def shell_words(line):
    """The words of a command line. Raises UserError for a quote that is not closed."""
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UserError(f"{line!r} is not a command line: {str(error).lower()}") from None
