"""What holds the tree together: import directions, packages, layout, and an install without torch and engines."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE_DIRS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
PINS = ROOT / ".ci" / "constraints.txt"
MAX_BYTES = 3 << 20
WEIGHTS = Path("penguin_edge/data/nano/model.safetensors")


# Which module may import which. A package stands for all of its modules unless one of them has a line of its own.
# Every module may import the modules of its own package, except in penguin_edge itself, which is cut finer.

BASE = {"child", "config", "errors", "files", "folders", "guard", "schema", "stamps"}
DEVICE = BASE | {
    "machine",
    "clock",
    "containers",
    "places",
    "images",
    "video",
    "frames",
    "preprocess",
    "tra",
    "stream_plan",
    "keyframes",
    "layout",
    "prompt",
    "bundle",
    "bundle_schema",
    "bundle_folder",
}  # runs without torch
NETWORK = {"layers", "encoder", "projector", "decoder"}
STORED = {"tensorfile", "foreign", "weights", "hf_stack", "hf_config", "checkpoint"}
MODEL = DEVICE | NETWORK | STORED | {"model", "generate"}
TRAINING = {"data", "records", "samples", "losses", "train", "evaluate", "budget_study", "packing", "convert"}
TRAINING |= {"text_quality", "layer_study"}
LEARNING = {"records", "samples", "packing", "losses", "schedule", "sampler", "feed"}  # what `train` is made of …
LEARNING |= {"initialise", "trainee", "trainer_state", "recipe", "progress"}
EVERYTHING = MODEL | TRAINING | LEARNING | {"nano", "plan_report", "eager", "cli", "commands"}
EVERYTHING |= {"quantize", "export", "runtime", "bench_figures", "bench_report"}

TORCHLESS = {
    "plan_report",
    "bench_figures",
    "bench_report",
    "records",
    "samples",
    "evaluate",
    "budget_study",
    "text_quality",
    "layer_study",
}  # beside DEVICE

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors", "schema"},
    "schema": set(),
    "guard": {"errors"},
    "stamps": set(),
    "folders": {"errors", "files"},
    "child": set(),
    "stopping": set(),
    "config": {"errors", "files", "schema"},
    "bundle_schema": BASE,
    "machine": BASE,
    "clock": BASE,
    "containers": BASE | {"places"},
    "places": BASE,
    "images": BASE | {"places"},
    "video": BASE | {"clock", "containers", "places"},
    "frames": BASE | {"images", "places", "video"},
    "keyframes": BASE,
    "preprocess": BASE | {"frames"},
    "tra": BASE | {"keyframes", "preprocess"},
    "tokenizer_schema": BASE,
    "prompt": BASE | {"tokenizer_schema", "tra"},
    "stream_plan": BASE | {"tra"},
    "layout": BASE | {"frames", "places", "preprocess", "prompt", "tra"},
    "records": BASE | {"places", "prompt"},
    "samples": DEVICE | {"records"},
    "bundle": BASE | {"bundle_schema"},
    "bundle_folder": BASE | {"bundle"},
    "plan_report": BASE | {"frames", "keyframes", "tra"},
    "bench_figures": BASE,
    "bench_report": BASE | {"bench_figures", "machine"},
    "layers": BASE,
    "encoder": BASE | {"layers"},
    "projector": BASE | {"layers"},
    "decoder": BASE | {"layers"},
    "model": BASE | NETWORK | {"preprocess"},
    "hf_stack": BASE,
    "hf_config": BASE | {"foreign", "hf_stack"},
    "tensorfile": BASE,
    "foreign": BASE | {"tensorfile"},
    "weights": BASE | {"foreign", "tensorfile"},
    "checkpoint": BASE | STORED | {"model", "prompt"},
    "generate": DEVICE | NETWORK | {"model", "runtime"},  # an engine like the others
    "eager": MODEL,
    "data": MODEL,
    "packing": MODEL | {"samples"},
    "losses": MODEL | {"packing"},
    "convert": MODEL,
    "sampler": BASE,
    "schedule": BASE,
    "feed": DEVICE | {"records", "samples", "sampler", "packing"},
    "initialise": MODEL,
    "trainee": MODEL | {"losses", "packing", "recipe"},
    "trainer_state": MODEL | {"recipe", "trainee"},
    "recipe": BASE | {"losses", "packing", "samples", "schedule"},
    "progress": BASE | {"packing", "trainer_state"},
    "train": MODEL | LEARNING,
    "nano": BASE | {"prompt", "records"},
    "evaluate": DEVICE | {"records"},
    "budget_study": DEVICE | {"evaluate"},
    "text_quality": DEVICE | {"runtime"},
    "layer_study": DEVICE | {"runtime"},
    "quantize": MODEL | {"eager"},
    "quantize.calibrate": MODEL | {"quantize", "records", "samples"},  # reads data as training does
    "quantize.builtin": MODEL | {"quantize", "records", "samples"},
    "quantize.layer_errors": MODEL | {"quantize", "samples"},
    "quantize.sensitivity": MODEL | {"quantize", "samples"},
    "export": MODEL | {"eager", "quantize"},
    "export.verify": MODEL | {"eager", "quantize", "export", "runtime"},  # the one place where export meets runtime
    "runtime": DEVICE,
    "commands": EVERYTHING,
    "cli": EVERYTHING | {"stopping"},
    "__main__": {"cli"},
    "": {"bundle", "frames", "prompt", "runtime"},  # the public names, each at its first use
}

# These bring torch along.
TORCH = {"torch", "torchao", "torchvision", "safetensors.torch", "executorch", "transformers", "accelerate", "peft"}
# These are optional or heavy: runtime/ imports them inside the function that needs them.
ENGINES = {"onnxruntime", "executorch", "tensorrt", "tensorrt_rtx", "av", "cv2", "starlette", "uvicorn"}
# The ExecuTorch binding needs torch; nothing else in runtime/ does.
TORCH_IN_RUNTIME = "runtime.executorch"


@dataclass(frozen=True)
class Import:
    name: str
    line: int
    lazy: bool  # inside a function, or only for the type checker


def imports_of(module: str, is_package: bool, source: str) -> Iterator[Import]:
    """Every import of a file, by full name; `from a import b` counts as `a.b`."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inner = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                inner = True
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    kept = module.split(".")[: len(module.split(".")) - child.level + is_package]
                    base = ".".join([*kept, base]).strip(".")
                yield from (Import(f"{base}.{alias.name}", child.lineno, lazy) for alias in child.names)
            elif (
                isinstance(child, ast.Call)
                and ast.unparse(child.func).split(".")[-1] in ("import_module", "__import__")
                and child.args
                and isinstance(child.args[0], ast.Constant)
            ):
                yield Import(str(child.args[0].value), child.lineno, lazy)
            yield from walk(child, inner)

    yield from walk(ast.parse(source), False)


