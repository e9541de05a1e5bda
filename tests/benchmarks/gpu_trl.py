"""The peer of gpu.py: TRL's SFTTrainer with a PEFT adapter, on what gpu_inputs.py wrote.

Prints one JSON object: seconds and loss of every step, the device, its peak memory. Needs torch,
transformers, peft and trl, and neither jaxtune nor a network.
"""

import argparse
import importlib.util
import json
import os
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import torch
import transformers
import trl  # type: ignore[import-not-found]  # of the peer's environment
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback


class Timed(trl.SFTTrainer):
    """TRL's own trainer, which takes the rows in their order and keeps the losses unrounded."""

    def __init__(self, *args, **kwargs):
        self.losses: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, *args, **kwargs):
        found = super().compute_loss(*args, **kwargs)
        loss = found[0] if isinstance(found, tuple) else found
        self.losses.append(loss.detach())
        return found


class Clock(TrainerCallback):
    """Seconds of each step, forward to update, until the device is done."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--attentions", action="store_true", help="list those installed, and end")
    args = parser.parse_args()
    if args.attentions:
        print(json.dumps(attentions()))
        return
    tokens_SBT = np.load(args.folder / "tokens.npy")
    steps, rows, length = tokens_SBT.shape
    model = AutoModelForCausalLM.from_pretrained(
        args.folder / "base",
        dtype=getattr(torch, args.dtype),
        attn_implementation=args.attention,
        device_map={"": 0} if torch.cuda.is_available() else None,
    )
    model = PeftModel.from_pretrained(model, args.folder / "adapter", is_trainable=True)
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        settings = trl.SFTConfig(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=rows,
            max_length=length,
            learning_rate=args.lr,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
            bf16=args.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=args.checkpointing,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=steps,
        )
        trainer = Timed(
            model=model,
            args=settings,
            train_dataset=Dataset.from_dict({"input_ids": tokens_SBT.reshape(-1, length).tolist()}),
            processing_class=tokenizer(),
            callbacks=[clock],
        )
        trainer.train()
    on_gpu = torch.cuda.is_available()
    again = "on" if args.checkpointing else "off"
    note = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"trl {trl.__version__}, {args.attention}, checkpointing {again}"
    )
    found = {
        "seconds": clock.seconds,
        "losses": [loss.item() for loss in trainer.losses],
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "memory": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "note": note,
    }
    print(json.dumps(found))


def attentions() -> list[str]:
    """Forms of attention that are installed here."""
    found = ["sdpa"]
    if torch.cuda.is_available():
        packages = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}
        found += [name for name, package in packages.items() if importlib.util.find_spec(package)]
    return found


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that nobody asks for a word: the rows are tokens already."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b", pad_token="b")


if __name__ == "__main__":
    main()
