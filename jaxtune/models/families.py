"""Model families: how to read a config.json, and what the tensors of a checkpoint are called.

A family has no maths of its own: a function from config.json to the switches of our blocks, and a
table from the path of one layer's parameter to the Hugging Face tensor ({i} is the layer, {e} the
expert). Names are those of transformers' modules in memory, which are PEFT's too; `on_disk` gives
those of the files where they differ. A `kernel` is stored transposed (outputs first) except where
a family says otherwise.
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxtune import tree
from jaxtune.errors import ModelError

Slot = tuple[tuple[int, ...], str]  # index into a leaf's leading axes, and the tensor there
# ((part of a name in memory, in the file), ...): beginnings, or endings where it begins with a dot.
Layout = tuple[tuple[str, str], ...]


class Fields(Mapping[str, Any]):
    """A config.json that remembers which of its fields were read."""

    def __init__(self, values: Mapping[str, Any]):
        self._values, self._read = values, set[str]()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def need(self, name: str) -> Any:
        """A field that has no default. Raises ModelError where it is missing."""
        if self.get(name) is None:
            raise ModelError(f"config.json has no {name}", fix="the checkpoint's own config.json")
        return self[name]

    def one_of(self, name: str, default: Any, known: Iterable[Any]) -> Any:
        """A field with few possible values. Raises ModelError for another."""
        value = self.get(name, default)
        if value not in known:
            options = ", ".join(map(str, known))
            raise ModelError(f"config.json has {name} {value!r}", fix=f"one of {options}")
        return value

    def pass_over(self, *names: str) -> None:
        """Fields that are known, and change nothing that is computed here."""
        self._read.update(names)

    def unread(self) -> list[str]:
        """Fields nobody read that are not off (null, false, zero or empty)."""
        return [name for name, value in self._values.items() if name not in self._read and value]


@dataclass(frozen=True)
class Family:
    config: Callable[[Fields], Any]  # -> DecoderConfig or EncoderConfig
    keys: Mapping[str, str]
    label: str = ""  # name of transformers' classes, such as Llama in LlamaForCausalLM
    ignored: tuple[str, ...] = ()  # regexes of tensors that checkpoints carry and nobody reads
    # A wrapper's other tensors (a vision tower): left alone by loading, kept by an export.
    untouched: tuple[str, ...] = ()
    transposed: bool = True  # the layers' kernels are stored outputs first
    # Parts that a checkpoint may lack and a classifier starts anew: prefixes of paths.
    heads: tuple[str, ...] = ("score.",)
    layouts: tuple[Layout, ...] = ()  # other ways that files name the tensors

    def tensor(self, path: str, expert: int = 0) -> str:
        """`layers.3.mlp.up_proj.kernel` -> `model.layers.3.mlp.up_proj.weight`."""
        match = re.match(r"layers\.(\d+)\.(.*)", path)
        if match is None:
            return self.keys[path]
        return self.keys["layers.{i}." + match[2]].format(i=match[1], e=expert)

    def module(self, path: str) -> str:
        """The Hugging Face module that owns a parameter: its tensor's name without `.weight`."""
        return self.tensor(path).rsplit(".", 1)[0]

    def slots(self, path: str, config: Any) -> list[Slot]:
        """Where each tensor of a leaf lies in it.

        `layers.0-1.mlp.experts.up_proj.kernel` -> [((0, 0), "...layers.0...experts.0..."), ...];
        a leaf outside the layers -> [((), name)]. `leaf[index]` is what the tensor holds.
        """
        stacked = tree.layer_range(path) is not None
        result: list[Slot] = []
        for layer, single in enumerate(tree.layer_paths(path)):
            index = (layer,) if stacked else ()
            if ".experts." not in path:
                result.append((index, self.tensor(single)))
                continue
            for expert in range(config.experts.count):
                result.append(((*index, expert), self.tensor(single, expert)))
        return result

    def named(self, prefixes: tuple[str, ...]) -> set[str]:
        """Tensors, or templates of them, of the paths that begin with one of these."""
        return {name for path, name in self.keys.items() if path.startswith(prefixes)}

    def turned(self, path: str) -> bool:
        """Whether a leaf lies in files with its axes swapped: outputs first, in A and B too."""
        inside = path.startswith("layers.")
        kernel = path.endswith(".kernel") and (self.transposed or not inside)
        return kernel or path.endswith((".lora.A", ".lora.B"))

    def on_disk(self, stored: Collection[str]) -> "Family":
        """The family with the names of these files: the layout that finds most of them."""

        def renamed(layout: Layout) -> dict[str, str]:
            return {path: _renamed(name, layout) for path, name in self.keys.items()}

        def found(layout: Layout) -> int:
            return sum(name.format(i=0, e=0) in stored for name in renamed(layout).values())

        return replace(self, keys=renamed(max(((), *self.layouts), key=found)))


def _renamed(name: str, layout: Layout) -> str:
    for memory, file in layout:
        if memory.startswith(".") and name.endswith(memory):
            name = name.removesuffix(memory) + file
        elif name.startswith(memory):
            name = file + name.removeprefix(memory)
    return name


