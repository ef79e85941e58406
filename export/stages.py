"""How far an export is and how long the rest will take: the stages of a part, what they cost, and what a worker says.

A worker prints a line when a stage begins, between the exporters' chatter:

    progress AT COST TOTAL NAME

AT, COST and TOTAL are expected seconds of the part: before this stage, of it, and of all. Only their proportions
matter: the time left is stretched by what the work took so far, on a machine of any speed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from penguin_edge.export.cases import CASES, DECODED
from penguin_edge.model.checkpoint import Checkpoint, meta_model
from penguin_edge.quantize.apply import DECODERS, chosen, linears
from penguin_edge.quantize.recipe import Recipe

START, VERIFY = "start", "verify"
"""Names that need no model: a process that imports its tools, and the comparison at the end."""
LOAD, PROMPT, CHECK, TRACE, COMPILE, WRITE = "load", "check data: prompt", "check data", "trace", "compile", "write"
NS = 1e-9
START_SECONDS = 2.5
LOAD_NS = {True: 10.0, False: 1.5}
"""Per weight: random ones, stored ones."""
ROUND_NS = {"rtn": 2.0, "mse": 20.0, "gptq": 2.0}
"""Per weight that becomes an integer, its error included; of gptq the integers are ready."""
PASS_NS, ROW_NS = {True: 0.35, False: 0.3}, 0.015
"""Per weight of an eager pass, quantized or not, and of each row on top."""
TRACE_SECONDS, TRACE_BLOCK_SECONDS = 3.0, 0.6
WRITE_SECONDS, WRITE_NS = 1.5, 1.5
"""Writing any graph, and each byte of it."""
COMPILE_NS = 3.0
"""Per weight, where a compiler takes the graph apart."""
LINE = re.compile(r"^progress (\S+) (\S+) (\S+) (.*)$", re.MULTILINE)
TAIL = 1 << 14
"""Bytes of a log that are looked at: an exporter does not say more within a stage's line."""
SOON = 0.1
"""Share of the work before which its pace says nothing."""


@dataclass(frozen=True)
class WorkStage:
    """A piece of a part's work, and the seconds that it is expected to take on two cores."""

    name: str
    seconds: float


