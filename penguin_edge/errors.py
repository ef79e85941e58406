"""Every failure a user can cause or meet, as one small family.

A message says what was found, what was wanted and what to do; the command line prints it as it is.
"""

from __future__ import annotations


class PenguinError(Exception):
    """Base of all errors raised on purpose; the message is meant for the user."""


class InputError(PenguinError, ValueError):
    """An image, clip, prompt or option that cannot be used as it is."""


class WriteError(InputError):
    """A file that cannot be written, as on a full disk or in a folder that is not there; it is as it was.

    `reason` is what the system said, such as "No space left on device".
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class SettingError(PenguinError):
    """An environment variable with a value that cannot be used, or that is at odds with what was asked for.

    No kind of `InputError` or of a fault in a file: whoever reads a file passes it on as it is, without advice about
    the file.
    """


class CheckpointError(PenguinError):
    """A checkpoint that is missing, damaged, or does not fit its configuration."""


class BundleError(PenguinError):
    """A bundle that is missing, damaged, or made by another schema or toolchain."""


class BudgetError(InputError):
    """A token budget or a context length that cannot hold what was asked for."""


class MemoryLimitError(PenguinError):
    """Work refused before it starts because it would not fit in memory."""


class TargetUnavailable(PenguinError):
    """An engine or exporter that is not installed; the message holds the `pip install` line."""


class BusyError(InputError):
    """A session, a stream or an engine that is at work for another caller; the call changed nothing."""
