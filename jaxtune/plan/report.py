"""Facts of a compiled step -> what people want to know, as numbers and as a page.

The times are floors: what the chip's published peaks allow, each by itself, with nothing waiting
for anything. Nothing here has been measured.
"""

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxtune.aot import GIB
from jaxtune.config import Config
from jaxtune.console import say
from jaxtune.plan.facts import Facts
from jaxtune.plan.topologies import Topology

_DAY = 86400
_PARTS = {
    "base": "base (frozen)",
    "adapters": "adapters",
    "trained_weights": "trained weights",
    "optimizer": "optimizer",
    "batch": "batch",
    "temporaries": "activations, temporaries",
}


def summary(
    config: Config, topology: Topology, facts: Facts, price: float | None = None
) -> dict[str, Any]:
    """Everything a plan says, as JSON values; memory and bytes are those of one chip.

    Args:
      price: of one chip for an hour, in any currency.
    """
    chip, each = topology.chip, topology.chip.devices
    count = topology.chips * each  # devices
    memory = {name: size * each / GIB for name, size in facts.parts.items()}
    if not config.lora.r:
        memory["trained_weights"] = memory.pop("adapters")
    # What layouts pad is with the temporaries: shapes do not show it.
    memory["temporaries"] = (facts.needed - sum(facts.parts.values())) * each / GIB
    memory["free"] = (facts.available - facts.needed) * each / GIB
    result: dict[str, Any] = {
        "model": config.model.path,
        "topology": topology.name,
        "raw_topology": topology.raw,
        "slices": topology.slices,
        "chips": topology.chips,
        "devices": count,
        "remat": config.model.remat,
        "fits": facts.fits,
        "memory_per_chip_gib": facts.needed * each / GIB,
        "available_per_chip_gib": facts.available * each / GIB,
        "parts_gib": memory,
        "tokens_per_step": facts.tokens,
        "flops_per_token": sum(facts.flops_a_token.values()),
        "flops_per_token_by_part": facts.flops_a_token,
        "largest_buffers": [[size / GIB, name] for size, name in facts.buffers],
        "from_cache": facts.recalled,
    }
    if not facts.fits:
        return result
    seconds = floors(topology, facts)
    floor = max(seconds.values())
    rows, at_most = steps_of(config)
    result |= {
        "flops_per_token_hlo": facts.flops * count / facts.tokens,
        "collective_bytes": {k: v * each for k, v in facts.ici.items()},
        "collective_bytes_between_slices": {k: v * each for k, v in facts.dcn.items()},
        "hbm_bytes": facts.hbm * each,
        "floor_seconds": seconds,
        "step_seconds_floor": floor,
        "bound_by": max(seconds, key=lambda name: seconds[name]),
        "tokens_per_second_at_most": facts.tokens / floor,
        "tokens_per_day_at_most": facts.tokens / floor * _DAY,
        "hours_per_1000_steps_at_least": floor * 1000 / 3600,
        "steps": rows,
        "steps_are_at_most": at_most,
        "hours_at_least": None if rows is None else rows * floor / 3600,
        "loops_counted_once": list(facts.unknown),
        "compile_seconds": facts.seconds,
        "mfu_at_most": useful(facts) * facts.tokens / count / floor / (chip.bf16 / each),
        "chips_peak": chip._asdict(),
    }
    if price is not None:
        hours = result["hours_at_least"] or result["hours_per_1000_steps_at_least"]
        result["cost_at_least"] = hours * topology.chips * price
    return result


def useful(facts: Facts) -> float:
    """Operations a token without what remat does again."""
    again = {"again", "attention_again"}
    return sum(value for name, value in facts.flops_a_token.items() if name not in again)


