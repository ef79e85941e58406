"""What a worker is given and what it gives back: two JSON files, read like any other input.

| job              | what the worker does                                         | what it gives back |
|------------------|--------------------------------------------------------------|--------------------|
| `ChoiceJob`      | measures layers and chooses a recipe, before anything else   | `ChoiceDone`       |
| `CalibrationJob` | makes integers for all parts, before any is exported         | `CalibrationDone`  |
| `PartJob`        | records the check data of one part, and compiles it          | `PartDone`         |

A report is JSON that goes into the manifest as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from penguin_edge.bundle.contract import Bounds
from penguin_edge.bundle.manifest import TablePlace
from penguin_edge.bundle.rules import BOUNDS, EMBEDDING_DTYPES, FILE_NAME, LAYER, PLACE
from penguin_edge.errors import BundleError, PenguinError
from penguin_edge.files import read_json
from penguin_edge.model.penguin import PARTS
from penguin_edge.quantize.apply import DECODERS, LayerRow
from penguin_edge.quantize.calibration.calibrate import CalibrationOptions
from penguin_edge.quantize.linear import Scheme
from penguin_edge.quantize.recipe import Recipe
from penguin_edge.quantize.search.choice import AutoOptions
from penguin_edge.schema import LARGEST, Flag, Free, Maybe, Real, Record, Rows, Rule, SchemaError, Text, Whole

Done = TypeVar("Done", covariant=True)
Json = dict[str, Any]
"""Any JSON object."""

_path = Text(longest=LARGEST)
_whole = Whole(-(1 << 128), 1 << 128)
_bytes = Maybe(Whole(0, 1 << 128))
_report = Record({}, open=True)
READ = Record({"source": _path, "samples": Whole(1), "length": Whole(1), "seed": _whole, "allow_outside": Flag()})
ORIGIN = Record({"source": _path, "seed": _whole, "random_weights": Flag(), "target": Text(longest=200)})
CHOICE = Record(
    {
        "origin": ORIGIN,
        "auto": Record({"data": READ, "max_size": _bytes, "max_kl": Maybe(Real(0.0)), "max_seq_len": Whole(1)}),
        "kept": _path,
        "max_ram": _bytes,
    }
)
CALIBRATION = Record({"origin": ORIGIN, "recipe": _report, "data": READ, "calibrated": _path, "max_ram": _bytes})
PART = Record(
    {
        "origin": ORIGIN,
        "part": Text(tuple(dict.fromkeys((*PARTS, *DECODERS)))),
        "recipe": _report,
        "calibrated": Maybe(_path),
        "embedding_dtype": Text(EMBEDDING_DTYPES),
        "bounds": BOUNDS,
        "folder": _path,
    }
)
CHOICE_DONE = Record({"recipe": _report, "report": _report})
CALIBRATION_DONE = Record({"report": _report})
PART_DONE = Record({"file": FILE_NAME, "place": Maybe(PLACE), "layers": Rows(LAYER)})
SPENT = {"seconds": Real(0.0), "peak_mb": Real(0.0), "baseline_mb": Real(0.0)}


@dataclass(frozen=True)
class Origin:
    """Which checkpoint is exported, and to which target."""

    source: str
    seed: int
    random_weights: bool
    target: str


@dataclass(frozen=True)
class ChoiceDone:
    """The recipe that was chosen, and what the manifest says of it."""

    recipe: Recipe
    report: Json

    def to_json(self) -> Json:
        return {"recipe": self.recipe.to_json(), "report": self.report}


@dataclass(frozen=True)
class CalibrationDone:
    """What the manifest says of the data that were read."""

    report: Json

    def to_json(self) -> Json:
        return {"report": self.report}


@dataclass(frozen=True)
class PartDone:
    """Where a part is, relative to the bundle's folder, and what became of its layers."""

    file: str
    place: TablePlace | None = None
    """Where int4 rows lie: the embedding's own, or those of a head that may stand for them."""
    layers: tuple[LayerRow, ...] = ()

    def to_json(self) -> Json:
        return asdict(self)


class Job(Protocol[Done]):
    """What one worker does."""

    kind: ClassVar[str]

    @property
    def name(self) -> str:
        """What progress and messages call it."""
        ...

    def to_json(self) -> Json: ...

    def done(self, data: object) -> Done:
        """Read what the worker gave back.

        Raises:
            PenguinError: it is not what such a worker gives.
        """
        ...


@dataclass(frozen=True)
class ChoiceJob:
    """Choose a recipe."""

    kind: ClassVar[str] = "auto"

    origin: Origin
    auto: AutoOptions
    kept: Path
    """The file where measurements are kept."""
    max_ram: int | None = None

    @property
    def name(self) -> str:
        return self.kind

    def to_json(self) -> Json:
        return {**asdict(self), "kept": str(self.kept)}

    @classmethod
    def from_json(cls, data: object) -> ChoiceJob:
        """Read what `to_json` wrote.

        Raises:
            PenguinError: it breaks its rule.
        """
        found = _checked(data, CHOICE, cls.kind)
        auto = AutoOptions(**{**found["auto"], "data": CalibrationOptions(**found["auto"]["data"])})
        return cls(Origin(**found["origin"]), auto, Path(found["kept"]), found["max_ram"])

    def done(self, data: object) -> ChoiceDone:
        found = _checked(data, CHOICE_DONE, self.kind)
        return ChoiceDone(_recipe(found["recipe"]), found["report"])


