"""Multi30k English to German with the tiny translation Transformer (task 1 of Elliott et al., arXiv:1605.00459).

    jaxlm train configs/multi30k.py --out runs/multi30k --data.train bitext:train.en.gz,train.de.gz \\
        --data.valid bitext:val.en.gz,val.de.gz --data.test bitext:test_2016_flickr.en.gz,test_2016_flickr.de.gz
    jaxlm evaluate runs/multi30k --beam 5
"""

from jaxlm.nn import preset
from jaxlm.training import DataConfig, Experiment, OptimConfig, TrainConfig

config = Experiment(
    model=preset("tiny", dropout=0.2, scan_layers=False),
    data=DataConfig(
        train="bitext:train.en.gz,train.de.gz", valid="bitext:val.en.gz,val.de.gz",
        test="bitext:test_2016_flickr.en.gz,test_2016_flickr.de.gz", vocab_size=6000, batch_tokens=4096,
    ),
    optim=OptimConfig(lr=4e-3, schedule="cosine", warmup_steps=400, b2=0.98, weight_decay=0.01),
    train=TrainConfig(steps=3000, label_smoothing=0.1, eval_every=250, checkpoint_every=250, keep_best=3, average=3),
)
