"""A mixture of 8 experts in the shapes of Mixtral 8x7B (arXiv:2401.04088), on 256 TPU v5p chips.

    jaxlm plan configs/mixtral_8x7b.py --topology v5p:4x8x8
"""

from jaxlm.nn import preset
from jaxlm.training import DataConfig, Experiment, MeshConfig, OptimConfig, TrainConfig

config = Experiment(
    model=preset("8x7b", expert_routing="capacity"),  # fixed shapes: the same number of rows for each expert
    data=DataConfig(train="text:train.txt.xz", tokenizer="mixtral-8x7b", seq_len=4096, batch_size=1024),
    optim=OptimConfig(lr=3e-4, warmup_steps=2000, min_lr_ratio=0.1),
    train=TrainConfig(steps=500_000, eval_every=5000, checkpoint_every=1000),
    mesh=MeshConfig(preset="moe"),
)
