"""`list`, `init`, `doctor`: what there is, and whether this machine can do it."""

import inspect
import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from retain.cli.console import out, print_json, say
from retain.errors import ConfigError

__all__ = ["add"]

RECIPE = """\
# retain train {name}
model: smollm2-135m
method: {{name: lora, r: 16, alpha: 32}}
strategy: [{{name: replay, ratio: 0.1}}, {{name: ewc, strength: 1.0}}]
protect_base: self            # rows that the base model writes stand for its own abilities; a FILE, or off
tasks:                        # learned in this order
  - {{name: first, train: first.train.jsonl, test: first.test.jsonl}}
  - {{name: second, train: second.train.jsonl}}   # without a test file, a part of train is kept for it
train: {{learning_rate: 2.0e-4, num_train_epochs: 1, max_length: 512, seed: 0}}
budget: {{forgetting: 0.05}}    # a stage that may have lost more is not committed
output_dir: runs/first
"""


def add(app: typer.Typer) -> None:
    """Give the application these commands."""
    app.command("list")(show)
    app.command("init")(init)
    app.command("doctor")(doctor)


def known() -> dict[str, Mapping[str, Any]]:
    """Everything that a recipe can name, by kind."""
    from retain.data.formats import FORMATS
    from retain.evaluation.scoring import METRICS
    from retain.methods import METHODS
    from retain.models import FAMILIES
    from retain.models.hub import MODELS
    from retain.strategies import STRATEGIES

    return {
        "models": MODELS, "families": FAMILIES, "methods": METHODS, "strategies": STRATEGIES,
        "metrics": METRICS, "formats": FORMATS,
    }  # fmt: skip


def summary(value: Any) -> str:
    """What something is, in a line."""
    from retain.data.formats import Format
    from retain.evaluation.scoring import Metric
    from retain.models.hub import OfflineModel

    match value:
        case OfflineModel():
            return f"{value.hub_id} ({value.licence})"
        case Format():
            return value.about
        case Metric():
            return f"answered by {value.needs}"
        case _:
            return inspect.cleandoc(value.__doc__ or "").partition("\n")[0]


def spelled(kind: Any) -> str:
    """A type as a recipe's author thinks of it."""
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def settings(kind: Any) -> list[dict[str, Any]]:
    """A choice's fields: name, type, default, and what the docstring says of it."""
    if not isinstance(kind, type) or not is_dataclass(kind):
        return []
    meanings = arguments(kind.__doc__ or "")
    found: list[dict[str, Any]] = []
    for one in fields(kind):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        found.append({
            "name": one.name, "type": spelled(one.type), "required": default is MISSING,
            "default": None if default is MISSING else default, "meaning": meanings.get(one.name, ""),
        })  # fmt: skip
    return found


def arguments(doc: str) -> dict[str, str]:
    """What the `Args:` of a docstring say of each name."""
    meanings: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.cleandoc(doc).partition("\nArgs:\n")[2].splitlines():
        if line and not line.startswith(" "):
            break
        if match := re.match(r"    (\w[\w, ]*): (.*)", line):
            names = match[1].split(", ")
            meanings |= dict.fromkeys(names, match[2])
        else:
            meanings |= {name: f"{meanings[name]} {line.strip()}".strip() for name in names}
    return meanings


def show(
    name: Annotated[str | None, typer.Argument(help="a kind (strategies) or one of them (ewc)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON on stdout")] = False,
) -> None:
    """Show models, families, methods, strategies, metrics and formats; of one, every field with its default."""
    kinds = known()
    if name is None or name in kinds:
        chosen = {name: kinds[name]} if name else kinds
        if as_json:
            print_json({
                kind: {key: {"summary": summary(value), "fields": settings(value)} for key, value in entries.items()}
                for kind, entries in chosen.items()
            })  # fmt: skip
            return
        for kind, entries in chosen.items():
            out.print(kind, style="bold")
            table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
            for key, value in entries.items():
                table.add_row(f"  {key}", summary(value))
            out.print(table)
        return
    found = [(kind, entries[name]) for kind, entries in kinds.items() if name in entries]
    if not found:
        every = sorted({key for entries in kinds.values() for key in entries} | set(kinds))
        near = get_close_matches(name, every, n=1)
        raise ConfigError(
            f"nothing is called {name!r}" + (f". Did you mean `{near[0]}`?" if near else ""),
            problems=[f"{kind}: {', '.join(entries)}" for kind, entries in kinds.items()],
            hint="`retain list` shows them all",
        )
    for kind, value in found:
        if as_json:
            print_json({"kind": kind, "name": name, "summary": summary(value), "fields": settings(value)})
        else:
            describe(kind, name, value)


def describe(kind: str, name: str, value: Any) -> None:
    """One choice with all its fields."""
    out.print(Text.assemble((name, "bold"), f" ({kind}): {summary(value)}"))
    for one in settings(value):
        default = "required" if one["required"] else f"= {one['default']}"
        out.print(Text.assemble("\n", (one["name"], "bold"), (f"  {one['type']}  {default}", "dim")))
        out.print(Padding(one["meaning"], (0, 0, 0, 4)))


def init(path: Annotated[Path, typer.Argument(help="the recipe to write")] = Path("recipe.yaml")) -> None:
    """Write a complete recipe to start from."""
    if path.exists():
        raise ConfigError(f"{path} exists already", hint="name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(RECIPE.format(name=path.name), encoding="utf-8")
    say(f"{path}: put your files in, then `retain train {path}`")


def doctor(as_json: Annotated[bool, typer.Option("--json", help="as JSON on stdout")] = False) -> None:
    """Say what this machine has, and what would stop a run."""
    import torch

    from retain import distributed
    from retain.models.cache import cache_folder
    from retain.models.hub import MODELS, available

    cache = cache_folder()
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    facts: dict[str, Any] = {"python": platform.python_version(), "machine": platform.platform()}
    for package in ("retain", "torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["device"] = str(distributed.device())
    facts["precision"] = f"auto is {distributed.resolve_precision('auto')}"
    facts["threads"] = torch.get_num_threads()
    facts["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    facts["cache"] = f"{cache} ({shutil.disk_usage(place).free / 2**30:.0f} GiB free)"
    for name, model in MODELS.items():
        facts[f"model {name}"] = "ready" if available(name) else f"missing: {model.install}"
    if as_json:
        print_json(facts)
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    for key, value in facts.items():
        table.add_row(key, str(value))
    out.print(table)
