"""Recipes: everything that decides a result, in one YAML file that is checked before any work.

The groups come in one order: dataset, features, head, training, evaluation. A recipe may
``include`` another, shipped (by name) or beside it (by relative path), and then states only its
difference. This module is the only one that knows YAML, and it imports neither torch nor a model:
the keys of ``head`` and ``training`` are checked against their classes when an experiment starts.

How two recipes merge (an include under its includer, and all of it under ``--set``):

- mappings merge key by key, anything else is replaced;
- a feature may be a string, which stands for ``{feature: STRING}``: the stream's other settings
  stay, except that ``output`` falls away when the string names its own or belongs to another
  extractor;
- a head of another name takes nothing from the head it replaces;
- a stream set to ``null`` is removed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml

from mer.cache.errors import RecipeError, UnknownNameError, UsageError
from mer.extract.registry import names as feature_names
from mer.extract.registry import parse_feature
from mer.heads import registry as heads
from mer.pipelines import labels, protocols

FOLDER = Path(__file__).parent / "recipes"
BASELINES = ("majority", "logreg", "svm")

Check = Callable[
    [Any], Any
]  # returns the value in its final type, or raises ValueError("must be …")


# -- checks of single values -----------------------------------------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be text. Got {value!r} instead.")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"must be a whole number, 0 or more. Got {value!r} instead.")
    return value


def _optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _one_of(*allowed: str) -> Check:
    def check(value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}. Got {value!r} instead.")
        return str(value)

    return check


def _many(check: Check, *, empty: bool = False) -> Check:
    """Check one value or a list of distinct ones; the result is a tuple."""

    def many(value: Any) -> tuple[Any, ...]:
        values = value if isinstance(value, (list, tuple)) else [value]
        checked = tuple(check(v) for v in values)
        if len(set(checked)) < len(checked):
            raise ValueError(f"must not name anything twice. Got {list(values)!r} instead.")
        if not checked and not empty:
            raise ValueError("must not be an empty list.")
        return checked

    return many


def _folds(value: Any) -> tuple[int, ...] | None:
    if value is None or value == "all":
        return None
    folds = _many(_count)(value)
    if 0 in folds:
        raise ValueError(f"counts folds from 1. Got {value!r} instead.")
    return tuple(sorted(folds))


def _pool(value: Any) -> int | Literal["mean"]:
    if value == "mean":
        return "mean"
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"must be how many frames to average into one, or 'mean'. Got {value!r} instead."
        )
    return value


def _feature(value: Any) -> str:
    """Check a feature string's form and extractor; its options are the extractor's to check."""
    request = parse_feature(_text(value))
    known = feature_names()
    if request.name not in known:
        raise UnknownNameError("feature", request.name, known, "mer extractors ls")
    return value.strip()


def _labels(value: Any) -> str:
    if _text(value) not in (*labels.names(), labels.AS_GIVEN):
        raise UnknownNameError("label scheme", value, (*labels.names(), labels.AS_GIVEN))
    return str(value)


def _head(value: Any) -> str:
    if _text(value) not in heads.names():
        raise UnknownNameError("head", value, heads.names(), "mer heads ls")
    return str(value)


def _protocol(value: Any) -> str:
    return protocols.protocol(_text(value)).name


def _validation(value: Any) -> str:
    protocols.validation_share(_text(value))
    return str(value)


def _plain(value: Any) -> Any:
    """Check that a value is one that JSON knows too, at any depth, and finite."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"must have text as keys. Got {dict(value)!r} instead.")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"must be finite. Got {value!r} instead.")
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ValueError(f"must be text, a number, true, false or null. Got {value!r} instead.")


