"""Every error that a user, a file or a recipe can cause, in one tree.

::

    MerError                        exit 1
    ├── UsageError (ValueError)     exit 2   bad option, feature, recipe, manifest, path
    │   ├── UnknownNameError (LookupError)   a name that is not registered, with near misses
    │   ├── RecipeError
    │   ├── ManifestError
    │   ├── ProtocolError                    a split that leaks, is empty or cannot be made
    │   ├── CheckpointError (OSError)        weights that are missing, partial or refused
    │   ├── MissingFeatureError              features that no `mer extract` has brought yet
    │   └── MissingDependencyError (ImportError)
    ├── UtteranceError (ValueError) exit 3   one utterance cannot be used; the run goes on
    │   ├── AudioError                       unreadable, empty, not audio, not finite …
    │   ├── TextError                        no transcript where one is needed
    │   └── ModelOutputError                 NaN or Inf out of a model
    ├── DivergedError (ArithmeticError) exit 1   a training whose loss is no longer finite
    └── StoreError                  exit 1
        ├── DamagedStoreError       exit 4   a checksum, size or shape that does not hold
        ├── StoreFormatError        exit 2   not a store, or of a version we cannot read
        └── StorageFullError (OSError)

A message has three parts: what is wrong (with the value and the key or file), what was expected,
what to do next. ``cli.py`` alone turns an error into one line and its ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MerError(Exception):
    """Base of all errors that mer raises on purpose."""

    exit_code = 1


class UsageError(MerError, ValueError):
    """The request itself cannot be served: fix the option, recipe, manifest or path."""

    exit_code = 2


class UnknownNameError(UsageError, LookupError):
    """A name that is not registered.

    Parameters
    ----------
    kind : str
        What the name should have been: ``"head"``, ``"feature"``, …
    name : str
        The name as given.
    known : iterable of str
        All valid names; the nearest are suggested.
    hint : str, optional
        The command that lists them, e.g. ``"mer heads ls"``.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str | None = None) -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        near = difflib.get_close_matches(name, self.known, n=2, cutoff=0.6)
        text = f"Unknown {kind} {name!r}."
        if near:
            text += " Did you mean " + " or ".join(repr(n) for n in near) + "?"
        elif len(self.known) <= 12:
            text += " Known: " + ", ".join(self.known) + "."
        if hint:
            text += f" `{hint}` shows all."
        super().__init__(text)


class RecipeError(UsageError):
    """A recipe that cannot be run; all faults are reported together."""


class ManifestError(UsageError):
    """A manifest that cannot be read: missing column, duplicate id, unknown label."""


class ProtocolError(UsageError):
    """A split that leaks, is empty, or cannot be made from this corpus."""


class CheckpointError(UsageError, OSError):
    """Model weights that cannot be found, are partial, or are refused."""


class MissingFeatureError(UsageError):
    """Features that a recipe needs and the cache does not hold."""


class MissingDependencyError(UsageError, ImportError):
    """An optional package that is not installed; the message names the extra."""


class UtteranceError(MerError, ValueError):
    """One utterance cannot be used; the rest of the run is not affected."""

    exit_code = 3


class AudioError(UtteranceError):
    """A recording that cannot be decoded to finite samples."""


class TextError(UtteranceError):
    """An utterance without the transcript that a text feature needs."""


class ModelOutputError(UtteranceError):
    """A model answered with NaN or Inf."""


class DivergedError(MerError, ArithmeticError):
    """The loss or the probabilities of a training are no longer finite."""


class StoreError(MerError):
    """A store cannot be read or written."""


class DamagedStoreError(StoreError):
    """A checksum, size or shape that does not hold; the message names store, part and file."""

    exit_code = 4


class StoreFormatError(StoreError):
    """Not a store, or one of a version this release cannot read."""

    exit_code = 2


class StorageFullError(StoreError, OSError):
    """No space left while writing; everything committed before is intact."""
