"""Trains the experiment that a Python file defines as `config`, into a run directory.

    jaxlm train configs/shakespeare.py --out runs/shakespeare --data.train text:input.txt --optim.lr 3e-4

Where the directory holds a checkpoint, training goes on from there. Any field of the experiment can be set by its
dotted path.

Several processes train together where the environment says that there are several: under the scripts of launch/, in a
SLURM step, on the workers of a TPU slice. SIGTERM saves a checkpoint; the exit status is then that which
JAXLM_STOPPED_STATUS names (0), by which a scheduler can tell a training to go on with from one that is done.
"""

from __future__ import annotations

import os
import sys

from jaxlm.cli.arguments import load_experiment


def add_arguments(parser) -> None:
    parser.usage = "jaxlm train CONFIG.py --out RUN [--a.b VALUE ...]"
    parser.add_argument("config", metavar="CONFIG.py", help="a Python file that says config = Experiment(...)")
    parser.add_argument("--out", metavar="RUN", required=True, help="the run directory: checkpoints, metrics, model")
    parser.set_defaults(overrides="")


def run(args) -> None:
    config = load_experiment(args.config, args.overrides)
    from jaxlm.training.loop import train
    from jaxlm.training.multihost.distributed import distributed_runtime

    try:
        with distributed_runtime():
            train(config, args.out)
    except SystemExit as stopped:  # by SIGTERM: saved, not finished
        sys.exit(int(os.environ.get("JAXLM_STOPPED_STATUS") or stopped.code))
