"""The memory that ``jaxlm plan`` forecasts for eight CPU devices, against the memory that the training step takes.

    python tests/benchmarks/planning/plan_memory.py [--layers 4 --width 512 --remat full ...]

The forecast is for all eight devices together. The measured value is the largest resident set while three steps run,
less the resident set before the state was made. Arrays are mapped one by one (MALLOC_MMAP_THRESHOLD_), so that they do
not reuse memory that the compiler has freed. It runs on Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import sys
from pathlib import Path

_SET = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}


def resident(field: str) -> int:
    """VmRSS or VmHWM (the largest so far), bytes."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--fsdp", type=int, default=8)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--remat", default="none")
    args = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in _SET.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | _SET)

    import jax
    import jax.numpy as jnp

    from jaxlm import nn
    from jaxlm.planning.forecasting import forecast
    from jaxlm.planning.programs import forecast_programs
    from jaxlm.planning.topology import parse_topology
    from jaxlm.training.config import DataConfig, Experiment, MeshConfig, OptimConfig, TrainConfig
    from jaxlm.training.program import make_program
    from jaxlm.training.state import init_state
    from jaxlm.training.step import Step

    model = nn.DecoderConfig(
        width=args.width, heads=8, layers=args.layers, vocab_size=8192, tie_embeddings=False, remat=args.remat
    )
    config = Experiment(
        model=model, data=DataConfig(seq_len=args.length, batch_size=args.batch), optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(accumulate=args.accumulate), mesh=MeshConfig(-1, args.fsdp, args.tensor),
    )
    topology = parse_topology("cpu:8")
    (program,) = forecast_programs(config, topology)
    said = forecast(program, config, topology).memory
    graphdef, like = nn.abstract(model)
    init = nn.initializer(model)[1]
    with jax.set_mesh(program.mesh):
        parts = make_program(config, graphdef, like, program.mesh)
        step = Step(program.lower().compile())
        trim = ctypes.CDLL(None).malloc_trim
        trim(0)
        before = resident("VmRSS")
        layout = jax.tree.map(lambda leaf: leaf.sharding, parts.state)
        state = init_state(lambda: init(jax.random.key(0)), parts.tx, 0, layout)
        batch = {
            name: jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding)
            for name, x in program.arguments[1].items()
        }
        jax.block_until_ready((state, batch))
        trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        for _ in range(3):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
    taken, forecasted = resident("VmHWM") - before, 8 * said.peak
    print(f"forecast {forecasted / 2**20:.1f} MiB, taken {taken / 2**20:.1f} MiB: {forecasted / taken - 1:+.1%}")


if __name__ == "__main__":
    main()
