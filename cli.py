"""The ``mer`` command: parse, call a pipeline, print.

stdout carries results (a table, or with ``--json`` exactly one JSON object on the last line);
progress and messages go to stderr. Nothing heavy is imported before a command runs, so that every
``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from mer import __version__
from mer.cache.errors import MerError

if TYPE_CHECKING:
    from mer.cache.store import Cache
    from mer.extract.inputs import Failure

INTERRUPTED = 130
CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}
FAILURES_SHOWN = 20


class Mer(click.Group):
    """The command group; turns errors into one line and the documented exit code."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run, and exit with the command's code."""
        argv = list(kwargs.get("args") or (args[0] if args and args[0] else None) or sys.argv[1:])
        as_json = "--json" in argv
        code = 0
        try:
            code = super().main(args=argv, prog_name="mer", standalone_mode=False) or 0
        except click.exceptions.Exit as exit_:
            code = exit_.exit_code
        except click.ClickException as error:
            error.show(file=sys.stderr)
            code = _fail(as_json, "UsageError", error.format_message(), 2, shown=True)
        except MerError as error:
            notes = " ".join(getattr(error, "__notes__", ()))
            code = _fail(as_json, type(error).__name__, f"{error} {notes}".strip(), error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            message = "interrupted. What was finished is kept; the same command goes on from there."
            code = _fail(as_json, "Interrupted", message, INTERRUPTED)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except Exception as error:
            if os.environ.get("MER_TRACEBACK"):
                raise
            message = f"unexpected {type(error).__name__}: {error} (MER_TRACEBACK=1 shows where)"
            code = _fail(as_json, type(error).__name__, message, 1)
        sys.exit(code)


def _fail(as_json: bool, kind: str, message: str, code: int, *, shown: bool = False) -> int:
    if not shown:
        click.echo(f"mer: {message}", err=True)
    if as_json:
        with suppress(BrokenPipeError):
            click.echo(json.dumps({"error": {"type": kind, "message": message, "exit_code": code}}))
    return code


def _terminate(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


@click.group(cls=Mer, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="mer")
@click.option("-v", "--verbose", is_flag=True, help="Show informational messages, too.")
def main(verbose: bool) -> None:
    """Emotion recognition from speech: embeddings computed once, heads trained in seconds."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="mer: %(message)s",
        stream=sys.stderr,
    )
    signal.signal(signal.SIGTERM, _terminate)
    # A plan of 100,000 utterances is a million objects that live to its end: looking for garbage
    # among them at Python's pace takes a third of the time.
    gc.set_threshold(200_000, 50, 100)


# -- shared options and output ---------------------------------------------------------------------

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
cache_option = click.option(
    "--cache",
    "cache_url",
    metavar="URL",
    help="Folder of the cache.  [default: $MER_CACHE, else the user's cache directory]",
)


def _device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Refuse what torch would refuse much later, and in other words."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is None:
        raise click.BadParameter(f"{value!r}: expected auto, cpu, cuda or cuda:N.")
    return value


device_option = click.option(
    "--device", default="auto", callback=_device, metavar="auto|cpu|cuda", help="Where models run."
)
workers_option = click.option(
    "--workers",
    type=click.IntRange(1, 64),
    default=min(4, os.cpu_count() or 1),
    help="Threads that decode recordings.",
)
root_option = click.option(
    "--root",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the corpus as distributed.",
)


def _cache(url: str | None) -> Cache:
    from mer.cache.store import Cache

    return Cache.from_url(url)


def _emit(result: dict[str, Any], as_json: bool, text: Callable[[], str]) -> None:
    click.echo(json.dumps(result) if as_json else text())


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Render left-aligned columns, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _show_failures(failures: Sequence[Failure]) -> None:
    for failure in failures[:FAILURES_SHOWN]:
        where = f" [{failure.feature}]" if failure.feature else ""
        click.echo(f"failed: {failure.utterance}{where}: {failure.reason}", err=True)
    if len(failures) > FAILURES_SHOWN:
        more = len(failures) - FAILURES_SHOWN
        click.echo(f"failed: … and {more} more (--json lists all)", err=True)


@contextmanager
def _display() -> Iterator[Any | None]:
    """Yield the one live display on stderr, or None where that is no terminal.

    Its tasks carry a ``note``, shown beside the bar.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as show:
        yield show


class _Bar:
    """Progress of an extraction: recordings read; then utterances/s, × real time, time left."""

    def __init__(self, show: Any) -> None:
        self._show = show
        self._reading: Any = None
        self._task: Any = None
        self._done = self._of = self._read = 0

    def hashed(self, count: int) -> None:
        """Count recordings read while planning."""
        if self._reading is None:
            self._reading = self._show.add_task("reading recordings", total=None, note="")
        self._read += count
        self._show.update(self._reading, note=f"{self._read:,}")

    def start(self, utterances: int, seconds: float) -> None:
        """Begin a bar over ``seconds`` of input."""
        if self._reading is not None:
            self._show.remove_task(self._reading)
        self._of = utterances
        self._task = self._show.add_task("extract", total=max(seconds, 1e-9), note="")

    def advance(self, utterances: int, seconds: float) -> None:
        """Move the bar on."""
        self._show.advance(self._task, seconds)
        (task,) = (task for task in self._show.tasks if task.id == self._task)
        self._done += utterances
        elapsed = max(task.elapsed or 0.0, 1e-9)
        rate, speed = self._done / elapsed, task.completed / elapsed
        note = f"{self._done:,}/{self._of:,}  {rate:.1f}/s  {speed:.1f}× real time"
        self._show.update(self._task, note=note)


@contextmanager
def _extraction_bar() -> Iterator[_Bar | None]:
    """Yield a bar where stderr is a terminal, else None."""
    with _display() as show:
        yield None if show is None else _Bar(show)


# -- extract ---------------------------------------------------------------------------------------


@main.command(
    epilog="""\b
Examples:
  mer extract ravdess --root RAVDESS -f crepe:model=tiny -f logmel -f egemaps
  mer extract my.csv -f wavlm-large:layers=all -f roberta-large --cache /data/mer
"""
)
@click.argument("dataset")
@root_option
@click.option("-f", "--feature", "features", multiple=True, help="Feature to compute; repeatable.")
@click.option(
    "--recipe",
    "recipe_names",
    multiple=True,
    metavar="RECIPE",
    help="Compute what this recipe needs; repeatable.",
)
@cache_option
@device_option
@click.option(
    "--batch-seconds",
    type=click.FloatRange(min=0.1),
    metavar="S",
    help="Padded seconds of input per forward pass.  [default: 8 on CPU, 480 on CUDA]",
)
@workers_option
@click.option("--dry-run", is_flag=True, help="Only say what is missing.")
@click.option(
    "--verify",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Compute N random stored utterances again, alone, and print the largest difference.",
)
@json_option
def extract(
    dataset: str,
    root: Path | None,
    features: tuple[str, ...],
    recipe_names: tuple[str, ...],
    cache_url: str | None,
    device: str,
    batch_seconds: float | None,
    workers: int,
    dry_run: bool,
    verify: int,
    as_json: bool,
) -> int:
    """Bring every missing feature of DATASET into the cache.

    DATASET is a corpus name (`mer corpora ls`) or a manifest: .csv, .parquet or .jsonl.
    """
    from mer.pipelines import corpora
    from mer.pipelines.extraction import extract as run_extraction
    from mer.pipelines.recipe import load_recipe

    wanted = list(features)
    for name in recipe_names:
        wanted += load_recipe(name).feature_strings()
    if not wanted:
        raise click.UsageError("Name at least one feature (-f) or a --recipe.")
    cache = _cache(cache_url)
    manifest = corpora.load(dataset, root)
    with _extraction_bar() as bar:
        result = run_extraction(
            manifest,
            wanted,
            cache,
            device=device,
            batch_seconds=batch_seconds,
            workers=workers,
            dry_run=dry_run,
            verify=verify,
            hashing=bar.hashed if bar else None,
            progress=bar,
        )
    _show_failures(result.report.failures)

    def text() -> str:
        report = result.report
        lines = [
            f"{report.utterances} utterances, {report.hours:.3f} h: "
            f"computed {report.computed}, reused {report.reused}, failed {report.failed} "
            f"(utterances × features) in {report.seconds:.1f} s"
        ]
        lines += [f"missing  {name}: {count}" for name, count in (result.missing or {}).items()]
        lines += [
            f"verified {name}: largest difference {worst:.1e}"
            for name, worst in result.verified.items()
        ]
        if result.stores:
            rows = [
                [name, f"{store['frames']:,}", _megabytes(store["bytes"]), store["path"]]
                for name, store in result.stores.items()
            ]
            lines += ["", _table(["feature", "frames", "size", "store"], rows)]
        return "\n".join(lines)

    _emit(result.to_json(), as_json, text)
    return result.exit_code


# -- train-head, ensemble-vote, demo ---------------------------------------------------------------


def _integers(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """Turn ``1,2,3`` into a list; None and, for folds, ``all`` stay."""
    if value is None or (value == "all" and param.name == "folds"):
        return value
    try:
        return [int(piece) for piece in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected {param.metavar}.") from None


@contextmanager
def _training_bar() -> Iterator[Callable[[Mapping[str, Any]], None] | None]:
    """Yield a hook that shows folds × seeds × epochs where stderr is a terminal, else None."""
    with _display() as show:
        if show is None:
            yield None
            return
        task = show.add_task("train", total=None, note="")

        def report(epoch: Mapping[str, Any]) -> None:
            show.update(
                task,
                total=epoch["trainings"] * epoch["epochs"],
                completed=(epoch["training"] - 1) * epoch["epochs"] + epoch["epoch"],
                note=f"{epoch['training']}/{epoch['trainings']}: "
                f"fold {epoch['fold']}, seed {epoch['seed']}",
            )

        yield report


@main.command(
    "train-head",
    epilog="""\b
Examples:
  mer train-head mdat-ravdess --root RAVDESS --extract
  mer train-head simple --dataset my.csv --set features.speech=wavlm-large --seeds 1,2,3
""",
)
@click.argument("recipe")
@click.option("--dataset", help="Corpus name or manifest, in place of the recipe's.")
@root_option
@cache_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the run, absent or empty.  [default: a new one under runs/]",
)
@click.option("--set", "overrides", multiple=True, metavar="K=V", help="Override a recipe's key.")
@click.option(
    "--seeds", callback=_integers, metavar="1,2,3", help="Seeds, in place of the recipe's."
)
@click.option("--folds", callback=_integers, metavar="all|1,2", help="Folds to run.")
@click.option("--extract", "bring", is_flag=True, help="First bring missing features.")
@device_option
@workers_option
@json_option
def train_head(
    recipe: str,
    dataset: str | None,
    root: Path | None,
    cache_url: str | None,
    out: Path | None,
    overrides: tuple[str, ...],
    seeds: list[int] | None,
    folds: list[int] | Literal["all"] | None,
    bring: bool,
    device: str,
    workers: int,
    as_json: bool,
) -> int:
    """Train and evaluate the head of RECIPE by its protocol, from the cache.

    RECIPE is a shipped name (`mer recipes ls`) or the path of a YAML file.
    """
    from mer.pipelines.experiment import check_recipe, run_recipe
    from mer.pipelines.recipe import load_recipe

    opened = _cache(cache_url)
    loaded = load_recipe(recipe, overrides).with_run_options(
        dataset=dataset, root=str(root) if root else None, seeds=seeds, folds=folds
    )
    brought = None
    if bring:
        from mer.pipelines.extraction import extract as run_extraction

        planned = check_recipe(loaded, out)  # before hours of extraction, not after them
        with _extraction_bar() as bar:
            brought = run_extraction(
                planned.manifest,
                loaded.feature_strings(),
                opened,
                device=device,
                workers=workers,
                hashing=bar.hashed if bar else None,
                progress=bar,
            )
        _show_failures(brought.report.failures)
    with _training_bar() as progress:
        result = run_recipe(loaded, cache=opened, out=out, device=device, progress=progress)

    def text() -> str:
        return f"{result.table()}\n\nrun: {result.run} ({result.seconds:.1f} s)"

    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    found = result.to_json()
    if brought is not None:
        found["extract"] = brought.to_json()
    _emit(found, as_json, text)
    return 3 if brought is not None and brought.report.failures else 0


@main.command(
    "ensemble-vote",
    epilog="""\b
Examples:
  mer ensemble-vote runs/a runs/b runs/c
  mer ensemble-vote runs/* --method soft --out runs/vote
""",
)
@click.argument(
    "runs", nargs=-1, required=True, metavar="RUN RUN...", type=click.Path(path_type=Path)
)
@click.option(
    "--method",
    default="majority",
    metavar="majority|soft|weighted",
    help="Most labels (a tie goes to the best member by validation macro-F1), mean of the "
    "probabilities, or their mean weighted by validation macro-F1.",
)
@click.option(
    "--members",
    type=click.Choice(["runs", "seeds"]),
    default="runs",
    help="Whether a run votes once (the mean of its seeds) or once per seed.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the vote, absent or empty.  [default: a new one under runs/]",
)
@json_option
def ensemble_vote(
    runs: tuple[Path, ...],
    method: str,
    members: Literal["runs", "seeds"],
    out: Path | None,
    as_json: bool,
) -> int:
    """Join the predictions of several runs by utterance and vote.

    Runs must share utterances, split and label set.
    """
    from mer.pipelines.voting import ensemble_vote as vote

    result = vote(runs, method=method, members=members, out=out)
    _emit(result.to_json(), as_json, lambda: f"{result.table()}\n\nvote: {result.run}")
    return 0


@main.command(epilog="\b\nExample:\n  mer demo --out demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    metavar="DIR",
    help="Folder for the corpus, the cache and the runs.",
)
@device_option
@json_option
def demo(out: Path, device: str, as_json: bool) -> int:
    """Synthesise a small corpus, then extract, train and vote on it, as on a real one."""
    from mer.pipelines.demo import run_demo

    def say(message: str) -> None:
        click.echo(message, err=True)

    with _extraction_bar() as bar:
        result = run_demo(out, device=device, say=say, progress=bar)
    _emit(result.to_json(), as_json, result.to_text)
    return 3 if result.extraction.report.failures else 0


# -- cache -----------------------------------------------------------------------------------------


@main.group()
def cache() -> None:
    """Look at the embedding cache."""


@cache.command(
    "ls", epilog="\b\nExamples:\n  mer cache ls\n  mer cache ls --cache /data/mer --json"
)
@cache_option
@json_option
def cache_ls(cache_url: str | None, as_json: bool) -> int:
    """List the stores of the cache."""
    opened = _cache(cache_url)
    infos = [store.info() for store in opened.stores()]
    stores = [
        {
            "name": info.name,
            "utterances": info.utterances,
            "outputs": list(info.outputs),
            "bytes": info.bytes,
            "parts": info.parts,
        }
        for info in infos
    ]
    damaged = [{"store": i.name, "reason": reason} for i in infos for reason in i.damage]
    result = {"cache": str(opened.root), "stores": stores, "damaged": damaged}

    def text() -> str:
        if not stores:
            return f"No stores in {opened.root}. `mer extract` makes them."
        rows = [
            [i.name, i.utterances, i.parts, _megabytes(i.bytes), " ".join(i.outputs)] for i in infos
        ]
        return _table(["store", "utterances", "parts", "size", "outputs"], rows)

    _emit(result, as_json, text)
    for item in damaged:
        click.echo(f"damaged: {item['store']}: {item['reason']}", err=True)
    return 4 if damaged else 0


@cache.command("info", epilog="\b\nExample:\n  mer cache info logmel-3f9c2a")
@click.argument("store")
@cache_option
@json_option
def cache_info(store: str, cache_url: str | None, as_json: bool) -> int:
    """Show everything a STORE knows of itself: identity, outputs, size, licence.

    STORE is a name from `mer cache ls` or a prefix of one.
    """
    from mer.cache.errors import UnknownNameError, UsageError

    stores = _cache(cache_url).stores()
    matches = [s for s in stores if s.name == store] or [
        s for s in stores if s.name.startswith(store)
    ]
    if not matches:
        raise UnknownNameError("store", store, (s.name for s in stores), "mer cache ls")
    if len(matches) > 1:
        raise UsageError(
            f"{store!r} fits {len(matches)} stores: {', '.join(s.name for s in matches)}."
        )
    info = matches[0].info()
    result = dataclasses.asdict(info)

    def text() -> str:
        rows = [
            [name, o.kind, o.dim, o.rate_hz or "-", o.frames, " ".join(o.dtypes)]
            for name, o in info.outputs.items()
        ]
        return "\n".join(
            [
                info.path,
                f"{info.utterances} utterances in {info.parts} parts, {_megabytes(info.bytes)}",
                f"made {info.created}; licence: {info.licence or 'not stated'}",
                "",
                _table(["output", "kind", "dim", "Hz", "frames", "stored as"], rows),
                "",
                json.dumps(info.identity, indent=2, sort_keys=True),
            ]
        )

    _emit(result, as_json, text)
    for reason in info.damage:
        click.echo(f"damaged: {reason}", err=True)
    return 4 if info.damage else 0


# -- what is there ---------------------------------------------------------------------------------


@main.group()
def extractors() -> None:
    """Look at the extractors."""


@extractors.command("ls", epilog="\b\nExample:\n  mer extractors ls --json")
@json_option
def extractors_ls(as_json: bool) -> int:
    """List the features that `mer extract -f` knows."""
    from mer.extract.registry import EXTRACTORS, names

    rows = []
    for name in names():
        target, preset = EXTRACTORS.get(name, ("a third party's", {}))
        rows.append({"name": name, "family": target.split(":")[-1], "model": preset.get("model")})

    def text() -> str:
        return _table(
            ["feature", "family", "model"],
            [[r["name"], r["family"], r["model"] or "model=PATH_OR_HUB_ID or none"] for r in rows],
        )

    _emit({"extractors": rows}, as_json, text)
    return 0


@main.group()
def heads() -> None:
    """Look at the heads."""


@heads.command("ls", epilog="\b\nExample:\n  mer heads ls --json")
@json_option
def heads_ls(as_json: bool) -> int:
    """List the heads that recipes can train."""
    from mer.heads.registry import names, resolve

    rows: list[dict[str, Any]] = []
    for name in names():
        head = resolve(name)
        streams = {s: spec.kind + "?" * spec.optional for s, spec in head.inputs.items()}
        summary = (head.__doc__ or "").strip().splitlines()[0]
        rows.append({"name": name, "streams": streams, "summary": summary})

    def text() -> str:
        cells = [
            [
                r["name"],
                ", ".join(f"{s}: {k}" for s, k in r["streams"].items()) or "any",
                r["summary"],
            ]
            for r in rows
        ]
        return _table(["head", "streams (? optional)", "what"], cells)

    _emit({"heads": rows}, as_json, text)
    return 0


@main.group()
def recipes() -> None:
    """Look at the recipes that ship with mer."""


@recipes.command("ls", epilog="\b\nExample:\n  mer recipes ls")
@json_option
def recipes_ls(as_json: bool) -> int:
    """List the shipped recipes."""
    from mer.pipelines.recipe import describe, load_recipe, names

    rows = []
    for name in names():
        recipe = load_recipe(name)
        features = list(recipe.feature_strings())
        row = {"name": name, "head": recipe.head.name, "features": features}
        rows.append({**row, "summary": describe(name)})
    _emit(
        {"recipes": rows},
        as_json,
        lambda: _table(
            ["recipe", "head", "what"], [[r["name"], r["head"], r["summary"]] for r in rows]
        ),
    )
    return 0


@recipes.command("show", epilog="\b\nExample:\n  mer recipes show mdat-ravdess")
@click.argument("recipe")
@json_option
def recipes_show(recipe: str, as_json: bool) -> int:
    """Print RECIPE (a shipped name or a YAML path) with everything it includes resolved."""
    from mer.pipelines.recipe import dump, load_recipe

    text = dump(load_recipe(recipe))
    _emit({"recipe": recipe, "yaml": text}, as_json, lambda: text.rstrip())
    return 0


@main.group("corpora")
def corpora_group() -> None:
    """Look at the corpora."""


@corpora_group.command("ls", epilog="\b\nExample:\n  mer corpora ls")
@json_option
def corpora_ls(as_json: bool) -> int:
    """List the corpora that mer reads as distributed."""
    from mer.pipelines import corpora

    rows = corpora.describe()

    def text() -> str:
        cells = [
            [r["name"], r["utterances"] or "-", r["labels"], r["protocol"], r["summary"]]
            for r in rows
        ]
        return _table(["corpus", "utterances", "labels", "protocol", "what"], cells)

    _emit({"corpora": rows}, as_json, text)
    return 0


@corpora_group.command(
    "check",
    epilog="\b\nExamples:\n  mer corpora check ravdess --root RAVDESS\n  mer corpora check my.csv",
)
@click.argument("dataset")
@root_option
@workers_option
@json_option
def corpora_check(dataset: str, root: Path | None, workers: int, as_json: bool) -> int:
    """Check DATASET against its published counts, and every recording of it.

    Exits with 3 where recordings are missing or unreadable.
    """
    from mer.pipelines.corpora.check import check

    with _display() as show:
        task = show.add_task("checking", total=None, note="") if show else None
        progress = (lambda count: show.advance(task, count)) if show else None
        report = check(dataset, root, workers=workers, progress=progress)
    _emit(report.to_json(), as_json, report.to_text)
    return report.exit_code


if __name__ == "__main__":
    main()
