"""Llama 3.1 8B, LoRA on a base of 4 bits (QLoRA), one v5e chip: give --config.data.train."""

from jaxtune.config import default_config

TOPOLOGY = "v5litepod-1"


def get_config():
    config = default_config()
    config.model.path = "meta-llama/Llama-3.1-8B-Instruct"
    config.model.quantize = "nf4"  # 16 GB of weights become 5.8
    config.data.max_length = 2048
    config.data.eval_fraction = 0.02
    config.train.batch_size = 16
    config.train.grad_accum = 16  # one row at a time
    config.eval.every = 100
    return config
