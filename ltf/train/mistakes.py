"""What a person can mend: one line says how, and no traceback."""

from __future__ import annotations

from ltf.checkpoint.load import LoadError
from ltf.config.errors import ConfigError
from ltf.data.errors import DataError
from ltf.guard.drill import DrillError
from ltf.model.args import ModelArgsError
from ltf.model.hf_config import HfError
from ltf.parallel.layout import LayoutError
from ltf.parallel.stages import StagesError
from ltf.parallel.world import WorldError
from ltf.train.lock import OutputError, Taken

WRONG, LOCKED, BROKEN = 2, 75, 1

MISTAKES = (
    ConfigError,
    DataError,
    DrillError,
    HfError,
    LayoutError,
    LoadError,
    ModelArgsError,
    OutputError,
    StagesError,
    Taken,
    WorldError,
)


def status_of(error: BaseException) -> int:
    """With which status a process ends that met this error."""
    if isinstance(error, Taken):
        return LOCKED
    return WRONG if isinstance(error, MISTAKES) else BROKEN
