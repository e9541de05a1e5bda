"""Llama 3.2 1B, LoRA, eight v5e chips: give --config.data.train."""

from jaxtune.config import default_config

TOPOLOGY = "v5litepod-8"


def get_config():
    config = default_config()
    config.model.path = "meta-llama/Llama-3.2-1B-Instruct"
    config.mesh.data = -1  # a copy of the base on every chip: only gradients of the adapters travel
    config.mesh.fsdp = 1
    config.optim.lr = 4e-4
    config.data.max_length = 2048
    config.data.eval_fraction = 0.02
    config.train.batch_size = 32
    config.eval.every = 100
    return config
