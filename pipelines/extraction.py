"""`mer extract`: bring every missing feature of a manifest into the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mer.extract.contract import Source
from mer.extract.registry import create, parse_feature

if TYPE_CHECKING:
    from mer.cache.home import Cache
    from mer.extract.engine import Progress, Report
    from mer.extract.plan import Plan
    from mer.pipelines.manifest import Manifest

# A stored float16 is within 2**-11 of what was computed; batched may differ from alone by 1e-4.
VERIFY_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """Result of `mer extract`.

    Parameters
    ----------
    report : Report
        What was computed, reused and failed.
    stores : dict
        Feature string to ``{"path", "frames", "bytes"}``; frames of the first output.
    missing : dict
        Feature string to utterances it lacks; only of a dry run.
    verified : dict
        Feature string to the largest relative difference found by ``verify``.
    """

    report: Report
    stores: dict[str, dict[str, Any]]
    missing: dict[str, int] | None = None
    verified: dict[str, float] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0, or 4 where verification found a difference, or 3 where utterances failed."""
        if any(difference > VERIFY_TOLERANCE for difference in self.verified.values()):
            return 4
        return 3 if self.report.failures else 0

    def to_json(self) -> dict[str, Any]:
        """Return the keys of `mer extract --json`."""
        report = self.report
        result: dict[str, Any] = {
            "utterances": report.utterances,
            "hours": round(report.hours, 6),
            "computed": report.computed,
            "reused": report.reused,
            "failed": report.failed,
            "seconds": round(report.seconds, 3),
            "padding_waste": round(report.padding_waste, 5),
            "stores": self.stores,
            "failures": [
                {"utterance": f.utterance, "reason": f.reason, "feature": f.feature}
                for f in report.failures
            ],
        }
        if self.missing is not None:
            result["missing"] = self.missing
        if self.verified:
            result["verified"] = self.verified
        return result


def sources_of(manifest: Manifest) -> list[Source]:
    """Return what the engine needs to know of a manifest's utterances."""
    return [
        Source(
            id=u.id,
            path=u.path,
            start_s=u.start_s,
            end_s=u.end_s,
            channel=u.channel,
            text=u.text,
        )
        for u in manifest.utterances
    ]


def plan_features(
    manifest: Manifest,
    features: Sequence[str],
    cache: Cache,
    *,
    workers: int = 4,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Plan the extraction of ``features`` (feature strings; an ``#output`` is ignored).

    Raises
    ------
    UsageError
        An unknown or malformed feature.
    CheckpointError
        Weights that cannot be found or do not fit.
    """
    from mer.extract.plan import plan

    requests = dict.fromkeys(parse_feature(feature).feature for feature in features)
    extractors = [(feature, create(feature)) for feature in requests]
    return plan(sources_of(manifest), extractors, cache, workers=workers, progress=progress)


def extract(
    manifest: Manifest,
    features: Sequence[str],
    cache: Cache,
    *,
    device: str = "auto",
    batch_seconds: float | None = None,
    workers: int = 4,
    dry_run: bool = False,
    verify: int = 0,
    hashing: Callable[[int], None] | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """Bring every missing feature of ``manifest`` into ``cache``.

    Parameters
    ----------
    dry_run : bool
        Only find out what is missing.
    verify : int
        Afterwards compute so many random stored utterances per feature again, each alone.
    hashing, progress : callable, Progress
        Told of recordings read while planning, and of utterances done.
    """
    from mer.extract.engine import Report, run
    from mer.extract.engine import verify as verify_stored

    planned = plan_features(manifest, features, cache, workers=workers, progress=hashing)
    if dry_run:
        report = Report(len(planned.sources), planned.hours)
        report.reused = sum(feature.reused for feature in planned.features)
        report.failures, report.failed = planned.failures.entries, planned.failures.pairs
        missing = {feature.feature: len(feature.missing) for feature in planned.features}
        return Extraction(report=report, stores=_stores(planned, cache), missing=missing)
    report = run(
        planned,
        cache,
        device=device,
        batch_seconds=batch_seconds,
        workers=workers,
        progress=progress,
    )
    verified = verify_stored(planned, cache, verify, device=device) if verify else {}
    return Extraction(report=report, stores=_stores(planned, cache), verified=verified)


def _stores(planned: Plan, cache: Cache) -> dict[str, dict[str, Any]]:
    stores: dict[str, dict[str, Any]] = {}
    for feature in planned.features:
        store = cache.open(feature.extractor.spec)
        if store is not None:
            info = store.info()
            first = feature.extractor.outputs[0].name
            stores[feature.feature] = {
                "path": store.url,
                "frames": info.outputs[first].frames,
                "bytes": info.bytes,
            }
    return stores
