"""QLoRA of a 7B Llama on one device of 16 or 24 GB (arXiv:2305.14314): 4-bit weights, adapters on all linear maps.

    jaxlm plan configs/llama_7b_qlora.py --topology v5e:1x1
    jaxlm train configs/llama_7b_qlora.py --out runs/qlora --init_from hf://org/llama-7b --data.train jsonl:train.jsonl
"""

from jaxlm.nn import preset
from jaxlm.training import DataConfig, Experiment, LoraConfig, OptimConfig, TrainConfig

config = Experiment(
    model=preset("7b", dtype="bfloat16", remat="full"),
    init_from="llama-7b",
    data=DataConfig(train="jsonl:train.jsonl", seq_len=1024, batch_size=16),
    optim=OptimConfig(lr=2e-4, schedule="constant", warmup_steps=50, weight_decay=0.0, clip_norm=0.3),
    train=TrainConfig(steps=2000, accumulate=16, eval_every=200, checkpoint_every=200),
    lora=LoraConfig(rank=16, alpha=32.0, base="nf4"),
)
