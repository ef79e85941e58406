"""Power and temperature of the machine while something runs, from what Linux and Android show under /sys; else null.

| source  | power, watts                                                                                             |
|---------|----------------------------------------------------------------------------------------------------------|
| rapl    | processor packages, from energy counters that wrap (`class/powercap/intel-rapl:N`; often for root alone) |
| ina3221 | rails of a Jetson, volts times amperes: the one called VDD_IN, which feeds all others, or their sum      |
| hwmon   | the power that other monitors tell, one reading a device; `power_meter`, the whole machine, comes alone  |
| battery | what flows out of it (`class/power_supply`); nothing while it charges                                    |

The first source that gives a reading at the beginning is kept. The temperature is that of the hottest sensor: of the
processor if one is named so, else of the thermal zones, else of any monitor. A file that vanishes or cannot be read
leaves its sample out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SYS = Path("/sys")
EVERY_S = 1.0
PROCESSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal")
"""Names of monitors that sit in a processor."""
PLAUSIBLE = (0.0, 150.0)
"""Degrees Celsius between which a reading is one; switched-off sensors say 0, or absurdities."""

Read = Callable[[], float | None]


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _word(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _total(reads: list[Read]) -> float | None:
    """The sum, or None if one of them is missing: half of the rails is not the machine's power."""
    values = [read() for read in reads]
    return sum(value for value in values if value is not None) if values and None not in values else None


@dataclass
class Counter:
    """An energy counter in microjoules; `joules` is what came since the last call."""

    path: Path
    name: str
    last: float | None = None

    def joules(self) -> float | None:
        """None the first time, where it cannot be read, and after a wrap whose height is not known."""
        now, last = _number(self.path / "energy_uj"), self.last
        self.last = now
        if now is None or last is None:
            return None
        if now < last:
            highest = _number(self.path / "max_energy_range_uj")
            if highest is None or highest < last:
                return None
            now += highest
        return (now - last) / 1e6


def counters(root: Path) -> list[Counter]:
    """Processor packages; the whole platform (`psys`) where there are none. Their parts have a second colon."""
    found = [Counter(path, _word(path / "name")) for path in sorted(root.glob("class/powercap/intel-rapl:*"))]
    found = [one for one in found if one.path.name.count(":") == 1 and _number(one.path / "energy_uj") is not None]
    return [one for one in found if one.name.startswith("package")] or found


def _monitors(root: Path) -> list[tuple[Path, str]]:
    return [(path, _word(path / "name")) for path in sorted(root.glob("class/hwmon/hwmon*"))]


def _rails(root: Path) -> tuple[str, list[Read]] | None:
    rails: list[tuple[str, Read]] = []
    for monitor, name in _monitors(root):
        for number in (1, 2, 3) if name == "ina3221" else ():
            label = _word(monitor / f"in{number}_label")
            read = _product(monitor / f"in{number}_input", monitor / f"curr{number}_input", 1e-6)
            if label != "NC" and read() is not None:
                rails.append((label or f"rail {number}", read))
    whole = [rail for rail in rails if rail[0] == "VDD_IN"]
    return _named("ina3221", whole or rails)


def _product(volts: Path, amperes: Path, scale: float) -> Read:
    def read() -> float | None:
        v, a = _number(volts), _number(amperes)
        return None if v is None or a is None else abs(v * a) * scale

    return read


def _micro(path: Path) -> Read:
    def read() -> float | None:
        value = _number(path)
        return None if value is None else abs(value) / 1e6

    return read


def _meters(root: Path) -> tuple[str, list[Read]] | None:
    found: list[tuple[str, Read]] = []
    for monitor, name in _monitors(root):
        files = [path for kind in ("average", "input") for path in sorted(monitor.glob(f"power*_{kind}"))]
        reads = [read for read in map(_micro, files) if read() is not None]
        if reads:
            found.append((name or monitor.name, reads[0]))
    return _named("hwmon", [one for one in found if one[0] == "power_meter"] or found)


def _battery(root: Path) -> tuple[str, list[Read]] | None:
    for supply in sorted(root.glob("class/power_supply/*")):
        if supply.name == "battery" or _word(supply / "type") == "Battery":
            direct = _micro(supply / "power_now")
            current = _product(supply / "current_now", supply / "voltage_now", 1e-12)

            def read(supply: Path = supply, direct: Read = direct, current: Read = current) -> float | None:
                # What flows in says nothing about what the machine takes.
                if _word(supply / "status") in ("Charging", "Full", "Not charging"):
                    return None
                value = direct()
                return current() if value is None else value

            if read() is not None:
                return _named("battery", [(supply.name, read)])
    return None


