"""Gemma 3 4B, LoRA, eight v5e chips: give --config.data.train."""

from jaxtune.config import default_config

TOPOLOGY = "v5litepod-8"


def get_config():
    config = default_config()
    config.model.path = "google/gemma-3-4b-it"
    config.data.max_length = 2048
    config.data.eval_fraction = 0.02
    config.train.batch_size = 32
    config.eval.every = 100
    return config
