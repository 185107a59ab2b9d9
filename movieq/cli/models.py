"""`movieq models`: the model table and the weights on this machine."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import msgspec

from movieq import gpus, logs
from movieq.cli.context import read_settings, refuse, run_async
from movieq.errors import ModelUnavailable
from movieq.models import speed, weights
from movieq.models import table as models
from movieq.models.speed import Measured
from movieq.models.table import Lora, LoraFile, Model, Weights
from movieq.settings import LogFormat, LogLevel

NO_HUB = "huggingface_hub is not installed: pip install 'movieq[gpu]'"


class _Source(NamedTuple):
    """Files of a model or LoRA that come from one place."""

    repository: str
    find: Callable[[], Path]
    pull: Callable[[], int]

    @property
    def problem(self) -> str | None:
        """Why they cannot be loaded on this machine; None where they can."""
        try:
            self.find()
        except ModelUnavailable as error:
            return error.message
        except ImportError:
            return NO_HUB
        return None


@click.group("models")
def models_group() -> None:
    """List, check and download models and LoRAs."""


@models_group.command("list")
def models_list() -> None:
    """List the models and LoRAs, what they render, and whether their weights are on this machine."""
    from rich.console import Console
    from rich.table import Table

    console, entries = Console(), _entries()
    table = Table("model", "renders", "GPU memory", "licence", "on this machine", box=None, pad_edge=False)
    loras = Table("LoRA", "models", "projects", "licence", "on this machine", box=None, pad_edge=False)
    for name, entry in entries.items():
        sources = _sources(entry)
        here = "no" if any(each.problem for each in sources) else "yes"
        if isinstance(entry, Lora):
            loras.add_row(name, ", ".join(entry.bases), ", ".join(entry.projects) or "all", entry.licence or "-", here)
            continue
        makes = ", ".join(entry.tasks) + (f" ({', '.join(entry.languages)})" if entry.languages else "")
        memory = f"{entry.gpu_memory_gb:g} GB" if entry.gpu_memory_gb else "-"
        tried = entry.verified or not sources or here == "no"
        table.add_row(name, makes, memory, entry.licence or "-", here if tried else "yes, not yet tried on a GPU")
    console.print(table)
    if loras.row_count:
        console.print()
        console.print(loras)


@models_group.command("show")
@click.argument("name")
def models_show(name: str) -> None:
    """Show the entry of a model or LoRA, and where its weights are."""
    entry = _named(name)
    click.echo(msgspec.json.format(msgspec.json.encode(entry)).decode())
    for source in _sources(entry):
        click.echo(source.problem or f"{source.repository}: {source.find()}")


@models_group.command("check")
@click.argument("names", nargs=-1)
def models_check(names: tuple[str, ...]) -> None:
    """Check whether models and LoRAs can be loaded on this machine, and list what is missing. Without NAMES, check all."""
    problems = 0
    for name in names or _entries():
        entry = _named(name)
        found = [problem for source in _sources(entry) if (problem := source.problem)]
        problems += len(found)
        takes = f", needs {entry.gpu_memory_gb:g} GB of GPU memory" if isinstance(entry, Model) and entry.gpu_memory_gb else ""
        click.echo(f"{name}: {'; '.join(found) or f'ok{takes}'}")
    if problems and names:
        sys.exit(1)


@models_group.command("pull")
@click.argument("names", nargs=-1, required=True)
def models_pull(names: tuple[str, ...]) -> None:
    """Download models and LoRAs from the hub and verify every file; an interrupted download continues.

    Honours HF_TOKEN, HF_HOME and HF_ENDPOINT.
    """
    for name in names:
        entry = _named(name)
        if entry.licence:
            forbids = entry.forbids if isinstance(entry, Model) else []
            click.echo(f"{name}: licence {entry.licence}{', which forbids:' if forbids else ''}", err=True)
            for each in forbids:
                click.echo(f"  - {each}", err=True)
        try:
            total = sum(source.pull() for source in _sources(entry))
        except ImportError:
            refuse(NO_HUB)
        except ModelUnavailable as error:
            refuse(error.message)
        click.echo(f"{name}: {total / 1e9:.1f} GB, checked")


@models_group.command("bench")
@click.argument("name")
@click.option("--device", default="auto", show_default=True, help="cpu, or a GPU such as cuda:1; auto takes the first GPU, else the CPU.")
@click.option("--write/--no-write", default=True, show_default=True, help="Whether the workers of this machine use what was fastest.")
def models_bench(name: str, device: str, write: bool) -> None:
    """Measure how fast a model renders on this machine: with each attention kernel, compiled, and with skipped steps.

    Writes the fastest way that changes results by rounding alone beside the weights. Workers use it when they load the model next, on the
    same GPU with the same versions of torch and diffusers, unless the entry of the model says otherwise.
    """
    entry = _named(name)
    if isinstance(entry, Lora):
        refuse(f"{name} is a LoRA: name a model")
    logs.configure(LogLevel.WARNING, LogFormat.AUTO)  # ways that do not work here are no errors
    run_async(lambda: _bench(name, entry, device, write=write))


async def _bench(name: str, entry: Model, device: str, *, write: bool) -> None:
    from workers import model_bench  # loads numpy

    found = next(iter(gpus.devices(device)), None)
    form = "{:32} {:>10} {:>10} {:>10} {:>8}  {}"
    header = form.format("way", "first s", "task s", "step s", "PSNR", "").rstrip()
    with tempfile.TemporaryDirectory() as folder:
        async for each in model_bench.measure(name, entry, found, Path(folder)):
            if header:
                click.echo(header)
                header = ""
            if isinstance(each, Measured):
                if write:
                    speed.write(entry, each)
                way = f"attention {each.speed.attention}, {'' if each.speed.compile else 'not '}compiled"
                click.echo(f"fastest without loss on {each.device}: {way}{'' if write else ' (not written)'}")
            elif each.problem:
                click.echo(form.format(each.way.name, "-", "-", "-", "-", " ".join(each.problem.split())[:200]))
            else:
                loss = "" if each.way.exact else "changes the result"
                click.echo(form.format(each.way.name, *(f"{value:.3g}" for value in each[1:5]), loss))


def _entries() -> dict[str, Model | Lora]:
    """Return the models, then the LoRAs, by name."""
    table = models.load(read_settings().models)
    return {**table, **{name: lora for model in table.values() for name, lora in model.loras.items()}}


def _named(name: str) -> Model | Lora:
    entries = _entries()
    if name not in entries:
        refuse(f"unknown model or LoRA {name!r}; known: {', '.join(entries)}")
    return entries[name]


def _sources(entry: Model | Lora) -> list[_Source]:
    if isinstance(entry, Lora):
        return [_of_file(each) for each in weights.lora_files(entry)]
    always = [file for each in entry.with_loras for file in weights.lora_files(entry.loras[each.name])]
    return [*(_of_weights(each) for each in weights.sources(entry)), *(_of_file(each) for each in always)]


def _of_weights(source: Weights) -> _Source:
    return _Source(source.repository, lambda: weights.find(source), lambda: weights.pull(source))


def _of_file(source: LoraFile) -> _Source:
    return _Source(source.repository, lambda: weights.find_file(source), lambda: weights.pull_file(source))
