"""A new language for a tiny model: what `make quickstart` runs.

python -m jaxtune.demo.prepare --out=quickstart   # once: base and data, from nothing
jaxtune train --config=configs/quickstart.py --workdir=quickstart/run
"""

from jaxtune.config import default_config

TOPOLOGY = "v5litepod-1"  # for `jaxtune plan`; a laptop is enough


def get_config():
    config = default_config()
    config.model.path = "quickstart/base"
    config.model.dtype = "float32"  # what a CPU is fast at
    config.model.param_dtype = "float32"
    config.model.remat = "none"  # the model is tiny; memory is no concern

    config.lora.r = 16
    config.lora.alpha = 32.0
    config.optim.lr = 3e-3  # small models take large steps; 2e-4 is right for billions

    config.data.train = "quickstart/data/train.jsonl"
    config.data.eval = "quickstart/data/test.jsonl"
    config.data.max_length = 128  # tokens a row; about three sentences
    config.train.batch_size = 8
    config.train.steps = 700
    config.checkpoint.every = 350
    return config
