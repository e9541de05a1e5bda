"""LoRA on any model and any data: give --config.model.path and --config.data.train."""

from jaxtune.config import default_config

TOPOLOGY = "v5litepod-8"  # for `jaxtune plan`; enough for 12 billion parameters


def get_config():
    config = default_config()
    config.lora.r = 16
    config.lora.alpha = 32.0  # the update is scaled by alpha / r
    config.lora.target_modules = "all-linear"
    config.data.eval_fraction = 0.02  # held out of the training rows, by seed
    config.train.epochs = 3.0
    config.train.batch_size = 16
    config.eval.every = 100
    return config
