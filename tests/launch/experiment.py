"""The experiment of the launchers' tests: a tiny translator on built-in data. Tests resume it with more steps."""

from __future__ import annotations

from jaxlm.nn import Seq2SeqConfig
from jaxlm.training import DataConfig, Experiment, OptimConfig, TrainConfig

config = Experiment(
    model=Seq2SeqConfig(width=16, heads=2, ffn=32, encoder_layers=1, decoder_layers=1),
    data=DataConfig(
        train="builtin:phrasebook:train[:300]", tokenizer_kind="char", batch_tokens=2048, buckets=(128,), seed=3
    ),
    optim=OptimConfig(lr=1e-2, schedule="constant", warmup_steps=5),
    train=TrainConfig(steps=8, log_every=1, checkpoint_every=0, keep_best=0),
)
