"""Trains the experiment that a Python file defines as `config`, and writes a run directory.

    jaxlm train configs/shakespeare.py --out runs/shakespeare --data.train text:input.txt --optim.lr 3e-4

If the directory has a checkpoint, training resumes from it. Any field of the experiment can be set by its dotted path.

Several processes train together if the environment names them: under the scripts of launch/, in a SLURM step, on the
workers of a TPU slice. SIGTERM saves a checkpoint and ends with the exit status in JAXLM_STOPPED_STATUS (0), by which a
scheduler can tell a training to resume from a finished one.
"""

from __future__ import annotations

import argparse
import os
import sys

from jaxlm.cli.arguments import load_experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "jaxlm train CONFIG.py --out RUN [--a.b VALUE ...]"
    parser.add_argument("config", metavar="CONFIG.py", help="a Python file with config = Experiment(...)")
    parser.add_argument("--out", metavar="RUN", required=True, help="the run directory: checkpoints, metrics, model")
    parser.set_defaults(overrides="")


def run(args: argparse.Namespace) -> None:
    config = load_experiment(args.config, args.overrides)
    from jaxlm.training.loop import train
    from jaxlm.training.multihost.distributed import distributed_runtime

    try:
        with distributed_runtime():
            train(config, args.out)
    except SystemExit as stopped:  # by SIGTERM: a checkpoint is saved
        sys.exit(int(os.environ.get("JAXLM_STOPPED_STATUS") or stopped.code))
