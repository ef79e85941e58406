"""How long things really take: predicted times, corrected by what was seen of late.

A prediction `x` becomes `added + factor * x`: what the machine does besides takes its time whatever the work, and a
slower machine takes a multiple of it. A resistant line through the points of the last `WINDOW_S` seconds tells the two
apart. Its slope is the median of the slopes between the points that were predicted to take little and those that were
predicted to take much; the rest is the median of what is left (Theil and Sen, with groups as Tukey has them, but of
unlike sizes: most frames are small, and it is the few large ones that come close to a limit).
Where predictions hardly differ, nothing tells the two apart, and both are scaled alike. In between, the slope counts as
far as the noise leaves it certain, against the one that was known when the points began.

What is left after the line is noise, in milliseconds, kept with the work that it came with. The `NEAR` residuals of the
work that is most like it count. To larger work a residual counts as it is: what else a machine does takes its time. To
smaller work it counts in proportion: longer work is disturbed for longer, and a large frame that was slow says little
of small ones.

When all of the times of `LASTING_S` seconds, and `RUN` at least, lie outside of all but a tenth of the noise, on one
side, the machine has changed: what was seen before is forgotten, and these times are no noise. By chance that happens
once in 4,000 times, and an accident of the machine that hits a few frames in a row is over by then.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

WINDOW_S, POINTS = 30.0, 128
"""Age and number of the points that a line goes through, at most."""
NOISE = 256
"""Residuals that are kept."""
RUN, LASTING_S, CHANGE = 3, 1.0, 0.05
"""Times in a row, seconds that they last, and the share by which they differ from what is expected, at least."""
LOWEST, SMALLEST = 1e-3, 1e-6
"""Least factor, since no machine is a thousand times as fast as it was said to be, and least duration."""
SPREAD = 1.5
"""Least ratio between predictions of the two groups that a slope is read from."""
NEAR, ALIKE = 48, 4
"""Residuals that count, and the sizes of work in each doubling for which the noise is worked out."""
UNSURE, NORMAL = 0.5, 1.25 * 1.48
"""How far the known slope may be off, as a share of it; and the standard error of a median of normal noise over that of
a mean, times its standard deviation over its median deviation."""
RARE, LEARN, STRETCH = 0.05, 0.1, (0.8, 1.6)
"""Share of times that may be longer than `Seen.p95`; how fast the noise that is reckoned with follows those that were,
and how many times as loud as of late it may be taken for. Noise comes in bursts, and what was seen of late
foretells less of it than it seems. With steps like these, that share tends to `RARE` whatever the noise is like
(adaptive conformal inference: Gibbs and Candès, 2021, arXiv 2106.00170). The noise is stretched, no rarer share of it
taken: a machine that stood still once is not to count as one that does so often."""
LEAST = 6
"""Points that it takes, and residuals that noise is read from."""
ASSUMED = (*np.linspace(-0.1, 0.1, 38).tolist(), 0.25, 0.25)
"""Residuals before any are seen, over the first prediction: a tenth either way, and one of twenty takes a
quarter longer. They are so many that an accident at the beginning, when everything is cold, is not yet the usual."""


@dataclass(frozen=True)
class Seen:
    """One time: as predicted by the line before it, the 95th percentile of that, and as taken; milliseconds."""

    predicted: float
    p95: float
    taken: float


class Pace:
    """The line and its noise for one kind of work. Times in seconds of any clock, durations in milliseconds."""

    def __init__(self, added: float = 0.0, like: Pace | None = None) -> None:
        """
        Args:
            added: what is thought to come on top, until it is seen.
            like: other work of the same machine, which is disturbed as much as this one until that is seen.
        """
        self.added, self.factor = added, 1.0
        self._like, self._known = like, 1.0
        """The factor when the points began."""
        self.changed: float | None = None
        """By how much times grew with the last one seen, where that said that the machine has changed."""
        self._points: deque[tuple[float, float, float]] = deque(maxlen=POINTS)
        self._noise: deque[tuple[float, float]] = deque(maxlen=NOISE)
        """Work as predicted, and residuals."""
        self._quantiles: dict[tuple[float, int], float] = {}
        """Quantiles of the noise by share and work, until the next time is seen."""
        self._stretch = 1.0
        """How many times as loud as of late the noise is taken to be, above the line."""
        self._assumed = self._run = 0
        self._since = 0.0
        """When the times in a row began."""

    def expect(self, x: float) -> float:
        """What is predicted to take `x` takes about so long."""
        return self.added + self.factor * x

    def beyond(self, x: float, share: float) -> float:
        """What comes on top of `expect(x)` at most, in this share of cases, in milliseconds: as seen of late, or as
        assumed. Never on the other side of it than the share says: while a machine gets faster, all is below."""
        if self._unseen:
            found = float(np.quantile(ASSUMED, share)) * self.expect(x)
        else:
            found = self._seen_beyond(round(ALIKE * math.log2(max(x, SMALLEST))), share)
        if share < 0.5:
            return min(found, 0.0)
        like = self._like.beyond(x, share) if self._like and (self._unseen or self._assumed) else 0.0
        return max(found, like) * self._stretch

    def _seen_beyond(self, size: int, share: float) -> float:
        if (share, size) not in self._quantiles:
            work, left = np.array(self._noise)[::-1].T  # of several that are as like it, the latest
            ratios = self.expect(2 ** (size / ALIKE)) / (self.added + self.factor * work)
            near = np.argsort(np.abs(np.log(ratios)), kind="stable")[:NEAR]
            seen = np.sort(left[near] * np.minimum(1.0, ratios[near]))
            # So that of the next ones this share is below it, not of those that it comes from.
            at = min(max((len(seen) + 1) * share - 1, 0.0), len(seen) - 1)
            self._quantiles[share, size] = float(np.interp(at, range(len(seen)), seen))
        return self._quantiles[share, size]

    def at_most(self, x: float, share: float) -> float:
        """What is predicted to take `x` takes no longer, in this share of cases."""
        return self.expect(x) + self.beyond(x, share)

    @property
    def _unseen(self) -> bool:
        """No noise was seen yet, or changes have taken it."""
        return len(self._noise) < LEAST

    def scale(self, ratio: float) -> None:
        """Everything takes so many times as long from now on, as seen elsewhere."""
        self.added, self.factor, self._known = ratio * self.added, ratio * self.factor, ratio * self._known
        seen = [(at, x, ratio * taken) for at, x, taken in self._points]
        self._points.clear()
        self._points.extend(seen)
        self._louder(ratio)
        self._run = 0

    def _louder(self, ratio: float) -> None:
        """Noise is so many times as loud from now on."""
        self._noise = deque(((x, ratio * left) for x, left in self._noise), maxlen=NOISE)
        self._quantiles.clear()

    def observe(self, now: float, x: float, taken: float, factor: float | None = None) -> Seen:
        """One more time.

        Args:
            factor: how slow the machine is, where other work has shown it; what is left is added.
        """
        x = max(x, SMALLEST)
        expected = self.expect(x)
        if self._unseen:
            self._noise.clear()
            self._noise.extend((x, one * expected) for one in ASSUMED)
            self._assumed = len(ASSUMED)
            self._quantiles.clear()
        p95 = self.at_most(x, 1 - RARE)
        side = 0
        if abs(taken - expected) > CHANGE * expected:
            side = (taken > expected + (p95 - expected) / self._stretch) - (taken < self.at_most(x, RARE))
        if side * self._run <= 0:
            self._run, self._since = 0, now
        self._run += side
        self._points.append((now, x, taken))
        while now - self._points[0][0] > WINDOW_S:
            self._points.popleft()
        if not self._assumed:  # what is only assumed foretells nothing
            self._stretch *= math.exp(LEARN * ((taken > p95) - RARE))
            self._stretch = min(max(self._stretch, STRETCH[0]), STRETCH[1])
        self.changed = None
        if abs(self._run) >= RUN and now - self._since >= LASTING_S:
            self._begin_anew(x, factor)
        else:
            if self._assumed:  # each that is seen takes the place of one
                self._noise.popleft()
                self._assumed -= 1
            self._noise.append((x, taken - expected))
            self._draw(factor)
        self._quantiles.clear()
        return Seen(expected, p95, taken)

    def _begin_anew(self, x: float, factor: float | None) -> None:
        """Only the latest points tell of the machine as it is."""
        before = self.expect(x)
        run = abs(self._run)
        while len(self._points) > run:
            self._points.popleft()
        for _ in range(min(run - 1, len(self._noise))):
            self._noise.pop()
        self._assumed, self._run = min(self._assumed, len(self._noise)), 0
        self._draw(factor)
        self._known = self.factor
        self.changed = self.expect(x) / before
        self._louder(self.changed)

    def _draw(self, factor: float | None) -> None:
        if len(self._points) < RUN:
            return
        x, taken = np.array(sorted((x, taken) for _, x, taken in self._points)).T
        if factor is not None:
            self._set(max(factor, LOWEST), x, taken, x, taken)
            return
        low, high, fewest = _apart(x)
        if len(x) < LEAST or np.median(x[high]) < SPREAD * np.median(x[low]):
            ratio = float(np.median(taken / np.maximum(self.added + self.factor * x, SMALLEST)))
            self.added, self.factor = ratio * self.added, max(ratio * self.factor, LOWEST)
            return
        apart = np.maximum(x[high, None] - x[low], SMALLEST)
        slope = float(np.median((taken[high, None] - taken[low]) / apart))
        left = taken - slope * x
        spread = NORMAL * float(np.median(np.abs(left - np.median(left))))
        unsure = spread * math.sqrt(2 / fewest) / float(np.median(x[high]) - np.median(x[low]))
        believed = 1 / (1 + (unsure / (UNSURE * self._known)) ** 2)
        self._set(max(self._known + believed * (slope - self._known), LOWEST), x, taken, x[high], taken[high])

    def _set(self, factor: float, x: Numbers, taken: Numbers, most: Numbers, longest: Numbers) -> None:
        """Take this factor, and what is left as added; `most` took `longest`, which counts where nothing is added."""
        added = float(np.median(taken - factor * x))
        if added < 0:
            factor, added = max(float(np.median(longest / most)), LOWEST), 0.0
        self.added, self.factor = added, factor


def _apart(x: Numbers) -> tuple[slice, slice, int]:
    """Where the small and the large ones of sorted numbers are, and how many there are of the fewer: on either side of
    the middle of all sizes, or the outer thirds where hardly any are on one side."""
    middle = int(np.searchsorted(x, math.sqrt(x[0] * x[-1]), "right"))
    fewest = min(middle, len(x) - middle)
    if fewest >= RUN:
        return slice(middle), slice(middle, None), fewest
    third = max(1, len(x) // 3)
    return slice(third), slice(len(x) - third, None), third
