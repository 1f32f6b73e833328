"""Protection against a torchaudio that is installed but cannot be loaded.

transformers imports torchaudio whenever the package is merely present. A CUDA build of torchaudio
beside a CPU build of torch fails to load its shared libraries, and then every model class of
transformers dies with it. mer needs nothing from torchaudio, so a broken one is hidden.
"""

from __future__ import annotations

import importlib
import logging
import sys

logger = logging.getLogger(__name__)


def neutralise_broken_torchaudio() -> bool:
    """Hide torchaudio from this process if importing it fails; call before importing transformers.

    A working torchaudio, or none at all, is left alone. A second call is free.

    Returns
    -------
    bool
        Whether torchaudio is hidden, now or by an earlier call.
    """
    if "torchaudio" in sys.modules:
        return sys.modules["torchaudio"] is None
    try:
        importlib.import_module("torchaudio")
    except ModuleNotFoundError as error:
        if error.name == "torchaudio":
            return False
        reason: Exception = error
    except Exception as error:  # OSError of a missing library, RuntimeError of a version clash …
        reason = error
    else:
        return False
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchaudio"]:
        del sys.modules[name]  # half-imported parts
    # The import system takes None for "known to be absent", find_spec included.
    sys.modules["torchaudio"] = None  # type: ignore[assignment]
    logger.info(
        "torchaudio is installed but cannot be loaded (%s): hidden from this process.", reason
    )
    return True
