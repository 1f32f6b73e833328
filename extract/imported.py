"""Features that others computed and `mer cache import` brought in: named, never computed.

``imported:name=…,content=…,outputs=…`` is what the import reports. A recipe reads such a store as
any other; an utterance that it lacks cannot be computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

from mer.cache.errors import UsageError, UtteranceError
from mer.cache.exchange.feature import EXTRACTOR, imported_spec, parse_outputs
from mer.cache.spec import FeatureSpec
from mer.extract.contract import Extractor, RaggedBatch, take
from mer.extract.options import check_choice

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Imported(Extractor):
    """Names a store of imported features.

    Parameters
    ----------
    spec : FeatureSpec
        Its identity: name, format, content, modality and outputs.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        self.spec = spec

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, str]) -> Self:
        """Build from ``name``, ``format``, ``content``, ``outputs`` and ``modality``."""
        needed = ("name", "format", "content", "outputs")
        merged = take(options, name, {**dict.fromkeys(needed, ""), "modality": "audio"})
        missing = [option for option in needed if not merged[option]]
        if missing:
            raise UsageError(
                f"Feature {name!r} lacks {', '.join(missing)}: copy the whole feature string that "
                "`mer cache import` reports."
            )
        modality = check_choice(name, "modality", merged["modality"], ("audio", "text"))
        spec = imported_spec(
            merged["name"],
            merged["format"],
            merged["content"],
            parse_outputs(merged["outputs"]),
            modality=modality,
        )
        kind = ImportedText if modality == "text" else cls
        return kind(spec)  # type: ignore[return-value]

    def load(self, device: str) -> None:
        """Do nothing: there is no model."""

    def prepare(self, source: np.ndarray | str) -> Tensor:
        """Refuse: whatever made these features is not known."""
        name = self.spec.identity["options"]["name"]
        raise UtteranceError(
            f"{EXTRACTOR}:name={name} was imported; nothing can compute it: import it again for "
            "these utterances."
        )

    def num_frames(self, num_steps: int) -> dict[str, int]:
        """Return zeros: nothing is ever computed."""
        return {output.name: 0 for output in self.outputs}

    def forward(self, batch: RaggedBatch) -> dict[str, RaggedBatch]:
        """Never run: ``prepare`` refuses every utterance."""
        raise NotImplementedError(f"{self.spec.slug} was imported; nothing can compute it.")


class ImportedText(Imported):
    """The same, of transcripts: keys are those of texts."""

    modality = "text"
