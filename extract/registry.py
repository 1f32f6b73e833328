"""Names of extractors, and the feature strings that select them.

A feature string is ``NAME[:KEY=VALUE[,KEY=VALUE…]][#OUTPUT]``: ``crepe``,
``crepe:model=tiny#f0_code``, ``wavlm-large:layers=6,9,12``,
``hubert:model=PATH_OR_HUB_ID,revision=…``. A value may itself hold commas: a piece without ``=``
belongs to the value before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points

from mer.cache.errors import UnknownNameError, UsageError
from mer.extract.contract import Extractor

SPEECH_SSL = "mer.extract.speech_ssl:SpeechSsl"
WHISPER = "mer.extract.whisper:WhisperEncoder"
TEXT = "mer.extract.text:TextEncoder"

EXTRACTORS: dict[str, tuple[str, dict[str, str]]] = {
    "logmel": ("mer.extract.logmel:LogMel", {}),
    "crepe": ("mer.extract.pitch:Crepe", {}),
    "egemaps": ("mer.extract.opensmile:Egemaps", {}),
    "wavlm": (SPEECH_SSL, {}),
    "wavlm-base": (SPEECH_SSL, {"model": "microsoft/wavlm-base"}),
    "wavlm-base-plus": (SPEECH_SSL, {"model": "microsoft/wavlm-base-plus"}),
    "wavlm-large": (SPEECH_SSL, {"model": "microsoft/wavlm-large"}),
    "hubert": (SPEECH_SSL, {}),
    "hubert-base": (SPEECH_SSL, {"model": "facebook/hubert-base-ls960"}),
    "hubert-large": (SPEECH_SSL, {"model": "facebook/hubert-large-ll60k"}),
    "hubert-xlarge": (SPEECH_SSL, {"model": "facebook/hubert-xlarge-ll60k"}),
    "wav2vec2": (SPEECH_SSL, {}),
    "wav2vec2-base": (SPEECH_SSL, {"model": "facebook/wav2vec2-base"}),
    "wav2vec2-large": (SPEECH_SSL, {"model": "facebook/wav2vec2-large"}),
    "wav2vec2-large-lv60": (SPEECH_SSL, {"model": "facebook/wav2vec2-large-960h-lv60-self"}),
    "wav2vec2-xls-r-300m": (SPEECH_SSL, {"model": "facebook/wav2vec2-xls-r-300m"}),
    "whisper": (WHISPER, {}),
    "whisper-tiny": (WHISPER, {"model": "openai/whisper-tiny"}),
    "whisper-base": (WHISPER, {"model": "openai/whisper-base"}),
    "whisper-small": (WHISPER, {"model": "openai/whisper-small"}),
    "whisper-medium": (WHISPER, {"model": "openai/whisper-medium"}),
    "whisper-large-v3": (WHISPER, {"model": "openai/whisper-large-v3"}),
    "whisper-large-v3-turbo": (WHISPER, {"model": "openai/whisper-large-v3-turbo"}),
    "text": (TEXT, {}),
    "bert": (TEXT, {}),
    "roberta": (TEXT, {}),
    "roberta-base": (TEXT, {"model": "FacebookAI/roberta-base"}),
    "roberta-large": (TEXT, {"model": "FacebookAI/roberta-large"}),
    "imported": ("mer.extract.imported:Imported", {}),
}
ENTRY_POINT_GROUP = "mer.extractors"


@dataclass(frozen=True, slots=True)
class FeatureRequest:
    """A parsed feature string: extractor name, options, and the one output wanted, if any."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    output: str | None = None

    @property
    def feature(self) -> str:
        """The string without its output: what `mer extract -f` takes."""
        if not self.options:
            return self.name
        return self.name + ":" + ",".join(f"{k}={v}" for k, v in self.options.items())

    def __str__(self) -> str:
        return self.feature + (f"#{self.output}" if self.output else "")


def parse_feature(text: str) -> FeatureRequest:
    """Split a feature string into name, options and output.

    Raises
    ------
    UsageError
        Empty name, an option without a value, an option given twice, or an empty output.

    Examples
    --------
    >>> parse_feature("wavlm:layers=6,9,12#layer_9")
    FeatureRequest(name='wavlm', options={'layers': '6,9,12'}, output='layer_9')
    """
    body, hash_sign, output = text.strip().rpartition("#")
    if not hash_sign:
        body, output = output, ""
    elif not output:
        raise UsageError(
            f"Feature {text!r} ends in '#' without an output name, e.g. 'crepe#f0_code'."
        )
    name, colon, rest = body.partition(":")
    name = name.strip()
    if not name:
        raise UsageError(
            f"Feature {text!r} has no extractor name; expected NAME[:KEY=VALUE,…][#OUTPUT]."
        )
    options: dict[str, str] = {}
    last = None
    for piece in rest.split(",") if colon else ():
        key, equals, value = piece.partition("=")
        key = key.strip()
        if equals and key:
            if key in options:
                raise UsageError(f"Feature {text!r} gives option {key!r} twice.")
            options[key] = value.strip()
            last = key
        elif last is not None and piece.strip():
            options[last] += "," + piece.strip()
        else:
            raise UsageError(f"Feature {text!r}: {piece!r} is not KEY=VALUE.")
    for key, value in options.items():
        if not value:
            raise UsageError(f"Feature {text!r}: option {key!r} has no value.")
    return FeatureRequest(name, options, output or None)


def names() -> list[str]:
    """Return all registered names, ours and third parties', sorted."""
    return sorted({*EXTRACTORS, *(e.name for e in entry_points(group=ENTRY_POINT_GROUP))})


def extractor_class(name: str) -> tuple[type[Extractor], dict[str, str]]:
    """Return the class behind ``name`` and the options that the name presets.

    Raises
    ------
    UnknownNameError
        No such extractor; near misses are suggested.
    """
    if name in EXTRACTORS:
        target, preset = EXTRACTORS[name]
        module, _, attribute = target.partition(":")
        return getattr(import_module(module), attribute), dict(preset)
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == name:
            return entry.load(), {}
    raise UnknownNameError("feature", name, names(), "mer extractors ls")


def create(feature: str | FeatureRequest) -> Extractor:
    """Build the extractor that a feature string names, without loading its model.

    Raises
    ------
    UsageError
        A malformed string, an unknown name or option, a value out of range.
    CheckpointError
        Weights that cannot be found or do not fit.
    """
    request = parse_feature(feature) if isinstance(feature, str) else feature
    cls, preset = extractor_class(request.name)
    return cls.from_options(request.name, {**preset, **request.options})
