"""`mer demo`: the whole path on a synthetic corpus, by the same functions as on a real one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mer.cache.home import Cache
from mer.pipelines import corpora
from mer.pipelines.extraction import Extraction, extract
from mer.pipelines.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from mer.extract.engine import Progress
    from mer.pipelines.experiment import RunResult
    from mer.pipelines.voting import VoteResult

RECIPES = ("simple-demo", "mdat-demo")
# Where the extra `smile` is installed, both heads and the baselines read openSMILE's functionals.
WITH_SMILE = {
    "simple-demo": ("features.functionals=egemaps", "evaluation.baseline_features=egemaps"),
    "mdat-demo": ("features.text=egemaps", "evaluation.baseline_features=egemaps"),
}
SYNTHETIC = (
    "The corpus is synthetic: voices made by a formant synthesiser. Its numbers show that the "
    "machinery works and say nothing about real speech."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What `mer demo` made: an extraction, a run per recipe, and their vote."""

    out: Path
    utterances: int
    extraction: Extraction
    runs: tuple[RunResult, ...]
    vote: VoteResult

    def to_json(self) -> dict[str, Any]:
        """Return the results of the three steps by name."""
        return {
            "synthetic": True,
            "out": str(self.out),
            "extract": self.extraction.to_json(),
            "runs": [run.to_json() for run in self.runs],
            "vote": self.vote.to_json(),
        }

    def to_text(self) -> str:
        """Return tables of the runs and the vote, and where everything lies."""
        tables = [f"{run.table()}\nrun: {run.run}" for run in self.runs]
        vote = f"{self.vote.table()}\nvote: {self.vote.run}"
        return "\n\n".join([*tables, vote, SYNTHETIC])


def demo_recipes() -> list[Recipe]:
    """Return the recipes of the demo, with openSMILE where it is installed."""
    smile = importlib.util.find_spec("opensmile") is not None
    return [load_recipe(name, WITH_SMILE[name] if smile else ()) for name in RECIPES]


def run_demo(
    out: Path,
    *,
    device: str = "auto",
    say: Callable[[str], None] = lambda message: None,
    progress: Progress | None = None,
) -> DemoResult:
    """Synthesise, extract, train and vote below ``out``; what is there already is reused.

    Parameters
    ----------
    out : Path
        Gets ``corpus/``, ``cache/`` and ``runs/``.
    say : callable
        Told what happens next, one line at a time.
    """
    say(f"mer demo: {SYNTHETIC}")
    manifest = corpora.load("demo", out / "corpus")
    cache = Cache(out / "cache")
    recipes = demo_recipes()
    features = list(dict.fromkeys(f for recipe in recipes for f in recipe.feature_strings()))
    say(f"extracting {', '.join(features)} of {len(manifest.utterances)} utterances")
    extraction = extract(manifest, features, cache, device=device, progress=progress)

    from mer.pipelines.experiment import run_recipe
    from mer.pipelines.voting import ensemble_vote

    runs = []
    for recipe in recipes:
        say(f"training {recipe.name}")
        folder = _fresh(out / "runs" / recipe.name)
        root = out / "corpus"
        runs.append(
            run_recipe(recipe, cache=cache, dataset="demo", root=root, out=folder, device=device)
        )
    say("voting")
    vote = ensemble_vote(
        [run.run for run in runs], method="soft", out=_fresh(out / "runs" / "vote")
    )
    return DemoResult(
        out=out,
        utterances=len(manifest.utterances),
        extraction=extraction,
        runs=tuple(runs),
        vote=vote,
    )


def _fresh(folder: Path) -> Path:
    """Return ``folder``, or the first of ``folder-2``, ``folder-3`` … that does not exist."""
    candidate, number = folder, 2
    while candidate.exists():
        candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return candidate