def floors(topology: Topology, facts: Facts) -> dict[str, float]:
    """Seconds of a step by what they go to; a peak nobody publishes is left out."""
    chip, each = topology.chip, topology.chip.devices
    wanted = {
        "compute": (facts.flops, chip.bf16),
        "hbm": (facts.hbm, chip.hbm),
        "ici": (sum(facts.ici.values()), chip.ici),
        "dcn": (sum(facts.dcn.values()), chip.dcn),
    }
    return {name: amount * each / peak for name, (amount, peak) in wanted.items() if peak}


def steps_of(config: Config) -> tuple[int | None, bool]:
    """(steps of the run, whether that is only an upper bound): from train.steps, or by counting.

    Lines of a local .jsonl or .txt file are counted; with packing, rows are fewer than lines.
    """
    if config.train.steps:
        return config.train.steps, False
    source = config.data.train
    if not isinstance(source, str) or not source.endswith((".jsonl", ".txt")):
        return None, False
    file = Path(source).expanduser()
    if not file.is_file():
        if "://" not in source:
            say(f"{source} is not here, so hours are for 1,000 steps")
        return None, False
    with file.open("rb") as lines:
        count = sum(1 for line in lines if line.strip())
    rows = count * (1 - (0 if config.data.eval else config.data.eval_fraction))
    steps = max(1, -(-int(config.train.epochs * rows) // config.train.batch_size))
    return steps, config.data.packing


def show(result: dict[str, Any]) -> None:
    """The page on stdout."""
    console = Console(highlight=False)
    each = result["devices"] // result["chips"]
    two = f", {each} devices of jax each" if each > 1 else ""
    slices = f" in {result['slices']} slices" if result["slices"] > 1 else ""
    chips = "1 chip" if result["chips"] == 1 else f"{result['chips']} chips"
    console.print(
        Text.assemble(
            (f"{result['model']} on {result['topology']}", "bold"),
            f"  {result['raw_topology']}, {chips}{two}{slices}; remat {result['remat']}",
        )
    )
    for table in (_memory, _work, _time):
        console.print()
        console.print(table(result))
        if not result["fits"]:
            return
    console.print()
    console.print(f"{peaks(result)}.", style="dim")
    if result["from_cache"]:
        took = scaled(result["compile_seconds"], "s")
        console.print(f"From the cache: this was compiled before, in {took}.", style="dim")
    for loop in result["loops_counted_once"]:
        console.print(f"a loop of unknown length was counted once: {loop}", style="yellow")


def peaks(result: dict[str, Any]) -> str:
    """What the floors assume, in a sentence."""
    chip = result["chips_peak"]
    known = {
        "in bf16": scaled(chip["bf16"], "FLOP/s"),
        "from memory": scaled(chip["hbm"], "B/s"),
        "between chips": scaled(chip["ici"], "B/s"),
        "between slices": scaled(chip["dcn"], "B/s") if result["slices"] > 1 else "0",
    }
    listed = ", ".join(f"{rate} {what}" for what, rate in known.items() if rate[0] != "0")
    return (
        f"Floors from the published peaks of a {chip['name']} chip ({listed}), each by itself; "
        "not measurements: real steps take longer"
    )


def scaled(value: float, unit: str) -> str:
    """Three digits and a unit that fits: 0.00031 s is 310 us, 1.97e14 FLOP/s is 197 TFLOP/s."""
    value = float(f"{value:.3g}")  # first, so that 999.9 is 1 of the next unit
    if not value:
        return f"0 {unit}"
    power = min(0 if unit == "s" else 4, max(-3, math.floor(math.log10(abs(value)) / 3)))
    prefix = ("n", "u", "m", "", "k", "M", "G", "T")[power + 3]
    return f"{_digits(value / 1000.0**power)} {prefix}{unit}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def size_of(gib: float) -> str:
    """Of GiB: 4.21 GiB, 3.1 MiB or 12 KiB."""
    for unit, factor in (("GiB", 1.0), ("MiB", 2.0**10)):
        if abs(gib) * factor >= 0.1:
            return f"{gib * factor:,.2f} {unit}"
    return f"{gib * 2**20:,.0f} KiB"


def _memory(result: dict[str, Any]) -> Table:
    table = _table("memory of a chip", "")
    total, available = result["memory_per_chip_gib"], result["available_per_chip_gib"]
    for name, label in _PARTS.items():
        if name in result["parts_gib"]:
            size = result["parts_gib"][name]
            table.add_row(label, size_of(size), _bar(size, available))
    table.add_section()
    table.add_row("needed", size_of(total), "")
    free = result["parts_gib"]["free"]
    word = Text("fits", "green") if result["fits"] else Text("does not fit", "red")
    table.add_row("free" if free >= 0 else "missing", size_of(abs(free)), word)
    table.add_row("there is", size_of(available), "")
    return table


def _bar(part: float, whole: float, width: int = 30) -> str:
    return "█" * round(width * min(1.0, max(0.0, part / whole)))


def _work(result: dict[str, Any]) -> Table:
    table = _table("work", "a step")
    counted, in_hlo = result["flops_per_token"], result["flops_per_token_hlo"]
    names = {"attention_again": "attention, again", "again": "recomputed by remat"}
    for name, value in result["flops_per_token_by_part"].items():
        if value:
            table.add_row(f"a token: {names.get(name, name)}", scaled(value, "FLOP"), "")
    table.add_row("a token, all", scaled(counted, "FLOP"), "from the config")
    ratio = f"{in_hlo / counted:.3f} of that"
    table.add_row("a token, as compiled", scaled(in_hlo, "FLOP"), ratio)
    table.add_section()
    sent = result["collective_bytes"]
    for kind, size in sorted(sent.items(), key=lambda item: -item[1]):
        table.add_row(f"a chip sends: {kind}", size_of(size / GIB), "")
    for kind, size in result["collective_bytes_between_slices"].items():
        table.add_row(f"a chip sends: {kind}", size_of(size / GIB), "between slices")
    table.add_row("through a chip's memory", size_of(result["hbm_bytes"] / GIB), "")
    return table


def _time(result: dict[str, Any]) -> Table:
    table = _table("time", "at least")
    names = {"compute": "products", "hbm": "memory", "ici": "between chips", "dcn": "slices"}
    for name, seconds in result["floor_seconds"].items():
        if seconds or name in ("compute", "hbm"):
            bound = "sets the pace" if name == result["bound_by"] else ""
            table.add_row(f"{names[name]}, a step", scaled(seconds, "s"), bound)
    table.add_section()
    tokens = f"{result['tokens_per_step']:,} a step"
    table.add_row("tokens/s, at most", f"{result['tokens_per_second_at_most']:,.0f}", tokens)
    table.add_row(
        "million tokens a day, at most", f"{result['tokens_per_day_at_most'] / 1e6:,.0f}", ""
    )
    table.add_row("MFU, at most", f"{result['mfu_at_most']:.0%}", "useful products of the peak")
    if result["hours_at_least"] is None:
        seconds, note = result["hours_per_1000_steps_at_least"] * 3600, "for 1,000 steps"
    else:
        most = "at most " if result["steps_are_at_most"] else ""
        seconds, note = result["hours_at_least"] * 3600, f"for {most}{result['steps']:,} steps"
    table.add_row("the run", duration(seconds), note)
    if "cost_at_least" in result:
        cost = result["cost_at_least"]
        table.add_row("cost", f"{cost:,.2f}" if cost >= 0.01 else f"{cost:.2g}", note)
    return table


def duration(seconds: float) -> str:
    """Of seconds, in hours from one on, in minutes or seconds below."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return scaled(seconds, "s")


def _table(title: str, unit: str) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False, title_justify="left")
    table.add_column(title, min_width=36, header_style="bold cyan", no_wrap=True)
    table.add_column(unit, justify="right", min_width=9, header_style="dim", no_wrap=True)
    table.add_column("", min_width=31, no_wrap=True)
    return table
