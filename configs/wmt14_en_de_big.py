"""WMT14 English to German with the big Transformer (arXiv:1706.03762, section 6.1): 300,000 steps of 32 k tokens.

    jaxlm plan configs/wmt14_en_de_big.py --topology v5e:2x2
    jaxlm train configs/wmt14_en_de_big.py --out runs/wmt14_big          # data as for configs/wmt14_en_de.py
"""

from jaxlm.nn import preset
from jaxlm.training import DataConfig, EvalConfig, Experiment, OptimConfig, TrainConfig

config = Experiment(
    model=preset("big", dtype="bfloat16"),
    data=DataConfig(
        train="wmt14:data/wmt14/en-de:train", valid="wmt14:data/wmt14/en-de:valid", test="wmt14:data/wmt14/en-de:test",
        vocab_size=37000, batch_tokens=32768,
    ),
    optim=OptimConfig(lr=5e-4, schedule="inverse_sqrt", warmup_steps=4000, b2=0.98, eps=1e-9, weight_decay=0.0),
    train=TrainConfig(
        steps=300_000, label_smoothing=0.1, eval_every=2000, checkpoint_every=2000, keep_best=20, average=20
    ),
    eval=EvalConfig(beam=4, length_penalty=0.6),
)
