"""The ``mer`` command: parse, call a pipeline, print.

stdout carries results (a table, or with ``--json`` exactly one JSON object on the last line);
progress and messages go to stderr. Nothing heavy is imported before a command runs, so that every
``--help`` answers at once.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from mer import __version__
from mer.cache.errors import DamagedStoreError, MerError, StoreFormatError
from mer.pipelines.tables import size, table

if TYPE_CHECKING:
    from mer.cache.home import Cache
    from mer.cache.store import Store
    from mer.extract.inputs import Failure
    from mer.pipelines.caching import DatasetKeys

INTERRUPTED = 130
CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}
FAILURES_SHOWN = 20


KEPT = "What was finished is kept; the same command goes on from there."
UNCHANGED = "Nothing was changed."
AFTER_INTERRUPT = {
    **dict.fromkeys(("extract", "cp", "import", "gc", "demo"), KEPT),
    **dict.fromkeys(("info", "ls", "du", "diff", "check", "show"), UNCHANGED),
    "export": "TARGET is there as a whole or not at all.",
    "verify": "Nothing was changed but what --repair had finished.",
    "train-head": "Nothing of the run is left; features that were extracted before it are kept.",
    "ensemble-vote": "Nothing of the vote is left.",
}
"""What is left behind where a command is interrupted, by its name."""


class Command(click.Command):
    """A command; where it is interrupted, the exception says what that means."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            stopped.add_note(AFTER_INTERRUPT[str(self.name)])
            raise


class Exporting(Command):
    """A command with a --format; its help lists them all with their options."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the formats, then the examples."""
        with formatter.section("Formats, and what --option takes for each"):
            formatter.write_dl(self.formats())
        super().format_epilog(ctx, formatter)

    def formats(self) -> list[tuple[str, str]]:
        """Return name and description of each."""
        from mer.cache.exchange import EXPORTERS

        return [
            (name, f"{known.summary}{_takes(known.takes)}") for name, known in EXPORTERS.items()
        ]


class Importing(Exporting):
    """The same for imports."""

    def formats(self) -> list[tuple[str, str]]:
        """Return name and description of each, and what all take."""
        from mer.cache.exchange import EVERY_IMPORT, IMPORTERS

        rows = [
            (name, f"{known.summary}{_takes(known.takes)}") for name, known in IMPORTERS.items()
        ]
        return [*rows, ("all of them", _takes(EVERY_IMPORT).removeprefix("; "))]


def _takes(options: Mapping[str, str]) -> str:
    return "".join(f"; {name}={value}" for name, value in options.items())


class Group(click.Group):
    """Commands under one name."""

    command_class = Command


class Mer(Group):
    """The command group; turns errors into one line and the documented exit code."""

    group_class = Group

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run, and exit with the command's code."""
        with _interrupts:
            self._main(*args, **kwargs)

    def _main(self, *args: Any, **kwargs: Any) -> NoReturn:
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
        except (KeyboardInterrupt, click.Abort) as stopped:
            left: Sequence[str] = getattr(stopped.__cause__ or stopped, "__notes__", ())
            message = " ".join(["interrupted.", *left])
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


