"""Tokens a second of a LoRA step on one GPU, beside TRL's SFTTrainer with PEFT: one command.

    python tests/benchmarks/gpu.py [--size 8b|3b|1b|tiny] [--peer-python PATH]

The shape of Llama 3.1 8B (or the largest below it that both sides have memory for) with random
bfloat16 weights, LoRA r = 16 on every projection, rows of 4,096 tokens, AdamW, clipping at 1.
gpu_inputs.py writes the checkpoint, the adapter and the rows once; both sides read them, each in
its own process, one after the other, and learn the same rows at every step. The peer's number is
the best over the forms of attention that are installed (flash_attention_3, flash_attention_2,
sdpa), with gradient checkpointing only where it does not fit without. The losses of every step
must agree, and fall, or there is no ratio. MFU is at 4 FLOPs a parameter and token of the layers
and the head, of the GPU's dense bfloat16 peak.

The peer needs torch, transformers, peft and trl: of this Python, of --peer-python, or installed
into .bench/gpu (peers_gpu.txt pins them). Nothing else needs a network. Prints a table and one JSON
line; ends with 1 where the losses do not agree.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from table import BENCH, HERE, make_environment

SHAPES: dict[str, tuple[int, int, int, int, int, int]] = {
    # width, mlp width, layers, heads, key and value heads, vocabulary
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (128, 256, 2, 4, 2, 512),
}
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
PEERS = ("torch", "transformers", "peft", "trl")
STEPS, WARM = 10, 4  # of which the first are not counted: compilers, caches
RATE = 5e-4
AGREE = {"bfloat16": 2e-3, "float32": 1e-4}  # largest relative difference of a step's losses
MEMORY = re.compile(
    r"out of memory|OutOfMemory|RESOURCE_EXHAUSTED|does not fit|the step needs", re.I
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SHAPES, default="8b")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--dtype", choices=AGREE, default="bfloat16")
    parser.add_argument("--peer-python", metavar="PATH", help="a Python with " + ", ".join(PEERS))
    args = parser.parse_args()
    python = peer_python(args.peer_python)
    names = list(SHAPES)
    for size in names[names.index(args.size) :]:
        found = both(size, python, args)
        if found is not None:
            sys.exit(not report(size, args.rows * args.length, AGREE[args.dtype], found))
    raise SystemExit("no size fits on both sides")


def peer_python(given: str | None) -> str:
    """The Python of the peer's side, in which its packages are."""
    for python in filter(None, (given, sys.executable)):
        if not lacking(python):
            return python
        if python == given:
            raise SystemExit(f"{given} has no {', '.join(lacking(python))}")
    ours = BENCH / "gpu" / "bin" / "python"
    try:
        make_environment(ours, HERE / "peers_gpu.txt", *PEERS)
    except subprocess.CalledProcessError:
        raise SystemExit(
            f"the peer's packages could not be installed into {ours.parents[1]}: pip's words are "
            f"above. Without a package index, have {', '.join(PEERS)} in an environment and name "
            "it: --peer-python=PATH/bin/python"
        ) from None
    return str(ours)


