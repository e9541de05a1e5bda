"""Qwen3 30B-A3B, a mixture of 128 experts, LoRA on attention, sixteen v5e chips: give
--config.data.train."""

from jaxtune.config import default_config

TOPOLOGY = "v5litepod-16"


def get_config():
    config = default_config()
    config.model.path = "Qwen/Qwen3-30B-A3B"
    config.mesh.expert = 4  # experts stay where they are, tokens travel
    config.data.max_length = 2048
    config.data.eval_fraction = 0.02
    config.train.batch_size = 16
    config.eval.every = 100
    return config
