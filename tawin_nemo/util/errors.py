"""All errors that this package raises deliberately.

Exit codes of the command line: ``UserError`` and its subclasses end with 2 (the user can correct it), everything else
with 1 (a failure of the hardware or of this software), ``Preempted`` with 75 (run the same command again).
Messages say three things: what is wrong, the value seen, what to do.
"""

#: Exit code of `retrain` when the gate rejected the new model: a result, not an error.
REFUSED = 3


class TawinError(Exception):
    """Base class of all errors that this package raises deliberately."""

    exit_code = 1


class UserError(TawinError, ValueError):
    """A mistake that the user can correct: a recipe key, a missing file, an impossible combination."""

    exit_code = 2


class ConfigError(UserError):
    """A recipe or an override that cannot be used; names the key, the value and the remedy."""


class DataError(UserError):
    """Input data that cannot be used: unreadable, empty after filtering, inconsistent."""


class CatalogError(UserError):
    """Items, token paths or semantic IDs that do not form a valid catalog."""


class CheckpointError(TawinError):
    """A checkpoint that is incomplete, corrupt or of another model."""


class NonFiniteStep(TawinError):
    """The loss or the gradient of an optimizer step is not finite; the weights were not changed."""


class Preempted(TawinError):
    """The time limit was reached or a signal came; the state is saved and the same command continues it."""

    exit_code = 75