def _named(kind: str, found: list[tuple[str, Read]]) -> tuple[str, list[Read]] | None:
    return (f"{kind}: {', '.join(name for name, _ in found)}", [read for _, read in found]) if found else None


def _celsius(path: Path) -> Read:
    def read() -> float | None:
        value = _number(path)
        return value / 1e3 if value is not None and PLAUSIBLE[0] < value / 1e3 < PLAUSIBLE[1] else None

    return read


def thermometers(root: Path) -> tuple[str, list[Read]] | None:
    """What the sensors are called, and how each is read."""
    groups: list[list[tuple[str, Read]]] = [[], [], []]
    for monitor, name in _monitors(root):
        for path in sorted(monitor.glob("temp*_input")):
            label = _word(path.with_name(path.name.replace("_input", "_label")))
            groups[0 if name in PROCESSORS else 2].append((f"{name} {label}".strip(), _celsius(path)))
    for zone in sorted(root.glob("class/thermal/thermal_zone*")):
        groups[1].append((_word(zone / "type") or zone.name, _celsius(zone / "temp")))
    for kind, group in zip(("hwmon", "thermal_zone", "hwmon"), groups, strict=True):
        working = [(name, read) for name, read in group if read() is not None]
        if working:
            names = dict.fromkeys(name for name, _ in working)
            return f"{kind}: {', '.join(names)}", [read for _, read in working]
    return None


@dataclass
class Meter:
    """Samples once a second between `__enter__` and `__exit__`, in a thread of its own; none where nothing is offered.

    `root` is where /sys is. Samples are (seconds since the beginning, value).
    """

    root: Path = SYS
    power: list[tuple[float, float]] = field(default_factory=list)
    """Watts: between two samples with counters, at the sample with the others."""
    celsius: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._counters = counters(self.root)
        self._power = None
        if self._counters:
            self.power_source: str | None = f"rapl: {', '.join(one.name for one in self._counters)}"
        else:
            self._power = _rails(self.root) or _meters(self.root) or _battery(self.root)
            self.power_source = self._power[0] if self._power else None
        self._heat = thermometers(self.root)
        self._joules, self._seconds = 0.0, 0.0
        self._last: float | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Meter:
        self._begin = time.monotonic()
        if self._heat or self.power_source:
            self.sample(0.0)
            self._thread = threading.Thread(target=self._work, name="penguin-edge meter", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self.sample(time.monotonic() - self._begin)

    def _work(self) -> None:
        while not self._ended.wait(EVERY_S):
            self.sample(time.monotonic() - self._begin)

    def sample(self, at: float) -> None:
        """Read everything; `at` is seconds since the beginning."""
        if self._heat:
            degrees = [value for value in (read() for read in self._heat[1]) if value is not None]
            if degrees:
                self.celsius.append((at, max(degrees)))
        if self._counters:
            joules = _total([one.joules for one in self._counters])
            if joules is not None and self._last is not None and at > self._last:
                self._add(joules, at - self._last)
                self.power.append((at, joules / (at - self._last)))
            self._last = at
        elif self._power:
            watts = _total(self._power[1])
            if watts is not None:
                if self._last is not None:
                    self._add((self.power[-1][1] + watts) / 2 * (at - self._last), at - self._last)
                self.power.append((at, watts))
            self._last = None if watts is None else at

    def _add(self, joules: float, seconds: float) -> None:
        self._joules += joules
        self._seconds += seconds

    def to_json(self) -> dict[str, Any]:
        """`power_w` {mean, max}, `energy_j` of the time that was metered, `temperature_c` {begin, end, max}, `sensors`;
        null where nothing was read."""
        watts, degrees = [w for _, w in self.power], [c for _, c in self.celsius]
        mean = self._joules / self._seconds if self._seconds else None
        return {
            "power_w": {"mean": mean, "max": max(watts)} if mean is not None else None,
            "energy_j": self._joules if self._seconds else None,
            "temperature_c": {"begin": degrees[0], "end": degrees[-1], "max": max(degrees)} if degrees else None,
            "sensors": {
                "power": self.power_source if mean is not None else None,
                "temperature": self._heat[0] if self._heat and degrees else None,
            },
        }
