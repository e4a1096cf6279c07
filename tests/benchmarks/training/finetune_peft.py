"""Fine-tuning by jaxlm, and by PEFT and torch on the same batches: validation losses and peak memory.

    python tests/benchmarks/training/finetune_peft.py MODEL TEXT [--steps 60]

torch, transformers and peft are needed. A Llama is trained on the first nine tenths of a text: all parameters (full),
adapters of rank 8 on all linear maps (lora), and the same adapters over 4-bit weights (qlora); PEFT trains the same
adapters, from the same start and with the same AdamW. The last tenth of the text is for validation. Every training is a
process of its own; memory is its peak less the resident set before it loaded the model.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

LENGTH, ROWS, RANK, ALPHA = 128, 8, 8, 16.0
RATES = {"full": 2e-4, "lora": 2e-3, "qlora": 2e-3, "peft": 2e-3}
WARMUP, VALID_BATCHES = 5, 16


def memory(field: str) -> int:
    """A figure of /proc/self/status for this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def experiment(name: str, args):
    from jaxlm.training.config import DataConfig, Experiment, LoraConfig, OptimConfig, TrainConfig

    return Experiment(
        init_from=args.model,
        data=DataConfig(train=f"text:{args.text}[:90%]", valid=f"text:{args.text}[90%:]", seq_len=LENGTH,
                        batch_size=ROWS),
        optim=OptimConfig(lr=RATES[name], schedule="constant", warmup_steps=WARMUP, weight_decay=0.0, b2=0.999,
                          clip_norm=0.0),
        train=TrainConfig(steps=args.steps, eval_every=0),
        lora=LoraConfig(rank=0 if name == "full" else RANK, alpha=ALPHA, base="nf4" if name == "qlora" else "float32"),
    )


def ours(name: str, args) -> dict[str, float]:
    import itertools

    import jax

    from jaxlm.core.host_memory import keep_freed_memory
    from jaxlm.core.tree import flatten
    from jaxlm.training.objectives.loss import make_loss
    from jaxlm.training.partition import Partition
    from jaxlm.training.program import make_program
    from jaxlm.training.setup import prepare
    from jaxlm.training.state import init_state
    from jaxlm.training.step import make_eval

    keep_freed_memory()
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    before = memory("VmRSS")
    setup = prepare(experiment(name, args), Path(args.scratch) / name)
    with jax.set_mesh(setup.mesh):
        program = make_program(setup.config, setup.graphdef, setup.like, setup.mesh)
        layout = jax.tree.map(lambda leaf: leaf.sharding, program.state)
        state = init_state(setup.initial, program.tx, 0, layout)
        if name == "lora":
            _save_start(setup, args)
        batches = setup.loader.iterate()
        for _ in range(args.steps):
            state, metrics = program.update(state, next(batches))
        batches.close()
        score = make_eval(setup.graphdef, setup.like, make_loss(setup.config.model))
        flat = Partition(flatten(setup.like)).join(state.params, state.frozen)
        sums = [jax.device_get(score(flat, batch))
                for batch in itertools.islice(setup.valid_loader.iterate(), VALID_BATCHES)]
    return {"loss": _mean(sums), "peak": memory("VmHWM") - before,
            "trained": sum(leaf.size for leaf in state.params.values())}


def _save_start(setup, args) -> None:
    """The adapter before the first step, and the batches, for PEFT."""
    import itertools

    from jaxlm.hf.peft.adapters import save_adapter

    start = Path(args.scratch) / "start"
    save_adapter(start, setup.config.model, setup.initial, base=args.model)
    np.savez(
        Path(args.scratch) / "batches.npz",
        **{f"train_{i}_{name}": x for i, each in zip(range(args.steps), setup.loader.iterate(), strict=False)
           for name, x in each.items()},
        **{f"valid_{i}_{name}": x
           for i, each in enumerate(itertools.islice(setup.valid_loader.iterate(), VALID_BATCHES))
           for name, x in each.items()},
    )


def theirs(args) -> dict[str, float]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    before = memory("VmRSS")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, Path(args.scratch) / "start", is_trainable=True)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    batches = np.load(Path(args.scratch) / "batches.npz")

    def nll(kind: str, i: int):
        part = {name: torch.from_numpy(batches[f"{kind}_{i}_{name}"]) for name in ("inputs", "targets", "weights")}
        logits = model(part["inputs"].long()).logits
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), part["targets"].long(), reduction="none")
        return (each * part["weights"]).sum(), part["weights"].sum()

    model.train()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = RATES["peft"] * min(1.0, (step + 1) / (WARMUP + 1))
        total, weight = nll("train", step)
        (total / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        sums = [dict(zip(("nll", "weight"), map(float, nll("valid", i)), strict=True)) for i in range(VALID_BATCHES)]
    return {"loss": _mean(sums), "peak": memory("VmHWM") - before, "trained": sum(each.numel() for each in trained)}


def _mean(sums) -> float:
    return float(sum(float(each["nll"]) for each in sums) / sum(float(each["weight"]) for each in sums))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", choices=tuple(RATES), help=argparse.SUPPRESS)  # of a process of its own
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(theirs(args) if args.only == "peft" else ours(args.only, args)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name in RATES:  # lora before peft, which starts from its files
            command = [sys.executable, __file__, args.model, args.text, "--steps", str(args.steps), "--only", name]
            done = subprocess.run([*command, "--scratch", scratch], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            row = json.loads(done.stdout.splitlines()[-1])
            print(f"{name:6} validation loss {row['loss']:.4f}, perplexity {math.exp(row['loss']):8.2f}; trained "
                  f"{row['trained']:>10,}; peak memory {row['peak'] / 2**20:6.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
