"""WMT14 English to German with the base Transformer (arXiv:1706.03762, section 6.1): 100,000 steps of 32 k tokens.

The archives of statmt.org/wmt14/translation-task.html (``jaxlm.data.sources.wmt14`` lists them) are read as they are,
from data/wmt14 or from where --data.train, --data.valid and --data.test say:

    jaxlm train configs/wmt14_en_de.py --out runs/wmt14
    jaxlm evaluate runs/wmt14 --data wmt14:data/wmt14/en-de:test --beam 4 --length-penalty 0.6

The vocabulary has 37,000 byte pairs, learned from both languages of the training data. The learning rate is that of the
paper at the end of its warm-up, width ** -0.5 * 4000 ** -0.5. Unlike in the paper, norms precede their sublayers, and
beam scores are divided by length ** 0.6.
"""

from jaxlm.nn import preset
from jaxlm.training import DataConfig, EvalConfig, Experiment, OptimConfig, TrainConfig

config = Experiment(
    model=preset("base", dtype="bfloat16"),
    data=DataConfig(
        train="wmt14:data/wmt14/en-de:train", valid="wmt14:data/wmt14/en-de:valid", test="wmt14:data/wmt14/en-de:test",
        vocab_size=37000, batch_tokens=32768,
    ),
    optim=OptimConfig(lr=7e-4, schedule="inverse_sqrt", warmup_steps=4000, b2=0.98, eps=1e-9, weight_decay=0.0),
    train=TrainConfig(
        steps=100_000, label_smoothing=0.1, eval_every=1000, checkpoint_every=1000, keep_best=5, average=5
    ),
    eval=EvalConfig(beam=4, length_penalty=0.6),
)
