# SPDX-License-Identifier: Apache-2.0
"""Every error this package raises on purpose.

Each one also derives from the built-in error a caller would expect, so `except ValueError` keeps
working; `except MSDDAError` catches them all. Messages hold the offending value and the accepted.
"""

__all__ = [
    "AdapterMismatch",
    "AssetsMissing",
    "BackendUnavailable",
    "CaptureError",
    "EngineClosed",
    "EngineFailed",
    "InvalidMode",
    "InvalidRequest",
    "InvalidSchedule",
    "InvalidShape",
    "InvalidWeights",
    "MSDDAError",
    "QueueFull",
    "RankLost",
    "RanksDiffer",
    "RequestTimeout",
    "RewardUnavailable",
    "UnfaithfulMerge",
    "UnknownObjective",
    "UnsupportedNetwork",
    "ZeroVariance",
]


class MSDDAError(Exception):
    """Base of all errors of this package.

    Attributes:
        field: Name of the field of an `ImageRequest` that `Engine.submit` refused; None elsewhere.
    """

    field: str | None = None


class InvalidWeights(MSDDAError, ValueError):
    """Preference weights are not a point of the simplex, or leave no positive precision."""


class InvalidShape(MSDDAError, ValueError):
    """A tensor has the wrong shape, dtype or device; the message gives both."""


class InvalidSchedule(MSDDAError, ValueError):
    """Steps, a noise level, guidance or a scheduler setting for which no step is defined."""


class InvalidMode(MSDDAError, ValueError):
    """An unknown mode, or one that this pipeline cannot run; the message lists those it can."""


class AdapterMismatch(MSDDAError, ValueError):
    """An adapter was made for another base network; the message names the first such module."""


class UnfaithfulMerge(MSDDAError, ValueError):
    """Rounding a merged weight would lose too much of an adapter; the message says how much."""


class UnsupportedNetwork(MSDDAError, ValueError):
    """A network has a part that the batched forward does not know; the message names it."""


class ZeroVariance(MSDDAError, ValueError):
    """Fused variances are zero in a combination that has no unique limit."""


class UnknownObjective(MSDDAError, KeyError, ValueError):
    """An objective name is not one of the loaded ones."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument, which turns a sentence into a quoted string
        return Exception.__str__(self)


class BackendUnavailable(MSDDAError, RuntimeError):
    """A backend asked for by name cannot run here; the message says what is missing."""


class AssetsMissing(MSDDAError, FileNotFoundError):
    """Files that only a checkout of the repository has, such as the sprites, are not here."""


class RewardUnavailable(MSDDAError, RuntimeError):
    """A reward's package or checkpoint is missing; the message has the line that installs it."""


class RankLost(MSDDAError, RuntimeError):
    """Another process of a parallel run failed, died, or was silent for too long."""


class RanksDiffer(MSDDAError, ValueError):
    """The processes of a parallel run were asked for different things; the message says in what."""


class CaptureError(MSDDAError, RuntimeError):
    """A step could not be captured into a CUDA graph."""


class InvalidRequest(MSDDAError, ValueError):
    """A field of an `ImageRequest` has a value that no other error names; see `field`."""


class QueueFull(MSDDAError, RuntimeError):
    """An engine has as many requests waiting as it may; come back later."""


class RequestTimeout(MSDDAError, TimeoutError):
    """A request's time was up before its image was there."""


class EngineClosed(MSDDAError, RuntimeError):
    """An engine was closed: it takes no more requests, and this one was not drawn."""


class EngineFailed(MSDDAError, RuntimeError):
    """A batch could not be drawn, or the engine as a whole; the cause is `__cause__`."""