# Fields of config.json that change nothing a model computes when it is fine-tuned here.
_HARMLESS = re.compile(
    r"_.*|architectures|model_type|transformers_version|torch_dtype|dtype|use_cache|auto_map"
    r"|initializer_.*|(bos|eos|pad|sep|cls|mask|unk|decoder_start|forced_\w+)_token_id|id2label"
    r"|label2id|num_labels|problem_type|name_or_path|\w*dropout\w*|\w+_pdrop|pretraining_tp"
    r"|output_(attentions|hidden_states|scores)|return_dict\w*|task_specific_params|torchscript"
    r"|finetuning_task|cache_implementation|attn_implementation|gradient_checkpointing"
    r"|(max|min)_length|do_sample|top_[kp]|typical_p|temperature|num_(beams|beam_groups)"
    r"|num_return_sequences|\w+_penalty|no_repeat_ngram_size|early_stopping|summary_.*"
    r"|tokenizer_class|unsloth_\w+|chunk_size_feed_forward|use_bfloat16|torch_compile\w*"
    r"|router_aux_loss_coef|output_router_logits|is_llama_config|transformers\.js_config"
    r"|model_max_length|max_sequence_length"
)


_PLACEHOLDER = re.compile(r"LABEL_\d+")  # the name that transformers gives a class without one


def read(
    hf: Mapping[str, Any], *, num_labels: int | None = None, ignore: Collection[str] = ()
) -> tuple[Family, Any]:
    """The family of a config.json and the model it describes.

    Args:
      num_labels: of a classifier to be made from it; 0 a language model; None what it is.
      ignore: fields to disregard although we do not know them.

    Raises:
      ModelError: a family we do not have, a value or field we do not know, a quantised checkpoint.
    """
    family = _find(hf)
    if hf.get("quantization_config"):
        raise ModelError(
            "config.json says that the weights are quantised (quantization_config)",
            fix="the checkpoint in bfloat16 or float32",
        )
    fields = Fields(hf)
    config = family.config(fields)
    unknown = [name for name in unknown_fields(fields) if name not in ignore]
    if unknown:
        shown = ", ".join(f"{name} {str(hf[name])[:60]}" for name in unknown)
        raise ModelError(
            f"config.json of model_type {hf['model_type']} has fields jaxtune does not know, which "
            f"may change the maths: {shown}",
            fix=f"--config.model.ignore={','.join(unknown)} if you are sure they do not",
        )
    if num_labels is None:
        num_labels = labels(hf) if is_classifier(hf) or not hasattr(config, "tie_embeddings") else 0
    return family, replace(config, num_labels=num_labels)


def sliding_layers(fields: Fields, count: int, default: Callable[[int], bool]) -> tuple[bool, ...]:
    """Which of `count` layers see a window only: `layer_types`, which rules, or the default."""
    kinds = fields.get("layer_types")
    if kinds is None:
        return tuple(map(default, range(count)))
    known = {"sliding_attention": True, "full_attention": False}
    wrong = sorted(set(kinds) - set(known))
    if wrong or len(kinds) != count:
        raise ModelError(
            f"config.json has {len(kinds)} layer_types for {count} layers"
            + (f", unknown ones among them: {', '.join(map(repr, wrong))}" if wrong else ""),
            fix=f"one of {', '.join(known)} a layer",
        )
    return tuple(known[kind] for kind in kinds)


def unknown_fields(fields: Fields) -> list[str]:
    """Fields that nobody read and that may change what a model computes."""
    return [name for name in fields.unread() if not _HARMLESS.fullmatch(name)]


def strange(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json for which `read` would stop."""
    fields = Fields(hf)
    _find(hf).config(fields)
    return {name: hf[name] for name in unknown_fields(fields)}


def is_classifier(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is a classifier's by its architectures."""
    return "SequenceClassification" in " ".join(hf.get("architectures") or ())


def labels(hf: Mapping[str, Any]) -> int:
    """Classes a config.json speaks of; transformers' default is two."""
    return int(hf.get("num_labels") or len(hf.get("id2label") or ()) or 2)


def base_labels(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes of a trained classifier's config.json, in order; () where it names none.

    Raises:
      ModelError: one that predicts numbers, or several classes at once.
    """
    problem = hf.get("problem_type")
    if problem not in (None, "single_label_classification"):
        raise ModelError(
            f"config.json has problem_type {problem!r}; one class a row is what task=classify "
            "trains",
            fix="another base, or the same without problem_type to start a classifier anew",
        )
    table = hf.get("id2label")
    if not is_classifier(hf) or not table:
        return ()
    names = tuple(str(name) for _, name in sorted(table.items(), key=lambda item: int(item[0])))
    named = not all(_PLACEHOLDER.fullmatch(name) for name in names)
    return names if named and len(names) > 1 else ()


def _find(hf: Mapping[str, Any]) -> Family:
    from jaxtune.models.bidirectional import BIDIRECTIONAL
    from jaxtune.models.causal import CAUSAL

    families = CAUSAL | BIDIRECTIONAL
    name = hf.get("model_type")
    if not name:
        raise ModelError("config.json has no model_type", fix="a Hugging Face model folder")
    if name not in families:
        close = difflib.get_close_matches(str(name), families, n=1, cutoff=0.0)
        raise ModelError(
            f"model_type {name!r} is not supported",
            fix=f"one of {', '.join(families)} (closest: {close[0]})",
        )
    return families[name]
