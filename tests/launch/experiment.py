"""What the launchers' tests train: a tiny translator on built-in data. ``train.steps`` may grow from start to start."""

from __future__ import annotations

from jaxlm import nn
from jaxlm.training.config import DataConfig, Experiment, OptimConfig, TrainConfig

config = Experiment(
    model=nn.Seq2SeqConfig(width=16, heads=2, ffn=32, encoder_layers=1, decoder_layers=1),
    data=DataConfig(
        train="builtin:phrasebook:train[:300]", tokenizer_kind="char", batch_tokens=2048, buckets=(128,), seed=3
    ),
    optim=OptimConfig(lr=1e-2, schedule="constant", warmup_steps=5),
    train=TrainConfig(steps=8, log_every=1, checkpoint_every=0, keep_best=0),
)
