"""WMT14 English to German with the big Transformer (arXiv:1706.03762, section 6.1): 300,000 steps of 32 k tokens.

    jaxlm plan configs/wmt14_big.py --topology v5e:2x2
    jaxlm train configs/wmt14_big.py --out runs/wmt14_big --data.train bitext:train.en.gz,train.de.gz \\
        --data.valid bitext:newstest2013.en,newstest2013.de --data.test bitext:newstest2014.en,newstest2014.de
"""

from jaxlm import nn
from jaxlm.training.config import DataConfig, Experiment, OptimConfig, TrainConfig

config = Experiment(
    model=nn.preset("big", dtype="bfloat16"),
    data=DataConfig(
        train="bitext:train.en.gz,train.de.gz", valid="bitext:newstest2013.en,newstest2013.de",
        test="bitext:newstest2014.en,newstest2014.de", vocab_size=37000, batch_tokens=32768,
    ),
    optim=OptimConfig(lr=1e-3, schedule="inverse_sqrt", warmup_steps=4000, b2=0.98, eps=1e-9, weight_decay=0.0),
    train=TrainConfig(
        steps=300_000, label_smoothing=0.1, eval_every=2000, checkpoint_every=2000, keep_best=5, average=5
    ),
)
