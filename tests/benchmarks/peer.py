"""The other side: transformers + peft + torch, eager, as its guides have it. Run by run.py.

Reads commands on stdin, one a line, and answers each with one JSON object on stdout.
"""

import argparse
import time

import numpy as np
import protocol
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
    batches = [tensors(*batch) for batch in protocol.padded(args.documents, args.rows)]

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
        started, used = time.perf_counter(), protocol.processor_seconds()
        losses = [step(*batch) for batch in batches]
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "cpu": protocol.processor_seconds() - used, "losses": losses}

    def first() -> dict:
        return {"loss": step(*batches[0])}

    protocol.serve({"evaluate": evaluate, "train": train, "first": first})


def tensors(tokens_BT, attended_BT, mask_BT) -> tuple[torch.Tensor, ...]:
    """(tokens, attended, labels) as their models take them."""
    labels_BT = np.where(mask_BT, tokens_BT, IGNORED)
    return tuple(map(torch.from_numpy, (tokens_BT, attended_BT, labels_BT)))


if __name__ == "__main__":
    main()
