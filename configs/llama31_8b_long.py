"""Llama 3.1 8B, LoRA on rows of 32,768 tokens, eight v6e chips: give --config.data.train."""

from jaxtune.config import default_config

TOPOLOGY = "v6e-8"


def get_config():
    config = default_config()
    config.model.path = "meta-llama/Llama-3.1-8B-Instruct"
    config.mesh.context = 2  # every row is shared by two chips
    config.data.max_length = 32768
    config.data.eval_fraction = 0.02
    config.train.batch_size = 8
    config.train.grad_accum = 2
    config.eval.every = 50
    return config
