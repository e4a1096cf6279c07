"""A small Llama on English classics: 6 layers, width 256, 4,096 byte-level BPE tokens, 13.4 M tokens of training.

    jaxlm train configs/books.py --out runs/books --data.train text:train.txt.xz \\
        --data.valid tokens:valid_tokens.npy --data.tokenizer books-llama
"""

from jaxlm.nn import DecoderConfig
from jaxlm.training import DataConfig, Experiment, OptimConfig, TrainConfig

config = Experiment(
    model=DecoderConfig(
        width=256, heads=8, kv_heads=4, ffn=704, layers=6, max_positions=512, scan_layers=False,
    ),
    data=DataConfig(
        train="text:train.txt.xz", valid="tokens:valid_tokens.npy", tokenizer="books-llama", seq_len=256, batch_size=16
    ),
    optim=OptimConfig(lr=2e-3, schedule="linear", warmup_steps=200),
    train=TrainConfig(steps=3277, eval_every=500, checkpoint_every=500),
)