def lacking(python: str) -> list[str]:
    """Packages of the peer that this Python has not."""
    code = (
        "import sys, importlib.util as u; print(*[n for n in sys.argv[1:] if not u.find_spec(n)])"
    )
    try:
        done = subprocess.run([python, "-c", code, *PEERS], capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(f"{python} does not start: {error}") from None
    return done.stdout.split() if done.returncode == 0 else list(PEERS)


def both(size: str, python: str, args: argparse.Namespace) -> dict[str, dict[str, Any]] | None:
    """{side: what it measured}; None where one of them has too little memory."""
    BENCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BENCH) as folder:
        config = config_of(size, args.length)
        say(f"{size}: writing weights")
        shape = ["--rows", args.rows, "--length", args.length, "--steps", STEPS]
        same = ["--dtype", args.dtype]
        if numbers(size) * (2 if args.dtype == "bfloat16" else 4) > shutil.disk_usage(folder).free:
            raise SystemExit(f"no room on the disk of {BENCH} for the weights of {size}")
        run(sys.executable, "gpu_inputs.py", folder, json.dumps(config), *shape, *same)
        same += ["--lr", RATE]
        say(f"{size}: jaxtune")
        ours = run(sys.executable, "gpu_ours.py", folder, *same)
        if ours is None:
            return None
        best = None
        for attention in run(python, "gpu_trl.py", folder, *same, "--attentions") or []:
            say(f"{size}: TRL with {attention}")
            given = [folder, *same, "--attention", attention]
            theirs = run(python, "gpu_trl.py", *given)
            theirs = theirs or run(python, "gpu_trl.py", *given, "--checkpointing")
            if theirs is not None and (best is None or speed(theirs) < speed(best)):
                best = theirs
        return None if best is None else {"jaxtune": ours, "trl": best}


def run(python: str, script: str, *words: Any) -> Any:
    """What a script prints as JSON, from a process of its own; None where memory was too little."""
    command = [python, str(HERE / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode == 0:
        lines = done.stdout.strip().splitlines()
        return json.loads(lines[-1]) if lines else None
    if MEMORY.search(done.stderr):
        say(f"{script}: too little memory")
        return None
    raise SystemExit(f"{script} failed:\n{done.stderr.strip()[-2000:]}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def config_of(size: str, length: int) -> dict[str, Any]:
    width, inner, layers, heads, kv_heads, vocab = SHAPES[size]
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": max(length, 4096),
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def matrices(size: str) -> int:
    """Numbers in the projections of all layers."""
    width, inner, layers, heads, kv_heads, _ = SHAPES[size]
    keys = width // heads * kv_heads
    return layers * width * (2 * width + 2 * keys + 3 * inner)


def numbers(size: str) -> int:
    """Numbers of the checkpoint."""
    width, *_, vocab = SHAPES[size]
    return matrices(size) + 2 * width * vocab


def flops(size: str) -> float:
    """4N a token: N of the projections and the head, frozen, so no gradient of a weight."""
    width, *_, vocab = SHAPES[size]
    return 4.0 * (matrices(size) + width * vocab)


def speed(side: dict[str, Any]) -> float:
    """Seconds of a step, the median of those that count."""
    return statistics.median(side["seconds"][WARM:])


def report(size: str, tokens: int, most: float, found: dict[str, dict[str, Any]]) -> bool:
    """Prints the table; whether the losses agree."""
    rates = {}
    for name, side in found.items():
        rates[name] = tokens / speed(side)
        peak = next((p for gpu, p in PEAKS.items() if gpu in side["device"]), None)
        mfu = f"{rates[name] * flops(size) / peak:.1%}" if peak else "unknown peak"
        memory = f"{side['memory'] / 2**30:.1f} GiB" if side["memory"] else ""
        losses = f"loss {side['losses'][0]:.4f} -> {side['losses'][-1]:.4f}"
        print(
            f"{name:8} {size} {rates[name]:>10,.0f} tokens/s  MFU(4N) {mfu}  {memory}  {losses}  "
            f"{side['device']}, {side['note']}"
        )
    ours, theirs = (side["losses"] for side in found.values())
    differ = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    fell = (theirs[0] - theirs[-1]) / theirs[0]  # else a side that learns nothing would agree
    finite = all(map(math.isfinite, ours + theirs))  # a maximum may skip what is not
    agree = finite and differ <= most and fell > 2 * differ
    ratio = f"{rates['jaxtune'] / rates['trl']:.2f}" if agree else "void"
    print(
        f"ratio {ratio} (target 1.25; MFU 45%); losses of {len(ours)} steps differ by "
        f"{differ:.0e} and fell by {fell:.0e}"
    )
    print(json.dumps({"size": size, "tokens_per_second": rates, "agree": agree, "sides": found}))
    return agree


if __name__ == "__main__":
    main()