def placed(name: str) -> str | None:
    """The line of ALLOWED that holds for a module name without its leading `penguin_edge`, or None."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in ALLOWED:
            return ".".join(parts[:end])
    return None


def is_one_of(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What a file imports against the rules; `module` is a full name such as `penguin_edge.runtime.session`."""
    inside = module.removeprefix("penguin_edge").removeprefix(".")
    place = placed(inside)
    if place is None:
        return [f"{module} is not in the table: place it in ALLOWED of tests/test_packaging.py"]
    allowed = ALLOWED[place]
    top = place.split(".")[0]
    found = []
    for item in imports_of(module, is_package, source):
        where = f"{module}, line {item.line}: imports {item.name}"
        if item.name == "penguin_edge" or item.name.startswith("penguin_edge."):
            target = item.name.removeprefix("penguin_edge").removeprefix(".")
            if target.startswith("__") or not target:  # __version__
                continue
            target_place = placed(target)
            if target_place is None:
                found.append(f"{where}, which is not in the table: place it in ALLOWED of tests/test_packaging.py")
            elif target_place.split(".")[0] not in allowed | {top}:
                found.append(f"{where}; allowed: {', '.join(sorted(allowed)) or 'nothing of the package'}")
        elif is_one_of(item.name, {"export", "quantize", "runtime"}):
            found.append(f"{where} by its bare name; wanted penguin_edge.{item.name}")
        if is_one_of(item.name, TORCH):
            if top in DEVICE or place in ("", *TORCHLESS):
                found.append(f"{where}; this module is used on devices without torch")
            elif top == "runtime" and inside != TORCH_IN_RUNTIME:
                found.append(f"{where}; in runtime/ only the ExecuTorch engine may need torch")
        if top == "runtime" and not item.lazy and is_one_of(item.name, ENGINES | TORCH):
            found.append(f"{where} at module level; wanted inside the function that needs it")
    return found


