"""jaxtune: fine-tune language models with JAX, on a TPU pod or a laptop.

model = jaxtune.load_model(path)                  # a Hugging Face folder or hub id
result = jaxtune.fit(config, workdir)             # what `jaxtune train` runs
result = jaxtune.search(config, workdir)          # what `jaxtune sweep` runs
scores = jaxtune.evaluate(workdir)                # base and tuned model on held-out data
texts = jaxtune.generate(workdir, prompts)        # text from prompts
jaxtune.export(workdir, out, format="hf")         # or "peft"; verified by reading it back
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.hf.load import load_model
    from jaxtune.sweep.command import search
    from jaxtune.train import fit
    from jaxtune.tuned import evaluate, export, generate

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "export", "fit", "generate", "load_model", "search"]

_HOME = {
    "load_model": "jaxtune.hf.load",
    "fit": "jaxtune.train",
    "search": "jaxtune.sweep.command",
    "evaluate": "jaxtune.tuned",
    "export": "jaxtune.tuned",
    "generate": "jaxtune.tuned",
}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `import jaxtune` does not import jax."""
    if name not in _HOME:
        raise AttributeError(f"module 'jaxtune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
