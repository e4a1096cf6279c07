"""Llama 2 70B, in its shapes and its batch of 4 M tokens (arXiv:2307.09288, section 2), on a TPU v5p-512 (256 chips).

    jaxlm plan configs/llama_70b.py --topology v5p:4x8x8
    jaxlm plan configs/llama_70b.py --topology v5e:2x4 --serve --mesh.preset ddp --mesh.tensor 8 --recipe w8a8-dynamic
"""

from jaxlm.nn import preset
from jaxlm.training import DataConfig, Experiment, MeshConfig, OptimConfig, TrainConfig

config = Experiment(
    model=preset("70b"),
    data=DataConfig(train="text:train.txt.xz", tokenizer="llama-70b", seq_len=4096, batch_size=1024),
    optim=OptimConfig(lr=1.5e-4, warmup_steps=2000, min_lr_ratio=0.1, eps=1e-5),
    train=TrainConfig(steps=500_000, eval_every=5000, checkpoint_every=1000),
    mesh=MeshConfig(preset="fsdp"),
)
