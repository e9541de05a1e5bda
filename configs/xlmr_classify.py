"""XLM-RoBERTa base, classifying texts, LoRA, four v5e chips: give --config.data.train."""

from jaxtune.config import default_config

TOPOLOGY = "v5litepod-4"


def get_config():
    config = default_config()
    config.model.path = "FacebookAI/xlm-roberta-base"
    config.task = "classify"
    config.mesh.data = -1  # a copy of the base on every chip
    config.mesh.fsdp = 1
    config.data.max_length = 512
    config.data.eval_fraction = 0.1
    config.train.batch_size = 32
    config.eval.every = 100
    return config
