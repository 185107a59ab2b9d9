"""`movieq models`: the model table and the weights on this machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click
import msgspec

from movieq.cli.context import read_settings, refuse
from movieq.errors import ModelUnavailable
from movieq.models import table as models
from movieq.models import weights

if TYPE_CHECKING:
    pass


@click.group("models")
def models_group() -> None:
    """List, check and download models."""


@models_group.command("list")
def models_list() -> None:
    """List the models, what they render, and whether their weights are on this machine."""
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "renders", "GPU memory", "licence", "on this machine", box=None, pad_edge=False)
    for name, model in models.load(read_settings().models).items():
        makes = ", ".join(model.tasks) + (f" ({', '.join(model.languages)})" if model.languages else "")
        memory = f"{model.gpu_memory_gb:g} GB" if model.gpu_memory_gb else "-"
        sources = weights.sources(model)
        here = "no" if any(map(_missing, sources)) else "yes" if model.verified or not sources else "yes, not yet tried on a GPU"
        table.add_row(name, makes, memory, model.licence or "-", here)
    Console().print(table)


@models_group.command("show")
@click.argument("name")
def models_show(name: str) -> None:
    """Show a model's entry, and where its weights are."""
    model = _named_model(name)
    click.echo(msgspec.json.format(msgspec.json.encode(model)).decode())
    for source in weights.sources(model):
        click.echo(_missing(source) or f"{source.repository}: {weights.find(source)}")


@models_group.command("check")
@click.argument("names", nargs=-1)
def models_check(names: tuple[str, ...]) -> None:
    """Check whether models can be loaded on this machine, and list what is missing. Without NAMES, check all."""
    problems = 0
    for name in names or models.load(read_settings().models):
        found = [problem for source in weights.sources(_named_model(name)) if (problem := _missing(source))]
        problems += len(found)
        takes = f", needs {_named_model(name).gpu_memory_gb:g} GB of GPU memory" if _named_model(name).gpu_memory_gb else ""
        click.echo(f"{name}: {'; '.join(found) or f'ok{takes}'}")
    if problems and names:
        sys.exit(1)


@models_group.command("pull")
@click.argument("names", nargs=-1, required=True)
def models_pull(names: tuple[str, ...]) -> None:
    """Download models from the hub and verify every file; an interrupted download continues. Honours HF_TOKEN, HF_HOME and HF_ENDPOINT."""
    for name in names:
        model = _named_model(name)
        if model.licence:
            click.echo(f"{name}: licence {model.licence}", err=True)
        try:
            total = sum(weights.pull(source) for source in weights.sources(model))
        except ImportError:
            refuse("huggingface_hub is not installed: pip install 'movieq[gpu]'")
        except ModelUnavailable as error:
            refuse(error.message)
        click.echo(f"{name}: {total / 1e9:.1f} GB, checked")


def _named_model(name: str) -> models.Model:
    table = models.load(read_settings().models)
    if name not in table:
        refuse(f"unknown model {name!r}; known models: {', '.join(table)}")
    return table[name]


def _missing(source: models.Weights) -> str | None:
    """Return why the weights cannot be loaded on this machine; None where they can."""
    try:
        weights.find(source)
    except ModelUnavailable as error:
        return error.message
    except ImportError:
        return "huggingface_hub is not installed: pip install 'movieq[gpu]'"
    return None
