"""The other side: transformers + peft + torch, eager, as its guides have it. Run by run.py.

Reads commands on stdin, one a line, and answers each with one JSON object on stdout.
"""

import argparse
import json
import resource
import sys
import time

import numpy as np
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

IGNORED = -100  # label of a token that bears no loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("adapter")
    parser.add_argument("documents")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--float32-adapter", action="store_true")
    args = parser.parse_args()
    model = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(args.base, dtype=getattr(torch, args.dtype)),
        args.adapter,
        is_trainable=True,
        autocast_adapter_dtype=args.float32_adapter,
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    batches = _batches(args.documents, args.rows)

    def step(tokens_BT, attended_BT, labels_BT) -> float:
        loss = model(input_ids=tokens_BT, attention_mask=attended_BT, labels=labels_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def evaluate() -> dict:
        total = count = 0.0
        with torch.no_grad():
            for tokens_BT, attended_BT, labels_BT in batches:
                weight = int((labels_BT[:, 1:] != IGNORED).sum())
                output = model(input_ids=tokens_BT, attention_mask=attended_BT, labels=labels_BT)
                total, count = total + output.loss.item() * weight, count + weight
        return {"loss": total / count}

    def train() -> dict:
        started, used = time.perf_counter(), _cpu()
        losses = [step(*batch) for batch in batches]
        return {"seconds": time.perf_counter() - started, "cpu": _cpu() - used, "losses": losses}

    commands = {"evaluate": evaluate, "train": train, "first": lambda: {"loss": step(*batches[0])}}
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()]()), flush=True)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _batches(file: str, rows: int) -> list[tuple[torch.Tensor, ...]]:
    """(tokens, attended, labels) of `rows` documents each, padded to the longest of the batch."""
    arrays = np.load(file)
    tokens = np.split(arrays["tokens"], arrays["ends"][:-1])
    masks = np.split(arrays["mask"], arrays["ends"][:-1])
    batches = []
    for start in range(0, len(tokens), rows):
        some = range(start, min(start + rows, len(tokens)))
        shape = (len(some), max(len(tokens[i]) for i in some))
        batch = [np.full(shape, fill, np.int64) for fill in (0, 0, IGNORED)]
        for row, i in enumerate(some):
            end = len(tokens[i])
            batch[0][row, :end] = tokens[i]
            batch[1][row, :end] = 1
            batch[2][row, :end] = np.where(masks[i], tokens[i], IGNORED)
        batches.append(tuple(map(torch.from_numpy, batch)))
    return batches


if __name__ == "__main__":
    main()
