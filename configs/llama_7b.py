"""Llama 2 7B, in its shapes and its batch of 4 M tokens (arXiv:2307.09288, section 2), on 256 TPU v5e chips.

    jaxlm plan configs/llama_7b.py --topology v5e:16x16
    jaxlm train configs/llama_7b.py --out runs/llama_7b --data.train text:train.txt.xz --data.tokenizer llama-7b
"""

from jaxlm.nn import preset
from jaxlm.training import DataConfig, Experiment, MeshConfig, OptimConfig, TrainConfig

config = Experiment(
    model=preset("7b"),
    data=DataConfig(train="text:train.txt.xz", tokenizer="llama-7b", seq_len=4096, batch_size=1024),
    optim=OptimConfig(lr=3e-4, warmup_steps=2000, min_lr_ratio=0.1, eps=1e-5),
    train=TrainConfig(steps=500_000, eval_every=5000, checkpoint_every=1000),
    mesh=MeshConfig(preset="fsdp"),
)
