"""The errors that the package raises for a caller's mistakes.

    LosslessError
    ├── ConfigurationError      a setting that cannot be used (also a ValueError)
    ├── DataError               rows that cannot be used (also a ValueError)
    ├── CalibrationError        the model or its loss cannot be measured (also a RuntimeError)
    ├── UnreachableTargetError  no plan meets the ratio, the bytes or the loss asked (also a ValueError)
    ├── PlanError               a plan that does not fit the model (also a ValueError)
    ├── CheckpointError         a saved folder that cannot be trusted or written (also an OSError)
    └── HubError                the Hub refused a push, or cannot be reached (also an OSError)

A message names the thing, the value it had and the remedy. Every class also derives from the built-in exception that a
caller who does not know this package would catch.
"""

from typing import Any


def reason(error: BaseException) -> str:
    """Formats the message of another library's error in one line without a full stop.

    The message is that of the error's cause where there is one, since datasets wraps errors without their message.
    """
    cause = error.__cause__ or error
    return " ".join(str(cause).split()).rstrip(".") or type(cause).__name__


class LosslessError(Exception):
    """Base of all errors of this package."""


class ConfigurationError(LosslessError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(LosslessError, ValueError):
    """The rows are missing, empty, or not of the model's task."""


class CalibrationError(LosslessError, RuntimeError):
    """The loss cannot be computed, or is not finite."""


class UnreachableTargetError(LosslessError, ValueError):
    """No plan meets the target."""


class PlanError(LosslessError, ValueError):
    """A plan is malformed or names layers that the model does not have."""


class CheckpointError(LosslessError, OSError):
    """A saved folder is incomplete, altered, of a newer format, or in the way of writing."""


class HubError(LosslessError, OSError):
    """The Hub refused, or cannot be reached."""


def check_whole_number(name: str, value: Any, lowest: int) -> None:
    """Raises ConfigurationError where a setting is not a whole number of at least `lowest`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise ConfigurationError(f"{name}={value!r} is not a whole number of at least {lowest}. Give one.")