def _settings(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a mapping of settings. Got {value!r} instead.")
    return dict(_plain(value))


def _key(check: Check, **options: Any) -> Any:
    return field(metadata={"check": check}, **options)


# -- the tree --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """A group of keys; each field carries its check, for YAML and direct construction alike."""

    # A field of this name takes the keys that no other field has; empty: such keys are faults.
    rest: ClassVar[str] = ""

    def __post_init__(self) -> None:
        faults: list[str] = []
        group = type(self).__name__.removesuffix("Recipe").lower()
        for f in dataclasses.fields(self):
            try:
                object.__setattr__(self, f.name, f.metadata["check"](getattr(self, f.name)))
            except ValueError as error:
                faults.append(f"{group}.{f.name} {error}")
        if faults:
            raise RecipeError(" ".join(faults))
        self._settle()

    def _settle(self) -> None:
        """Check and normalise what involves several fields."""

    @classmethod
    def parse(cls, raw: Any, path: str, faults: list[str]) -> Self | None:
        """Build from YAML; on any fault, add a line to ``faults`` and return None."""
        if raw is None:
            raw = {}
        if not isinstance(raw, Mapping):
            faults.append(f"{path}: must be a mapping of keys. Got {raw!r} instead.")
            return None
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        others: dict[str, Any] = {}
        before = len(faults)
        for key, value in raw.items():
            if key == cls.rest or key not in fields:
                if cls.rest and isinstance(key, str):
                    others[key] = value
                else:
                    known = [name for name in fields if name != cls.rest]
                    faults.append(f"{path}.{key}: {_unknown_key(key, known)}")
                continue
            try:
                values[key] = fields[key].metadata["check"](value)
            except ValueError as error:
                faults.append(f"{path}.{key}: {error}")
        for key, value in others.items():
            try:
                others[key] = _plain(value)
            except ValueError as error:
                faults.append(f"{path}.{key}: {error}")
        if cls.rest:
            values[cls.rest] = others
        for name, f in fields.items():
            if (
                name not in raw
                and name not in values
                and f.default is dataclasses.MISSING
                and f.default_factory is dataclasses.MISSING
            ):
                faults.append(f"{path}.{name}: is missing.")
        return cls(**values) if len(faults) == before else None

    def to_plain(self) -> dict[str, Any]:
        """Return the group as YAML has it, without keys that are not set."""
        plain: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == self.rest:
                plain.update(value)
            elif value is not None:
                plain[f.name] = list(value) if isinstance(value, tuple) else value
        return plain


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetRecipe(_Group):
    """Which utterances, and what they are called.

    Parameters
    ----------
    name : str, optional
        Corpus name or manifest file; ``None`` where `mer train-head --dataset` gives it.
    root : str, optional
        Folder of the corpus.
    labels : str, optional
        Label scheme; ``None`` is the corpus' own.
    target : str, optional
        Another label than the corpus' main one, e.g. ``voice``: the manifest's ``label:NAME``.
    normalise : {"none", "speaker"}
        ``speaker`` shifts and scales every dimension of every stream, and of what baselines read,
        by the mean and deviation over all utterances of the same speaker (ours). Labels are not
        looked at, but utterances of the test part are: a result with it says what a system reaches
        that has several recordings of a new speaker, and every report notes it.
    missing : {"error", "drop"}
        What to do with utterances that lack a feature, because their extraction failed: refuse, or
        leave them out and say so.
    """

    name: str | None = _key(_optional(_text), default=None)
    root: str | None = _key(_optional(_text), default=None)
    labels: str | None = _key(_optional(_labels), default=None)
    target: str | None = _key(_optional(_text), default=None)
    normalise: Literal["none", "speaker"] = _key(_one_of("none", "speaker"), default="none")
    missing: Literal["error", "drop"] = _key(_one_of("error", "drop"), default="error")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRecipe(_Group):
    """What one input stream of a head reads.

    Parameters
    ----------
    feature : str
        Feature string without output, as `mer extract -f` takes it.
    output : str, optional
        Which of the feature's outputs; ``None`` where it has only one. In YAML also written
        ``FEATURE#OUTPUT``.
    pool : int or "mean", default=1
        Frames averaged into one, so that long utterances cost less (ours; the papers read every
        frame); the last group averages what is left. ``"mean"`` averages all frames, from the
        stored statistics.
    """

    feature: str = _key(_feature)
    output: str | None = _key(_optional(_text), default=None)
    pool: int | Literal["mean"] = _key(_pool, default=1)

    def _settle(self) -> None:
        request = parse_feature(self.feature)
        if request.output is not None:
            if self.output not in (None, request.output):
                raise RecipeError(
                    f"Feature {self.feature!r} and output {self.output!r} name two outputs."
                )
            object.__setattr__(self, "feature", request.feature)
            object.__setattr__(self, "output", request.output)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRecipe(_Group):
    """Which head, and the fields of its configuration that differ from their defaults."""

    rest: ClassVar[str] = "config"

    name: str = _key(_head)
    config: Mapping[str, Any] = _key(_settings, default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecipe(_Group):
    """How the utterances are split, and what stands beside the head.

    Parameters
    ----------
    protocol : str, optional
        Named way to split; ``None`` is the corpus' own.
    validation : str, optional
        Named rule for the validation part; ``None`` is the protocol's own.
    seeds : tuple of int, default=(1, 2, 3)
        One training per seed and fold.
    folds : tuple of int, optional
        Folds to run, counted from 1; ``None`` (in YAML ``all``) runs every one.
    split_seed : int, default=0
        Seed of whatever is random in the split; all training seeds share one split.
    baselines : tuple of {"majority", "logreg", "svm"}
        Reference classifiers on the same folds.
    baseline_features : tuple of str, optional
        Feature strings that ``logreg`` and ``svm`` read, pooled over time and joined; ``None`` is
        the head's own streams.
    allow_leak : str, optional
        Reason for accepting a split in which speakers or recordings cross; recorded with the
        results.
    """

    protocol: str | None = _key(_optional(_protocol), default=None)
    validation: str | None = _key(_optional(_validation), default=None)
    seeds: tuple[int, ...] = _key(_many(_count), default=(1, 2, 3))
    folds: tuple[int, ...] | None = _key(_folds, default=None)
    split_seed: int = _key(_count, default=0)
    baselines: tuple[str, ...] = _key(_many(_one_of(*BASELINES), empty=True), default=("majority",))
    baseline_features: tuple[str, ...] | None = _key(_optional(_many(_feature)), default=None)
    allow_leak: str | None = _key(_optional(_text), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole experiment.

    Parameters
    ----------
    name : str
        For names of runs and for people; the stem of the file unless the recipe says otherwise. Not
        part of equality.
    dataset, head, evaluation
        Their groups.
    features : mapping of str to StreamRecipe
        Streams by name, as the head calls them.
    training : mapping
        Fields of the training configuration that differ from their defaults.
    """

    name: str = field(compare=False)
    dataset: DatasetRecipe = field(default_factory=DatasetRecipe)
    features: Mapping[str, StreamRecipe]
    head: HeadRecipe
    training: Mapping[str, Any] = field(default_factory=dict)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)

    def feature_strings(self) -> list[str]:
        """Return the feature strings that `mer extract` must have brought, each once, in order."""
        streams = [stream.feature for stream in self.features.values()]
        baselines: Iterable[str] = ()
        if set(self.evaluation.baselines) - {"majority"}:
            baselines = self.evaluation.baseline_features or ()
        return list(dict.fromkeys([*streams, *(parse_feature(f).feature for f in baselines)]))

    def to_plain(self) -> dict[str, Any]:
        """Return the recipe as YAML has it, without `name`."""
        return {
            "dataset": self.dataset.to_plain(),
            "features": {stream: recipe.to_plain() for stream, recipe in self.features.items()},
            "head": self.head.to_plain(),
            "training": dict(self.training),
            "evaluation": self.evaluation.to_plain(),
        }

    def with_run_options(
        self,
        *,
        dataset: str | None = None,
        root: str | None = None,
        seeds: Sequence[int] | None = None,
        folds: Sequence[int] | Literal["all"] | None = None,
    ) -> Recipe:
        """Return the recipe with what the command line gave; ``None`` keeps what it says.

        Raises
        ------
        RecipeError
            A seed or fold that cannot be one.
        """
        changes: dict[str, Any] = {}
        if seeds is not None:
            changes["seeds"] = list(seeds)
        if folds is not None:
            changes["folds"] = folds if folds == "all" else list(folds)
        evaluation = dataclasses.replace(self.evaluation, **changes)
        # A root belongs to the corpus it was given for.
        kept = self.dataset.root if dataset in (None, self.dataset.name) else None
        data = dataclasses.replace(
            self.dataset, name=dataset or self.dataset.name, root=root if root is not None else kept
        )
        return dataclasses.replace(self, dataset=data, evaluation=evaluation)


_GROUPS = ("dataset", "features", "head", "training", "evaluation")


# -- YAML ------------------------------------------------------------------------------------------

# YAML 1.1 takes 1e-5 for text; everybody who writes it means the number.
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """The safe loader, without dates, repeated keys and references, and with 1e-5 a number."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(
                problem="references (*name) are not supported; use include",
                problem_mark=self.get_mark(),
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            text = str(key.value)
            if text in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {text!r} is given twice", key.start_mark
                )
            seen.add(text)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The safe dumper, quoting what ``_Loader`` would take for a number, and without references."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _load_yaml(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def dump(recipe: Recipe) -> str:
    """Return ``recipe``, includes and overrides resolved, as YAML that loads back equal."""
    plain = {"name": recipe.name, **recipe.to_plain()}
    return str(
        yaml.dump(
            plain,
            Dumper=_Dumper,
            sort_keys=False,
            default_flow_style=None,
            width=100,
        )
    )


# -- finding and merging ---------------------------------------------------------------------------


def names() -> list[str]:
    """Return the shipped recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def describe(name: str) -> str:
    """Return the first paragraph of a shipped recipe's opening comment: its purpose."""
    lines = [line.removeprefix("#").strip() for line in read_text(name).splitlines()]
    return " ".join(lines[: lines.index("")])


def read_text(name_or_path: str | Path) -> str:
    """Return a recipe's file as written, comments and all.

    Raises
    ------
    UnknownNameError, RecipeError
        No such recipe, or not a text file.
    """
    return _read(_find(name_or_path, None))


def _find(name_or_path: str | Path, beside: Path | None) -> Path:
    """Return the file of a shipped name or a path; a run's folder stands for the recipe in it."""
    text = str(name_or_path)
    path = Path(text).expanduser()
    looks_like_path = (
        isinstance(name_or_path, Path) or path.suffix in (".yaml", ".yml") or "/" in text
    )
    if beside is not None:
        if looks_like_path:
            return beside.parent / path
    elif looks_like_path or path.exists():
        return path / "recipe.yaml" if path.is_dir() else path
    if text not in names():
        raise UnknownNameError("recipe", text, names(), "mer recipes ls")
    return FOLDER / f"{text}.yaml"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(
            f"Recipe {path}: no such file. `mer recipes ls` shows the shipped ones."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"Recipe {path} cannot be read: {error}") from error


def _read_raw(path: Path, trail: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a recipe's mapping with its includes merged under it."""
    path = path.resolve()
    if path in trail:
        chain = " -> ".join(p.name for p in (*trail, path))
        raise RecipeError(f"Recipe {trail[0]}: include goes in a circle: {chain}.")
    try:
        raw = _load_yaml(_read(path))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"Recipe {path}{place}: {error.problem or error.context}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"Recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise RecipeError(
            f"Recipe {path}: expected the groups {', '.join(_GROUPS)}. Got {raw!r} instead."
        )
    include = raw.pop("include", None)
    if include is None:
        return raw
    if not isinstance(include, str):
        raise RecipeError(
            f"Recipe {path}: include must be a name or a path. Got {include!r} instead."
        )
    try:
        base = _read_raw(_find(include, path), (*trail, path))
    except UsageError as error:
        error.add_note(f"included by {path}")
        raise
    base.pop("name", None)  # a name belongs to the file that states it
    return _merge(base, raw)


def _merge(base: Any, over: Any, path: tuple[str, ...] = ()) -> Any:
    """Return ``over`` laid on ``base`` by the rules of the module's docstring."""
    if len(path) == 2 and path[0] == "features":
        base, over = _swap(base, over)
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    if path == ("head",) and len({base.get("name"), over.get("name")} - {None}) == 2:
        return dict(over)
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _merge(merged[key], value, (*path, str(key))) if key in merged else value
    return merged


def _swap(base: Any, over: Any) -> tuple[Any, Any]:
    """Return a stream's old and new settings as mappings; an output that no longer fits is gone."""
    base, over = ({"feature": s} if isinstance(s, str) else s for s in (base, over))
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return base, over
    old, new = base.get("feature"), over.get("feature")
    if not (isinstance(old, str) and isinstance(new, str)):
        return base, over
    try:
        was, now = parse_feature(old), parse_feature(new)
    except UsageError:
        return base, over  # reported when the value itself is checked
    base = dict(base)
    output = base.pop("output", None) or was.output
    if output and now.output is None and was.name == now.name and "output" not in over:
        base["output"] = output
    return base, over


def _overrides(settings: Iterable[str], faults: list[str]) -> dict[str, Any]:
    """Return ``a.b=c`` settings as one nested mapping; later ones win."""
    tree: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            faults.append(f"--set {setting}: must be KEY=VALUE with a key such as head.dropout.")
            continue
        try:
            parsed = _load_yaml(value)
        except (yaml.YAMLError, ValueError) as error:
            problem = getattr(error, "problem", None) or error
            faults.append(f"--set {setting}: {value!r} is not a YAML value ({problem}).")
            continue
        branch: dict[str, Any] = {parts[-1]: parsed}
        for part in reversed(parts[:-1]):
            branch = {part: branch}
        tree = _merge(tree, branch)
    return tree


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a recipe.

    Parameters
    ----------
    name_or_path : str or Path
        A shipped name, a YAML file, or the folder of a run.
    overrides : sequence of str
        ``a.b=c`` settings, the value in YAML. ``features.STREAM=FEATURE`` swaps what a stream
        reads, ``features.STREAM=null`` removes it.

    Raises
    ------
    UnknownNameError
        No shipped recipe of that name.
    RecipeError
        Everything that is wrong with the recipe, all at once.
    """
    path = _find(name_or_path, None)
    faults: list[str] = []
    raw = _merge(_read_raw(path), _overrides(overrides, faults))
    recipe = _parse(raw, path.stem, faults)
    if recipe is None:
        raise fault_report(str(path), faults)
    return recipe


def fault_report(where: str, faults: Sequence[str]) -> RecipeError:
    """Return the error that names all ``faults`` of recipe ``where``."""
    if len(faults) == 1:
        return RecipeError(f"Recipe {where}: {faults[0]}")
    return RecipeError(
        f"Recipe {where} has {len(faults)} faults:" + "".join(f"\n  {f}" for f in faults)
    )


def _parse(raw: Mapping[Any, Any], stem: str, faults: list[str]) -> Recipe | None:
    for key in raw:
        if key not in (*_GROUPS, "name"):
            faults.append(f"{key}: {_unknown_key(key, [*_GROUPS, 'include', 'name'])}")
    name = raw.get("name", stem)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        faults.append(f"name: must be letters, digits, '-', '_' and '.'. Got {name!r} instead.")
    dataset = DatasetRecipe.parse(raw.get("dataset"), "dataset", faults)
    features = _parse_features(raw.get("features"), faults)
    head = HeadRecipe.parse(raw.get("head"), "head", faults)
    training: dict[str, Any] = {}
    try:
        training = _settings(raw.get("training") or {})
    except ValueError as error:
        faults.append(f"training: {error}")
    evaluation = EvaluationRecipe.parse(raw.get("evaluation"), "evaluation", faults)
    if faults or dataset is None or head is None or evaluation is None:
        return None
    return Recipe(
        name=name,
        dataset=dataset,
        features=features,
        head=head,
        training=training,
        evaluation=evaluation,
    )


def _parse_features(raw: Any, faults: list[str]) -> dict[str, StreamRecipe]:
    if not isinstance(raw, Mapping):
        faults.append(f"features: must map each stream to a feature. Got {raw!r} instead.")
        return {}
    streams: dict[str, StreamRecipe] = {}
    for name, value in raw.items():
        if value is None:
            continue
        path = f"features.{name}"
        if not isinstance(name, str):
            faults.append(f"{path}: a stream's name must be text.")
            continue
        plain = {"feature": value} if isinstance(value, str) else value
        try:
            stream = StreamRecipe.parse(plain, path, faults)
        except RecipeError as error:
            faults.append(f"{path}: {error}")
            continue
        if stream is not None:
            streams[name] = stream
    if not raw or all(value is None for value in raw.values()):
        faults.append("features: must name at least one stream.")
    return streams


def _unknown_key(key: Any, known: Iterable[str]) -> str:
    return str(UnknownNameError("key", str(key), known))
