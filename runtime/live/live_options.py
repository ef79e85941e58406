"""Options of a live stream; see `options.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from penguin_edge.errors import InputError
from penguin_edge.runtime.core.checks import check_options
from penguin_edge.runtime.latency.control import LatencyTarget
from penguin_edge.runtime.latency.cost import CostModel
from penguin_edge.schema import Maybe, Real, Whole


@dataclass(frozen=True)
class LiveOptions:
    """What a live stream takes of what comes."""

    queued: int = 4
    """Frames that wait at most."""
    fps: float | None = None
    """Frames taken per second of their own time; None takes all."""
    target: LatencyTarget | None = None
    """What the controller keeps to, beginning with the first frame, before which the engine is warmed up (`Live.wait`
    waits for it). A target that cannot be kept is an error of that frame, and given up."""
    cost: CostModel | None = None
    """What stages take on this machine (`penguin-edge profile`); a target needs it."""
    rate: float | None = None
    """Frames per second that the controller expects before they come; None: `fps`."""
    size: tuple[int, int] | None = None
    """Pixels, (height, width), of the frames that are to come, where that is known: with a target, what depends on it
    is then done while the engine is warmed up. Others may come."""

    def __post_init__(self) -> None:
        rate = Maybe(Real(above=0))
        check_options(queued=(self.queued, Whole(1)), fps=(self.fps, rate), rate=(self.rate, rate))
        for side in self.size or ():
            check_options(size=(side, Whole(1)))
        for name, value, kind in (("target", self.target, LatencyTarget), ("cost", self.cost, CostModel)):
            if value is not None and not isinstance(value, kind):
                raise InputError(f"{name}: {type(value).__name__}, wanted a {kind.__name__}, or None")
        if self.target is not None and self.cost is None:
            raise InputError("a latency target needs to know this machine; run `penguin-edge profile BUNDLE` first")


class LiveChanges(TypedDict, total=False):
    """`LiveOptions` by name."""

    queued: int
    fps: float | None
    target: LatencyTarget | None
    cost: CostModel | None
    rate: float | None
    size: tuple[int, int] | None
