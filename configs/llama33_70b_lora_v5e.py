"""Llama 3.3 70B, LoRA, sixteen v5e chips: give --config.data.train."""

from jaxtune.config import default_config

TOPOLOGY = "v5litepod-16"


def get_config():
    config = default_config()
    config.model.path = "meta-llama/Llama-3.3-70B-Instruct"
    config.optim.lr = 1e-4
    config.data.max_length = 2048
    config.data.eval_fraction = 0.02
    config.train.batch_size = 16
    config.eval.every = 100
    return config