class _Redelivery:
    """Raises a KeyboardInterrupt again that could not get out of where it was raised.

    Ctrl-C may come while Python runs a destructor or a callback of a weak reference, of which h5py
    has many: the exception would be printed there as "ignored", and the command run to its end.
    """

    def __init__(self) -> None:
        self._usual: Callable[[Any], object] = sys.unraisablehook
        self._timers: list[threading.Timer] = []
        self._busy = self._missed = False

    def __enter__(self) -> None:
        self._usual = sys.unraisablehook
        sys.unraisablehook = self._hook

    def __exit__(self, *exception: object) -> None:
        sys.unraisablehook = self._usual
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def handle(self, signum: int, frame: object) -> None:
        """Handle a signal: raise, but not from within the hook, where it would be lost as well."""
        if not self._busy:
            raise KeyboardInterrupt
        self._missed = True

    def _hook(self, unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._usual(unraisable)
            return
        self._busy = self._missed = True
        while self._missed:
            self._missed = False
            timer = threading.Timer(0.001, self._send)
            timer.daemon = True
            self._timers.append(timer)
            with suppress(RuntimeError):  # the interpreter is shutting down
                timer.start()
        self._busy = False

    def _send(self) -> None:
        main_thread = threading.main_thread().ident
        if main_thread is not None and signal.getsignal(signal.SIGTERM) == self.handle:
            signal.pthread_kill(main_thread, signal.SIGTERM)


_interrupts = _Redelivery()


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
    signal.signal(signal.SIGTERM, _interrupts.handle)
    # A plan of 100,000 utterances is a million objects that live to its end: looking for garbage
    # among them at Python's pace takes a third of the time.
    gc.set_threshold(200_000, 50, 100)


# -- shared options and output ---------------------------------------------------------------------

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
cache_option = click.option(
    "--cache",
    "cache_url",
    metavar="URL",
    help="Folder or URL of the cache.  [default: $MER_CACHE, else the user's cache directory]",
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
    from mer.cache.home import Cache

    return Cache.from_url(url)


def _emit(result: dict[str, Any], as_json: bool, text: Callable[[], str]) -> None:
    click.echo(json.dumps(result) if as_json else text())


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
                [name, f"{store['frames']:,}", size(store["bytes"]), store["path"]]
                for name, store in result.stores.items()
            ]
            lines += ["", table(["feature", "frames", "size", "store"], rows)]
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
    """Look after the embedding cache: list, check, tidy up, copy, exchange.

    STORE is a name from `mer cache ls`, the beginning of one, or the path or URL of a store
    anywhere: a folder, s3://, gs://, or https:// (reading only).
    """


stores_argument = click.argument("stores", nargs=-1, metavar="[STORE]...")
dataset_option = click.option(
    "--dataset", metavar="DATASET", help="Corpus or manifest that names the utterances."
)
key_value_option = click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Option of the format; repeatable.",
)


