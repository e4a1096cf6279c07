"""Character-level Shakespeare: nanoGPT's CPU configuration (4 layers, width 128, block 64, batch 12, 2,000 steps).

    jaxlm train configs/shakespeare.py --out runs/shakespeare \\
        --data.train 'text:input.txt[:90%]' --data.valid 'text:input.txt[90%:]'
"""

from jaxlm.nn import preset
from jaxlm.training import DataConfig, Experiment, OptimConfig, TrainConfig

config = Experiment(
    model=preset("nano"),
    data=DataConfig(
        train="text:input.txt[:90%]", valid="text:input.txt[90%:]", tokenizer_kind="char", seq_len=64, batch_size=12
    ),
    optim=OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=100, min_lr_ratio=0.1, b2=0.99, weight_decay=0.1),
    train=TrainConfig(steps=2000, log_every=100, eval_every=500, checkpoint_every=500),
)
