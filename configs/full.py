"""Full fine-tuning of any model on any data: give --config.model.path and --config.data.train."""

from jaxtune.config import default_config

TOPOLOGY = "v5litepod-8"  # for `jaxtune plan`; enough for 3 billion parameters


def get_config():
    config = default_config()
    config.lora.r = 0  # every parameter is trained, in float32
    config.data.eval_fraction = 0.02
    config.train.epochs = 3.0
    config.train.batch_size = 16
    config.eval.every = 100
    config.optim.weight_decay = 0.01
    return config
