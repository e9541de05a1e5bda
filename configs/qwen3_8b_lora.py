"""Qwen3 8B, LoRA, eight v5e chips: give --config.data.train."""

from jaxtune.config import default_config

TOPOLOGY = "v5litepod-8"


def get_config():
    config = default_config()
    config.model.path = "Qwen/Qwen3-8B"
    config.data.max_length = 2048
    config.data.eval_fraction = 0.02
    config.train.batch_size = 32
    config.eval.every = 100
    return config