@contextmanager
def _counting(what: str, total: int | None, show_count: Callable[[int], str]) -> Iterator[Any]:
    """Yield a hook that counts towards ``total`` where stderr is a terminal, else None."""
    with _display() as show:
        if show is None:
            yield None
            return
        task = show.add_task(what, total=total or None, note="")
        done, lock = 0, threading.Lock()  # parts are read by several threads

        def advance(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                note = show_count(done) + (f" of {show_count(total)}" if total else "")
                show.update(task, completed=done, note=note)

        yield advance


def _keys_of(dataset: str | None, root: Path | None, opened: Cache) -> DatasetKeys | None:
    """Return the keys of the data set that names utterances, if there is one."""
    if dataset is None:
        if root is not None:
            raise click.UsageError("--root goes with --dataset.")
        return None
    from mer.pipelines.caching import dataset_keys

    with _counting("reading recordings", None, "{:,}".format) as progress:
        return dataset_keys(dataset, root, opened, progress=progress)


def _chosen(names: Sequence[str], opened: Cache) -> list[Store]:
    """Return the stores that are named, or all of the cache."""
    from mer.pipelines.caching import find_store

    if not names:
        return opened.stores()
    return list(
        {store.url: store for store in (find_store(name, opened) for name in names)}.values()
    )


@cache.command(
    "ls", epilog="\b\nExamples:\n  mer cache ls\n  mer cache ls --cache /data/mer --json"
)
@cache_option
@json_option
def cache_ls(cache_url: str | None, as_json: bool) -> int:
    """List the stores of the cache."""
    from mer.pipelines.cache_report import listing, listing_text

    result = listing(_cache(cache_url))
    _emit(result, as_json, lambda: listing_text(result))
    for item in result["damaged"]:
        click.echo(f"damaged: {item['store']}: {item['reason']}", err=True)
    return 4 if result["damaged"] else 0


@cache.command(
    "info",
    epilog="""\b
Examples:
  mer cache info logmel-3f9c2a
  mer cache info https://example.org/features/wavlm-large-final-3f9c2a7700112233
""",
)
@click.argument("store")
@cache_option
@json_option
def cache_info(store: str, cache_url: str | None, as_json: bool) -> int:
    """Show everything a STORE knows of itself: provenance, licence, fingerprint, outputs, size."""
    from mer.pipelines.cache_report import info_result, info_text
    from mer.pipelines.caching import find_store

    info = find_store(store, _cache(cache_url)).info()
    _emit(info_result(info), as_json, lambda: info_text(info))
    for reason in info.damage:
        click.echo(f"damaged: {reason}", err=True)
    return 4 if info.damage else 0


@cache.command(
    "verify",
    epilog="""\b
Examples:
  mer cache verify
  mer cache verify wavlm-large --repair --dataset ravdess --root RAVDESS
""",
)
@stores_argument
@click.option(
    "--repair",
    is_flag=True,
    help="Put right what can be; move what cannot to STORE.quarantine, so that the next "
    "`mer extract` computes exactly that again.",
)
@dataset_option
@root_option
@cache_option
@json_option
def cache_verify(
    stores: tuple[str, ...],
    repair: bool,
    dataset: str | None,
    root: Path | None,
    cache_url: str | None,
    as_json: bool,
) -> int:
    """Check every byte of some STOREs, or of all.

    Exits with 4 where anything is damaged, or was before it was repaired.
    """
    from mer.cache.verify import total_bytes, verify
    from mer.pipelines.cache_report import verify_result, verify_text

    opened = _cache(cache_url)
    if not stores and opened.is_local and not opened.root.is_dir():
        raise click.UsageError(f"There is no cache at {opened.url}. Check --cache.")
    chosen = _chosen(stores, opened)
    keys = _keys_of(dataset, root, opened)
    with _counting("verify", total_bytes(chosen), size) as progress:
        report = verify(chosen, repair=repair, progress=progress)
    result = verify_result(report, keys)
    _emit(result, as_json, lambda: verify_text(result))
    return 4 if report.corrupt else 0


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    from mer.pipelines.tables import parse_size

    return None if value is None else parse_size(value)


def _age(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    from mer.pipelines.tables import parse_age

    return None if value is None else parse_age(value)


@cache.command(
    "gc",
    epilog="""\b
Examples:
  mer cache gc
  mer cache gc --older-than 90d --extractor logmel --dry-run
  mer cache gc --unused-by my.csv --unused-by ravdess --root RAVDESS --max-size 200GB
""",
)
@click.option(
    "--older-than", callback=_age, metavar="AGE", help="Remove what is older than 30d, 12h, 1y."
)
@click.option(
    "--max-size",
    callback=_size,
    metavar="SIZE",
    help="Remove the oldest until the stores fit 50GB, 1TiB.",
)
@click.option(
    "--extractor",
    "extractors",
    multiple=True,
    metavar="NAME",
    help="Remove stores of this extractor (wildcards allowed); with another criterion, only look "
    "at them. Repeatable.",
)
@click.option(
    "--unused-by",
    "used_by",
    multiple=True,
    metavar="DATASET",
    help="Remove what none of these corpora or manifests uses; repeatable. Imported features are "
    "kept unless --store or --extractor names them.",
)
@click.option(
    "--root",
    "roots",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of a corpus in --unused-by, in their order.",
)
@click.option("--store", "stores", multiple=True, metavar="STORE", help="Look at this store only.")
@click.option("--no-compact", is_flag=True, help="Leave small parts and duplicates as they are.")
@click.option("--quarantine", is_flag=True, help="Also remove what `verify --repair` took out.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@cache_option
@json_option
def cache_gc(
    older_than: float | None,
    max_size: int | None,
    extractors: tuple[str, ...],
    used_by: tuple[str, ...],
    roots: tuple[Path, ...],
    stores: tuple[str, ...],
    no_compact: bool,
    quarantine: bool,
    dry_run: bool,
    cache_url: str | None,
    as_json: bool,
) -> int:
    """Tidy up: sweep leftovers, merge duplicates and small parts, and remove what is asked for.

    Without a criterion no utterance is removed; of several, all have to hold. It may be killed at
    any moment, and run while others read and write.
    """
    from mer.cache.collect import plan, run
    from mer.pipelines.cache_report import gc_result, gc_text
    from mer.pipelines.caching import keys_in_use, pair_roots, recomputable

    opened = _cache(cache_url)
    keep = None
    notes: tuple[str, ...] = ()
    chosen = _chosen(stores, opened) if stores else None
    if used_by:
        with _counting("reading recordings", None, "{:,}".format) as progress:
            keep = keys_in_use(pair_roots(used_by, roots), opened, progress)
        if chosen is None and not extractors:
            chosen, notes = recomputable(opened.stores())
    elif roots:
        raise click.UsageError("--root goes with --unused-by.")
    planned = plan(
        opened,
        older_than_s=older_than,
        max_bytes=max_size,
        extractors=extractors,
        keep=keep,
        stores=chosen,
        compact=not no_compact,
        quarantine=quarantine,
    )
    report = None
    if not dry_run:
        with _counting("gc", len(planned.steps), "{:,} steps".format) as progress:
            report = run(planned, (lambda step: progress(1)) if progress else None)
    result = gc_result(planned, report, notes)
    _emit(result, as_json, lambda: gc_text(result))
    return 0


@cache.command("du", epilog="\b\nExamples:\n  mer cache du\n  mer cache du logmel --json")
@stores_argument
@cache_option
@json_option
def cache_du(stores: tuple[str, ...], cache_url: str | None, as_json: bool) -> int:
    """Show what takes the space: outputs, duplicates, leftovers, quarantine."""
    from mer.cache.usage import left_behind
    from mer.pipelines.cache_report import usage_result, usage_text

    opened = _cache(cache_url)
    gone = [] if stores else left_behind(opened)
    result = usage_result(opened, [*_chosen(stores, opened), *gone])
    _emit(result, as_json, lambda: usage_text(result))
    return 0


@contextmanager
def _called(argument: str) -> Iterator[None]:
    """Let errors about a cache speak of the argument that names it here."""
    try:
        yield
    except MerError as error:
        error.args = (str(error).replace("another --cache", f"another {argument}"),)
        raise


@cache.command(
    "cp",
    epilog="""\b
Examples:
  mer cache cp wavlm-large s3://bucket/features
  mer cache cp wavlm-large /srv/www/features --web
  mer cache cp https://example.org/features/wavlm-large-final-3f9c2a7700112233 /data/mer
""",
)
@click.argument("source")
@click.argument("target")
@click.option(
    "--web",
    is_flag=True,
    help="Also list the parts of each store in a file, for readers through a web server, which "
    "lists nothing. In a bucket this is always done.",
)
@cache_option
@json_option
def cache_cp(source: str, target: str, web: bool, cache_url: str | None, as_json: bool) -> int:
    """Copy SOURCE, a store or all stores of a cache, into the cache TARGET.

    What TARGET has already is skipped, so that an interrupted copy goes on where it was. Every byte
    is checked before it becomes visible; what is damaged is left out and named, and the exit code
    is 4.
    """
    from mer.cache.store import Store
    from mer.cache.transfer import copy, write_parts_list
    from mer.pipelines.cache_report import copy_result, copy_text
    from mer.pipelines.caching import find_stores, num_bytes

    with _called("SOURCE"):
        sources = find_stores(source, _cache(cache_url))
    with _called("TARGET"):
        into = _cache(target)
    reports, damaged = [], []
    with _called("TARGET"), _counting("copy", num_bytes(sources), size) as progress:
        for store in sources:
            try:
                reports.append(copy(store, into, progress=progress))
            except (DamagedStoreError, StoreFormatError) as error:
                if len(sources) == 1:
                    raise
                damaged.append(str(error))
    for report in reports if web else ():
        write_parts_list(Store(report.store))
    result = copy_result(reports, damaged)
    _emit(result, as_json, lambda: copy_text(result))
    for reason in result["damaged"]:
        click.echo(f"damaged, not copied: {reason}", err=True)
    return 4 if result["damaged"] else 0


@cache.command(
    "export",
    cls=Exporting,
    epilog="""\b
Examples:
  mer cache export wavlm-large features.h5 --format hdf5 --dataset my.csv
  mer cache export egemaps features --format npy --dataset ravdess --root RAVDESS
""",
)
@click.argument("store")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "layout",
    required=True,
    metavar="FORMAT",
    help="One of those below.",
)
@click.option(
    "--output", "outputs", multiple=True, metavar="NAME", help="Only this output; repeatable."
)
@dataset_option
@root_option
@click.option("--overwrite", is_flag=True, help="Replace TARGET if it exists.")
@click.option(
    "--also",
    multiple=True,
    metavar="MODALITY=STORE[#OUTPUT]",
    help="Further modality of an MMSA pickle; repeatable.",
)
@key_value_option
@cache_option
@json_option
def cache_export(
    store: str,
    target: Path,
    layout: str,
    outputs: tuple[str, ...],
    dataset: str | None,
    root: Path | None,
    overwrite: bool,
    also: tuple[str, ...],
    options: tuple[str, ...],
    cache_url: str | None,
    as_json: bool,
) -> int:
    """Write the features of STORE to TARGET in a format of other tools.

    With --dataset its utterances are written under their ids; without, all under their keys.
    """
    from mer.cache.exchange import export
    from mer.pipelines.cache_report import export_result, export_text
    from mer.pipelines.caching import export_options, find_store

    opened = _cache(cache_url)
    found = find_store(store, opened)
    keys = _keys_of(dataset, root, opened)
    ids = None if keys is None else keys.utterances_of(found)
    chosen = export_options(layout, options, also, keys, opened)
    with (
        _called("TARGET"),
        _counting("export", len(ids) if ids else len(found), "{:,}".format) as progress,
    ):
        report = export(
            found,
            target,
            layout,
            ids=ids,
            outputs=outputs or None,
            overwrite=overwrite,
            progress=progress,
            **chosen,
        )
    failures = () if keys is None else keys.failures
    _show_failures(failures)
    result = export_result(report, failures)
    _emit(result, as_json, lambda: export_text(result))
    return 3 if failures else 0


@cache.command(
    "import",
    cls=Importing,
    epilog="""\b
Examples:
  mer cache import features.h5 --format hdf5 --name their-wavlm --dataset my.csv
  mer cache import MOSI/aligned_50.pkl --format mmsa --name mosi-mmsa --licence "research only"
""",
)
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "layout",
    required=True,
    metavar="FORMAT",
    help="One of those below.",
)
@click.option("--name", required=True, help="What to call the feature.")
@dataset_option
@root_option
@click.option("--text", is_flag=True, help="They are features of transcripts, not of recordings.")
@click.option("--licence", metavar="TEXT", help="Licence note to keep with the features.")
@key_value_option
@cache_option
@json_option
def cache_import(
    source: Path,
    layout: str,
    name: str,
    dataset: str | None,
    root: Path | None,
    text: bool,
    licence: str | None,
    options: tuple[str, ...],
    cache_url: str | None,
    as_json: bool,
) -> int:
    """Bring features that other tools computed into the cache.

    They are kept under `imported` with where they came from, never under an extractor's name.
    Pickles and .pt files are read without running anything they contain.
    """
    from mer.cache.exchange import import_
    from mer.pipelines.cache_report import import_result, import_text
    from mer.pipelines.caching import import_options

    chosen = import_options(layout, options)
    opened = _cache(cache_url)
    keys = _keys_of(dataset, root, opened)
    modality = "text" if text or (keys is not None and keys.modality == "text") else "audio"
    with _counting("import", None, "{:,}".format) as progress:
        report = import_(
            source,
            layout,
            opened,
            name=name,
            keys=None if keys is None else getattr(keys, modality),
            licence=licence,
            modality=modality,
            progress=progress,
            **chosen,
        )
    failures = () if keys is None else keys.failures
    _show_failures(failures)
    result = import_result(report, failures)
    _emit(result, as_json, lambda: import_text(result))
    return 3 if failures or report.skipped else 0


@cache.command(
    "diff",
    epilog="""\b
Examples:
  mer cache diff wavlm-large-final-3f9c2a wavlm-large-final-77aa01
  mer cache diff /data/mer/logmel-80-3f9c2a7700112233 s3://bucket/mer/logmel-80-3f9c2a7700112233
""",
)
@click.argument("a")
@click.argument("b")
@click.option("--no-values", is_flag=True, help="Compare identities and keys, not the values.")
@cache_option
@json_option
def cache_diff(a: str, b: str, no_values: bool, cache_url: str | None, as_json: bool) -> int:
    """Say how the stores A and B differ: settings, utterances, values."""
    from mer.cache.diff import diff
    from mer.pipelines.cache_report import diff_result, diff_text
    from mer.pipelines.caching import find_store

    opened = _cache(cache_url)
    one, other = find_store(a, opened), find_store(b, opened)
    with _counting("diff", len(one), "{:,}".format) as progress:
        found = diff(one, other, values=not no_values, progress=progress)
    result = diff_result(found)
    _emit(result, as_json, lambda: diff_text(result))
    return 0


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
        return table(
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
        return table(["head", "streams (? optional)", "what"], cells)

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
        lambda: table(
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
        return table(["corpus", "utterances", "labels", "protocol", "what"], cells)

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
