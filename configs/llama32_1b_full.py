"""Llama 3.2 1B, all of it, eight v5e chips: give --config.data.train."""

from jaxtune.config import default_config

TOPOLOGY = "v5litepod-8"


def get_config():
    config = default_config()
    config.model.path = "meta-llama/Llama-3.2-1B"
    config.lora.r = 0  # every parameter is trained
    config.optim.lr = 2e-5
    config.optim.weight_decay = 0.01
    config.data.max_length = 2048
    config.data.eval_fraction = 0.02
    config.train.batch_size = 32
    config.eval.every = 100
    return config
