"""A classifier of texts or pairs: give --config.model.path and --config.data.train.

Rows have `text` and `label`; other columns, and pairs, by `columns` as for every task. Bases are
encoders (XLM-R, ModernBERT, BERT, ...) or causal models; one without a head gets a new one.
"""

from jaxtune.config import default_config

TOPOLOGY = "v5litepod-1"  # for `jaxtune plan`; enough for an encoder


def get_config():
    config = default_config()
    config.task = "classify"
    config.lora.r = 0  # all of an encoder is trained; 16 suits causal models of a billion and more
    config.optim.lr = 2e-5  # with LoRA 2e-4
    config.optim.warmup = 0.06
    config.optim.weight_decay = 0.01
    config.data.max_length = 256  # tokens; longer rows are cut, of a pair the longer text first
    config.data.eval_fraction = 0.1  # held out of the training rows, by seed
    config.train.epochs = 3.0
    config.train.batch_size = 8  # rows of max_length tokens; a row holds several short texts
    config.eval.every = 100
    return config
