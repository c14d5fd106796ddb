# SPDX-License-Identifier: Apache-2.0
"""Every error this package raises on purpose.

Each one also derives from the built-in error a caller would expect, so `except ValueError` keeps
working; `except MSDDAError` catches them all. Messages give the offending value and what is valid.
"""

__all__ = [
    "AdapterMismatch",
    "AssetsMissing",
    "BackendUnavailable",
    "CaptureError",
    "EngineClosed",
    "EngineFailed",
    "InvalidAdapter",
    "InvalidMode",
    "InvalidOutput",
    "InvalidRequest",
    "InvalidSchedule",
    "InvalidShape",
    "InvalidWeights",
    "MSDDAError",
    "NotFinite",
    "PipelineBusy",
    "QueueFull",
    "RankLost",
    "RanksDiffer",
    "RequestTimeout",
    "ResumeMismatch",
    "RewardUnavailable",
    "UnfaithfulMerge",
    "UnknownObjective",
    "UnsupportedNetwork",
    "WriteFailed",
    "ZeroVariance",
]


class MSDDAError(Exception):
    """Base of all errors of this package.

    Attributes:
        field: The field of an `ImageRequest` that `Engine.submit` refused; None for other errors.
    """

    field: str | None = None


class InvalidWeights(MSDDAError, ValueError):
    """Preference weights do not lie on the simplex, or leave no positive precision."""


class InvalidShape(MSDDAError, ValueError):
    """A tensor has the wrong shape, dtype or device; the message gives both."""


class InvalidSchedule(MSDDAError, ValueError):
    """Steps, a noise level, guidance or a scheduler setting for which no step is defined."""


class InvalidMode(MSDDAError, ValueError):
    """The mode is unknown, or this pipeline cannot run it; the message says which modes can run."""


class AdapterMismatch(MSDDAError, ValueError):
    """An adapter was made for another base network; the message names the first such module."""


class InvalidAdapter(MSDDAError, ValueError):
    """An adapter's file is damaged, or is no LoRA that can run; the message names the file."""


class NotFinite(MSDDAError, FloatingPointError):
    """A run ended in NaN or infinity; the message says which samples."""


class UnfaithfulMerge(MSDDAError, ValueError):
    """Rounding a merged weight would lose too much of an adapter; the message says how much."""


class UnsupportedNetwork(MSDDAError, ValueError):
    """A network has a part that the batched forward does not support; the message names it."""


class ZeroVariance(MSDDAError, ValueError):
    """Fused variances are zero in a combination that has no unique limit."""


class UnknownObjective(MSDDAError, KeyError, ValueError):
    """A name is not one of the loaded objectives."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument, which turns a sentence into a quoted string
        return Exception.__str__(self)


class PipelineBusy(MSDDAError, RuntimeError):
    """A callback called a pipeline that is in a call which waits for the callback."""


class BackendUnavailable(MSDDAError, RuntimeError):
    """A backend requested by name cannot run here; the message says what is missing."""


class AssetsMissing(MSDDAError, FileNotFoundError):
    """Files that only a checkout of the repository has, such as the sprites, are not here."""


class InvalidOutput(MSDDAError, OSError):
    """A file cannot be written where it should be; found before any work."""


class WriteFailed(MSDDAError, OSError):
    """A file could not be written; the message says which and why. An old one is still there."""


class RewardUnavailable(MSDDAError, RuntimeError):
    """A reward's package or checkpoint is missing; the message gives the command to get it."""


class ResumeMismatch(MSDDAError, ValueError):
    """Kept results were made with other settings; the message says which, and what to do."""


class RankLost(MSDDAError, RuntimeError):
    """Another process of a parallel run failed, died, or was silent for too long."""


class RanksDiffer(MSDDAError, ValueError):
    """The processes of a parallel run got different arguments; the message says which."""


class CaptureError(MSDDAError, RuntimeError):
    """A step could not be captured into a CUDA graph."""


class InvalidRequest(MSDDAError, ValueError):
    """A field of an `ImageRequest` is invalid and no other error fits; `field` names it."""


class QueueFull(MSDDAError, RuntimeError):
    """The engine's queue has no room for the request; try again later.

    Attributes:
        client: The client that has too many images waiting; None: too many of all clients are.
        retry_after_s: When there will be room, an estimate in seconds.
    """

    client: str | None = None
    retry_after_s: float = 1.0


class RequestTimeout(MSDDAError, TimeoutError):
    """A request timed out before its image was drawn."""


class EngineClosed(MSDDAError, RuntimeError):
    """The engine is closed: it accepts no more requests, and this one was not drawn."""


class EngineFailed(MSDDAError, RuntimeError):
    """A batch could not be drawn, or the whole engine failed; `__cause__` is the reason."""