def sources() -> list[tuple[str, Path]]:
    """Every Python file that is installed, with its module name."""
    found = {}
    for package, folder in sorted(PACKAGE_DIRS.items(), key=lambda item: len(item[0])):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[path] = ".".join([package, *(part for part in parts if part != "__init__")])
    return [(module, path) for path, module in found.items()]


def tracked() -> list[Path]:
    """The files of the repository, relative to its root: tracked, or new and not ignored."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [Path(name) for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_imports_point_one_way() -> None:
    found = []
    for module, path in sources():
        found += violations(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("penguin_edge.tra", "from penguin_edge.model import PenguinModel", "imports penguin_edge.model.PenguinModel"),
        ("penguin_edge.tra", "from penguin_edge import model", "imports penguin_edge.model"),
        ("penguin_edge.tra", "from . import model", "imports penguin_edge.model"),
        ("penguin_edge.tra", "def f():\n    import torch", "used on devices without torch"),
        ("penguin_edge.bundle", "from safetensors.torch import save_file", "used on devices without torch"),
        ("penguin_edge.model", "from penguin_edge.cli import main", "imports penguin_edge.cli.main"),
        ("penguin_edge.quantize.schemes", "import penguin_edge.export.onnx", "imports penguin_edge.export.onnx"),
        ("penguin_edge.export.onnx", "from penguin_edge.runtime import Session", "imports penguin_edge.runtime"),
        ("penguin_edge.export.onnx", "from ..runtime import Session", "imports penguin_edge.runtime"),
        ("penguin_edge.export.onnx", "from runtime import Session", "wanted penguin_edge.runtime"),
        ("penguin_edge.runtime.session", "from penguin_edge.model import PenguinModel", "imports penguin_edge.model"),
        ("penguin_edge.runtime.session", "import onnxruntime", "at module level"),
        ("penguin_edge.runtime.session", "def f():\n    import torch", "only the ExecuTorch engine"),
        ("penguin_edge.runtime.executorch", "import torch", "at module level"),
        (
            "penguin_edge.runtime.onnxruntime",
            "import importlib\nort = importlib.import_module('onnxruntime')",
            "module",
        ),
        ("penguin_edge.novelty", "", "place it in ALLOWED"),
        ("penguin_edge.tra", "from penguin_edge.novelty import x", "place it in ALLOWED"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str, said: str) -> None:
    found = violations(module, source)
    assert len(found) >= 1 and any(said in line for line in found), found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("penguin_edge.export.verify", "from penguin_edge.runtime import Session"),
        ("penguin_edge.runtime.executorch", "def load():\n    import torch\n    import executorch.runtime"),
        ("penguin_edge.runtime.onnxruntime", "def load():\n    import onnxruntime"),
        ("penguin_edge.runtime.session", "from .engine import Engine\nfrom penguin_edge import tra, __version__"),
        ("penguin_edge.frames", "import av\nimport numpy as np"),
    ],
)
def test_a_right_import_is_left_alone(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_every_package_is_listed() -> None:
    found = {
        path.parent
        for path in tracked()
        if path.name == "__init__.py" and path.parts[0] != "tests" and not path.parts[0].startswith(".")
    }
    listed: list[str] = PROJECT["tool"]["setuptools"]["packages"]
    folders = {}
    for package in listed:
        # The longest mapped ancestor gives the folder.
        base = max((name for name in PACKAGE_DIRS if f"{package}.".startswith(f"{name}.")), key=len)
        rest = package.removeprefix(base).strip(".").replace(".", "/")
        folders[Path(PACKAGE_DIRS[base]) / rest] = package
    assert set(folders) == found, "packages in pyproject.toml and folders with an __init__.py differ"


def test_the_public_names_are_loaded_at_their_first_use() -> None:
    code = (
        "import sys, penguin_edge\n"
        "heavy = {'numpy', 'torch', 'PIL', 'av', 'onnxruntime', 'executorch'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "names = 'Session Stream Live Bundle Tokenizer open_engine read_video read_image'.split()\n"
        "assert set(names) == set(penguin_edge.__all__) <= set(dir(penguin_edge))\n"
        "assert [getattr(penguin_edge, name).__module__.split('.')[0] for name in names] == ['penguin_edge'] * 8\n"
        "assert not {'torch', 'onnxruntime', 'executorch'} & set(sys.modules)\n"
        "from penguin_edge import Session, read_video\n"
        "assert not hasattr(penguin_edge, 'Sesion')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    pins = {}
    for line in PINS.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = Version(version)
    groups = PROJECT["project"]["optional-dependencies"]
    lines = PROJECT["project"]["dependencies"] + [
        r for name, group in groups.items() if name != "tensorrt" for r in group
    ]
    for requirement in map(Requirement, lines):
        if requirement.name != "penguin-edge":
            name = canonicalize_name(requirement.name)
            assert name in pins, f"{name} has no line in .ci/constraints.txt"
            assert pins[name] in requirement.specifier, f"{requirement} excludes the pinned {pins[name]}"


def readme_tree(text: str) -> list[Path]:
    """The paths of the code block under `## Layout`.

    A line is `name  comment`: one or more names with one space between them, a folder ending in `/`, then at least two
    spaces and anything. An entry of a folder stands below it, two spaces further in.
    """
    after = re.split(r"^## Layout\s*$", text, maxsplit=1, flags=re.MULTILINE)
    if len(after) != 2:
        raise ValueError("got no heading '## Layout' in README.md, wanted one with a code block below it")
    block = re.search(r"^```[^\n]*\n(.*?)^```", after[1], flags=re.MULTILINE | re.DOTALL)
    if block is None:
        raise ValueError("got no code block below '## Layout' in README.md, wanted the tree")
    paths: list[Path] = []
    parents: list[Path] = []
    for line in block.group(1).splitlines():
        if not line.strip():
            continue
        depth, odd = divmod(len(line) - len(line.lstrip(" ")), 2)
        if odd or depth > len(parents):
            raise ValueError(f"got the line {line!r} in the tree of README.md, wanted two spaces more than its folder")
        base = parents[depth - 1] if depth else Path()
        names = re.split(r"\s{2,}", line.strip())[0].split(" ")
        for name in names:
            path = ROOT / base / name
            if not (path.is_dir() if name.endswith("/") else path.is_file()):
                raise ValueError(f"the tree of README.md has {base / name}, which is not there")
            paths.append(base / name)
        parents = [*parents[:depth], base / names[-1]] if names[-1].endswith("/") else parents[:depth]
    return paths


def test_readme_tree_is_true() -> None:
    """README.md, under `## Layout`, names every visible entry of the top level and nothing that is not there.

    The format is that of `readme_tree`; below the top level it may name as much as it likes. README.md itself and
    names that begin with a dot may be left out.
    """
    named = {path.parts[0] for path in readme_tree((ROOT / "README.md").read_text(encoding="utf-8"))}
    there = {path.parts[0] for path in tracked()}
    missing = {name for name in there - named if not name.startswith(".") and name != "README.md"}
    assert not missing, f"the tree of README.md does not name {', '.join(sorted(missing))}"


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ("penguin_edge/  the model\n  nowhere.py  not there\n", "nowhere.py"),
        ("penguin_edge  a folder without its slash\n", "not there"),
        ("penguin_edge/\n    tra.py  too far in\n", "two spaces"),
        ("penguin_edge/\n config.py  odd\n", "two spaces"),
    ],
)
def test_a_wrong_tree_is_found(tree: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        readme_tree(f"# x\n\n## Layout\n\n```\n{tree}```\n")


def test_a_right_tree_is_read() -> None:
    tree = "penguin_edge/   the model\n  config.py errors.py   both\nMakefile pyproject.toml  two\n"
    paths = readme_tree(f"## Layout\nSome words.\n```text\n{tree}```\n")
    assert [str(path) for path in paths] == [
        "penguin_edge",
        "penguin_edge/config.py",
        "penguin_edge/errors.py",
        "Makefile",
        "pyproject.toml",
    ]


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}


@pytest.mark.parametrize("name", ["export", "quantize", "runtime"])
def test_bare_names_are_refused(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"wanted 'import penguin_edge.{name}'" in done.stderr


def test_device_modules_leave_torch_and_engines_unloaded() -> None:
    modules = [f"penguin_edge.{name}" for name in sorted(DEVICE)] + ["penguin_edge.runtime"]
    script = (
        f"import sys\nimport {', '.join(modules)}\n"
        f"print(*sorted(set(sys.modules) & {{'torch', 'onnxruntime', 'executorch', 'tensorrt', 'transformers'}}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"loaded on import: {done.stdout}"


@pytest.mark.slow
def test_base_install_works_without_torch_and_engines(tmp_path: Path) -> None:
    """A real environment with the base dependencies alone: the runtime imports and the command line answers."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python, env = home / "bin" / "python", clean_environment()

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)

    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", PINS)
    done = run(*pip, "setuptools", *PROJECT["project"]["dependencies"])
    if done.returncode and not os.environ.get("CI"):
        pytest.skip(f"the base dependencies cannot be installed here: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, done.stderr

    # A copy, so that what the build leaves behind does not land in the source tree.
    copy = tmp_path / "copy"
    for path in tracked():
        if path.parts[0] in {*PACKAGE_DIRS.values(), "pyproject.toml", "README.md", "LICENSE"}:
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, copy / path)
    done = run(*pip, "--no-deps", "--no-build-isolation", copy)
    assert done.returncode == 0, done.stderr
    done = run(python, "-m", "pip", "check")
    assert done.returncode == 0, done.stdout

    script = (
        "import importlib.util, sys\n"
        "import penguin_edge.runtime, penguin_edge.tra, penguin_edge.frames\n"
        "present = [n for n in ('torch', 'onnxruntime', 'executorch', 'tensorrt') if importlib.util.find_spec(n)]\n"
        "assert not present, present\n"
        "print(penguin_edge.__file__)\n"
    )
    done = run(python, "-c", script)
    assert done.returncode == 0, done.stderr
    installed = Path(done.stdout.strip()).parent
    assert home in installed.parents
    assert (installed / "py.typed").is_file()
    modules = {module.replace(".", "/") + ".py" for module, path in sources() if path.name != "__init__.py"}
    data = {path.as_posix() for path in tracked() if path.parts[:2] == ("penguin_edge", "data")}
    missing = [name for name in sorted(modules | data) if not (installed.parent / name).is_file()]
    assert not missing, f"not installed: {missing}"

    done = run(home / "bin" / "penguin-edge", "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_no_large_files() -> None:
    sizes = {path: (ROOT / path).stat().st_size for path in tracked()}
    large = {path: size for path, size in sizes.items() if size > MAX_BYTES and path != WEIGHTS}
    assert not large, f"got {large}, wanted at most {MAX_BYTES} bytes a file"
    assert sizes[WEIGHTS] <= 12_000_000


def test_no_paths_of_one_machine() -> None:
    machine_path = re.compile(r"(?<![\w.$}])/(?:work|root|home|Users)/\w")
    found = []
    for path in tracked():
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path}, line {n}" for n, line in enumerate(text.splitlines(), 1) if machine_path.search(line)]
    assert not found, f"absolute paths of one machine: {found}"
