"""Loading a Llama checkpoint of 2 GB by jaxlm and by transformers, on this machine, in turn.

    python tests/benchmarks/inference/load_checkpoint.py [--stored bfloat16] [--rounds 5] [--keep DIR]

transformers is needed. Parameters are loaded as float32. Each load is a process of its own, without the time of
imports, with the file in the page cache. Rounds alternate, so that the ratio holds while the machine's speed drifts.
"used" is the time after every parameter has been summed once: where the file is float32 too, the parameters of
transformers are views of it, and it is read only then. Memory is the largest resident set while loading, less the
resident set before; it includes the mapped pages of the file. For jaxlm there is also a load that is sharded over
eight simulated devices.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

FIELDS = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 5504, "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}
LAYERS = {"float32": 8, "bfloat16": 18}  # for files of 2.1 GB
LOADERS = ("jaxlm", "transformers", "sharded")


def make(directory: Path, stored: str) -> tuple[int, int]:
    """Writes the checkpoint; returns the numbers in all tensors and in the largest."""
    import ml_dtypes
    from safetensors.numpy import save_file

    dtype = np.dtype({"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[stored])
    fields = FIELDS | {"num_hidden_layers": LAYERS[stored], "dtype": stored}
    width, ffn, vocab = FIELDS["hidden_size"], FIELDS["intermediate_size"], FIELDS["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    shapes["model.norm.weight"] = (width,)
    for layer in range(LAYERS[stored]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (ffn, width) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (width, ffn)}
        shapes |= {f"{at}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    sizes = [tensor.size for tensor in tensors.values()]
    return sum(sizes), max(sizes)


def memory(field: str) -> int:
    """A figure of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def load(loader: str, directory: str) -> dict[str, float]:
    """Seconds and bytes of one load, in this process."""
    if loader == "transformers":
        import torch
        from transformers import LlamaForCausalLM

        def begin():
            return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).requires_grad_(False)

        def use(model):
            return sum(float(each.sum()) for each in model.parameters())

        torch.zeros(1).sum()
    else:
        import jax

        import jaxlm
        from jaxlm.core.sharding import make_mesh

        mesh = make_mesh(data=1, fsdp=8) if loader == "sharded" else None

        def begin():
            return jax.block_until_ready(jaxlm.load(directory, mesh=mesh).params)

        def use(params):
            return sum(float(each.sum()) for each in jax.tree.leaves(params))

        jax.numpy.zeros(1).sum().block_until_ready()
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set is that from now on
    before, start, work = memory("VmRSS"), time.perf_counter(), time.process_time()
    loaded = begin()
    result = {"loaded": time.perf_counter() - start, "peak": memory("VmHWM") - before}
    use(loaded)
    return result | {"used": time.perf_counter() - start, "cpu": time.process_time() - work}


def child(loader: str, directory: Path) -> dict[str, float]:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8" * (loader == "sharded")
    result = subprocess.run(
        [sys.executable, __file__, "--child", loader, "--keep", str(directory)], capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stored", choices=LAYERS, default="float32", help="the type of the tensors in the file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", metavar="DIR", help="write the checkpoint there, and leave it there")
    parser.add_argument("--child", choices=LOADERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(load(args.child, args.keep)))
        return
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(args.keep or directory)
        total, largest = (4 * size for size in make(directory, args.stored))
        print(f"{total / 1e9:.2f} GB of float32 parameters from a file of {args.stored}, "
              f"the largest tensor {largest / 1e9:.2f} GB")
        results: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
        for _ in range(args.rounds):
            for name in LOADERS:
                results[name].append(child(name, directory))
    for name, each in results.items():
        loaded, used, cpu, peak = (
            statistics.median(one[key] for one in each) for key in ("loaded", "used", "cpu", "peak")
        )
        beyond = (peak - total) / largest
        print(f"{name:12} loaded in {loaded:6.2f} s, used in {used:6.2f} s ({cpu:5.2f} s of processor time); peak "
              f"{peak / 1e9:5.2f} GB, {beyond:+.2f} of the largest tensor beyond the parameters")
    for key in ("loaded", "used", "cpu"):
        pairs = zip(results["jaxlm"], results["transformers"], strict=True)
        ratios = [ours[key] / theirs[key] for ours, theirs in pairs]
        print(f"{key}: jaxlm / transformers, median of {len(ratios)} rounds {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