@dataclass(frozen=True)
class CalibrationJob:
    """Make integers by what the model reads."""

    kind: ClassVar[str] = "calibration"

    origin: Origin
    recipe: Recipe
    data: CalibrationOptions
    calibrated: Path
    """The folder for the integers; those of an earlier run are there already."""
    max_ram: int | None = None

    @property
    def name(self) -> str:
        return self.kind

    def to_json(self) -> Json:
        return {**asdict(self), "recipe": self.recipe.to_json(), "calibrated": str(self.calibrated)}

    @classmethod
    def from_json(cls, data: object) -> CalibrationJob:
        """Read what `to_json` wrote.

        Raises:
            PenguinError: it breaks its rule.
        """
        found = _checked(data, CALIBRATION, cls.kind)
        read = CalibrationOptions(**found["data"])
        return cls(
            Origin(**found["origin"]), _recipe(found["recipe"]), read, Path(found["calibrated"]), found["max_ram"]
        )

    def done(self, data: object) -> CalibrationDone:
        return CalibrationDone(_checked(data, CALIBRATION_DONE, self.kind)["report"])


@dataclass(frozen=True)
class PartJob:
    """Export one part, or write the table."""

    kind: ClassVar[str] = "part"

    origin: Origin
    part: str
    recipe: Recipe
    calibrated: Path | None
    """The folder with the integers of a calibrated recipe."""
    embedding_dtype: str
    bounds: Bounds
    folder: Path

    @property
    def name(self) -> str:
        return self.part

    def to_json(self) -> Json:
        calibrated = None if self.calibrated is None else str(self.calibrated)
        recipe = self.recipe.to_json()
        return {**asdict(self), "recipe": recipe, "calibrated": calibrated, "folder": str(self.folder)}

    @classmethod
    def from_json(cls, data: object) -> PartJob:
        """Read what `to_json` wrote.

        Raises:
            PenguinError: it breaks its rule.
        """
        found = _checked(data, PART, cls.kind)
        return cls(
            Origin(**found["origin"]),
            found["part"],
            _recipe(found["recipe"]),
            None if found["calibrated"] is None else Path(found["calibrated"]),
            found["embedding_dtype"],
            Bounds(**{**found["bounds"], "patch_buckets": tuple(found["bounds"]["patch_buckets"])}),
            Path(found["folder"]),
        )

    def done(self, data: object) -> PartDone:
        found = _checked(data, PART_DONE, self.name)
        place = found["place"]
        return PartDone(found["file"], TablePlace(**place) if place else None, tuple(map(_row, found["layers"])))


@dataclass(frozen=True)
class Outcome(Generic[Done]):
    """What a worker gives back: what came of its job, and what that took."""

    done: Done
    seconds: float
    peak_mb: float
    """Peak memory of the worker, in MB (10^6 bytes), and what its tools alone took of that."""
    baseline_mb: float


def write_job(path: Path, job: Job[object]) -> None:
    """Write a job for a worker. Paths may hold bytes that are no UTF-8: JSON escapes them."""
    path.write_text(json.dumps({job.kind: job.to_json()}), encoding="utf-8")


def read_job(path: Path) -> ChoiceJob | CalibrationJob | PartJob:
    """The job in a file that `write_job` wrote.

    Raises:
        PenguinError: no job is there, or it breaks its rule.
    """
    try:
        # Not `read_json`, which refuses the halves of characters that stand for bytes of a path.
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PenguinError(f"{path}: cannot be read as a job ({error})") from error
    kinds = {kind.kind: kind for kind in (ChoiceJob, CalibrationJob, PartJob)}
    if not isinstance(data, dict) or len(data) != 1 or not set(data) <= set(kinds):
        raise PenguinError(f"{path}: wanted an object with one job, any of {', '.join(kinds)}")
    ((kind, job),) = data.items()
    return kinds[kind].from_json(job)


def read_outcome(path: Path, job: Job[Done]) -> Outcome[Done]:
    """What the worker of a job gave back.

    Raises:
        BundleError: the worker's own, with its message.
        PenguinError: a file that no worker writes.
    """
    data = read_json(path, error=PenguinError)
    if isinstance(data, dict) and "error" in data:
        raise BundleError(str(data["error"]))
    found = _checked(data, Record({"done": Free(), **SPENT}), job.name)
    return Outcome(job.done(found["done"]), found["seconds"], found["peak_mb"], found["baseline_mb"])


def _checked(data: Any, rule: Rule, name: str) -> Mapping[str, Any]:
    try:
        rule.check(data, name)
    except SchemaError as error:
        raise PenguinError(f"{error}; parent and worker are of different versions of penguin-edge") from error
    found: Mapping[str, Any] = data
    return found


def _recipe(data: Mapping[str, Any]) -> Recipe:
    return Recipe.from_json(data, str(data.get("name", "recipe")))


def _row(data: Mapping[str, Any]) -> LayerRow:
    """A layer's row; JSON has no number for an error that is none."""
    scheme, error = data["scheme"], data.get("error")
    return LayerRow(
        data["layer"],
        (data["shape"][0], data["shape"][1]),
        Scheme(**scheme) if scheme else None,
        data.get("reason", ""),
        math.nan if error is None else error,
    )