def part_stages(checkpoint: Checkpoint, part: str, recipe: Recipe, compiles: bool) -> list[WorkStage]:
    """What a worker does for a part, in order; a quantized layer goes by its own name.

    Args:
        compiles: whether the target takes the graph apart once it is traced.
    """
    drawn = LOAD_NS[checkpoint.stored is None] * NS
    if part == "embedding":
        count = checkpoint.parameter_bytes(part, 1)
        quantized = ROUND_NS["mse"] * NS if recipe.embedding == "int4" else 0.0
        return [WorkStage(START, START_SECONDS), WorkStage(WRITE, (drawn + 4 * WRITE_NS * NS + quantized) * count)]
    module = DECODERS.get(part, part)
    count = checkpoint.parameter_bytes(module, 1)
    model = meta_model(checkpoint.config, [module])
    text = module == "decoder"
    found = [WorkStage(START, START_SECONDS), WorkStage(LOAD, drawn * count)]
    size, quantized = 4.0 * count if recipe.precision == "fp32" else 2.0 * count, False
    for layer, linear in linears(model, part).items():
        scheme, _ = chosen(recipe, layer, linear.in_features)
        if scheme is not None:
            weights = linear.in_features * linear.out_features
            found.append(WorkStage(layer, ROUND_NS[scheme.method] * NS * weights))
            size, quantized = size - weights * (4 - scheme.bits / 8), True
    step = PASS_NS[quantized] * NS * count
    passes = 1 + quantized
    patches = sum(height // 14 * (width // 14) for _, _, height, width, _ in CASES)
    if text:
        found.append(WorkStage(PROMPT, passes * (step + 64 * ROW_NS * NS * count)))
        if part == "decoder":
            found += [WorkStage(step_name(index), step) for index in range(DECODED)]
    else:
        found.append(WorkStage(CHECK, passes * (len(CASES) * step + patches * ROW_NS * NS * count)))
    blocks = len(getattr(getattr(model, module), "layers", ()))
    found.append(WorkStage(TRACE, TRACE_SECONDS + TRACE_BLOCK_SECONDS * blocks))
    if compiles:
        found.append(WorkStage(COMPILE, COMPILE_NS * NS * count + TRACE_BLOCK_SECONDS * blocks))
    return [*found, WorkStage(WRITE, WRITE_SECONDS + WRITE_NS * NS * size)]


def step_name(index: int) -> str:
    """How a token of the check data is called."""
    return f"{CHECK}: token {index + 1} of {DECODED}"


def verify_seconds(checkpoint: Checkpoint) -> float:
    """What the comparison at the end is expected to take."""
    return START_SECONDS + 2.4 * NS * checkpoint.parameter_bytes("decoder", 1)


def seconds_of(stages: Sequence[WorkStage]) -> float:
    return sum(stage.seconds for stage in stages)


class Teller:
    """A worker's side: tells which stage begins."""

    def __init__(self, stages: Sequence[WorkStage], say: Callable[[str], None]) -> None:
        self._stages, self._say, self._next = list(stages), say, 0
        self._total = seconds_of(stages)
        layers = [stage.name for stage in stages if "." in stage.name]
        self._shown = {name: f"quantize layer {index} of {len(layers)}" for index, name in enumerate(layers, 1)}

    def begin(self, name: str) -> None:
        """Say that a stage begins; what is no stage, or lies behind, goes unsaid."""
        names = [stage.name for stage in self._stages[self._next :]]
        if name not in names:
            return
        at = self._next + names.index(name)
        before = seconds_of(self._stages[:at])
        self._say(progress_line(before, self._stages[at].seconds, self._total, self._shown.get(name, name)))
        self._next = at + 1


def progress_line(at: float, cost: float, total: float, name: str) -> str:
    """What a worker prints; see the top of this file."""
    return f"progress {at:.6g} {cost:.6g} {total:.6g} {name}"


class Follower:
    """A parent's side: what a worker does by its own last line, and which share of its work is done."""

    def __init__(self, log: Path, expected: float | None) -> None:
        """Take `expected` seconds for the whole part; None where nobody knows before the worker says so."""
        self._log = log
        self._line = (0.0, min(START_SECONDS, expected or 0.0), expected or 0.0, "")
        self._since = 0.0

    def look(self, seconds: float) -> tuple[str, float | None]:
        """The stage, and the share that is done, `seconds` after the part began; None: it cannot be told yet."""
        found = self._last()
        if found is not None and found != self._line:
            self._line, self._since = found, seconds
        at, cost, total, name = self._line
        if total <= 0:
            return name, None
        # Within a stage at the pace of those before it.
        pace = at / self._since if at > 0 and self._since > 0 else 1.0
        return name, min((at + min(cost, pace * (seconds - self._since))) / total, 1.0)

    def _last(self) -> tuple[float, float, float, str] | None:
        try:
            with self._log.open("rb") as stream:
                stream.seek(max(0, self._log.stat().st_size - TAIL))
                text = stream.read().decode(errors="replace")
        except OSError:
            return None
        lines = LINE.findall(text[: text.rfind("\n") + 1])  # a line may be half written
        if not lines:
            return None
        at, cost, total, name = lines[-1]
        return float(at), float(cost), float(total), name


class TimeLeft:
    """The rest of an export: what each part is expected to take, stretched by what the work so far took."""

    def __init__(self) -> None:
        self._expected: dict[str, float] = {}
        self._done: set[str] = set()
        self._worth = self._took = 0.0

    def plan(self, expected: Mapping[str, float]) -> None:
        """Seconds of parts to come; of others nothing is known but what they say while they work."""
        self._expected = dict(expected)

    def done(self, part: str, seconds: float) -> None:
        """A part has ended."""
        self._done.add(part)
        if part in self._expected:
            self._worth += self._expected[part]
            self._took += seconds

    def left(self, part: str, seconds: float, share: float | None) -> float | None:
        """Seconds from now to the end of all parts; None while the pace cannot be told.

        Args:
            seconds, share: how long `part` has taken, and which share of it that was, None for what says nothing of
                itself; it may have ended.
        """
        rest = sum(value for name, value in self._expected.items() if name not in self._done and name != part)
        ended = part in self._done
        if not ended and part not in self._expected:
            # It says how far it is itself; what follows keeps to what is expected.
            if not share:
                return None
            pace = self._took / self._worth if self._worth else 1.0
            return seconds * (1 - share) / share + rest * pace
        here = 0.0
        if not ended:
            pace = self._took / self._worth if self._worth else 1.0
            whole = self._expected[part]
            here = whole * share if share is not None else min(whole, seconds / pace)
        worth, took = self._worth + here, self._took + (0.0 if ended else seconds)
        if not ended:
            rest += self._expected[part] - here
        if not worth or worth < SOON * (worth + rest):
            return None
        return rest * took / worth
