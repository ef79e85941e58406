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

import penguin_edge

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE_DIRS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
PINS = ROOT / ".ci" / "constraints.txt"
# The second distribution, with the compiled parts: no part of the package, although it lies in a folder of it.
NATIVE = Path("runtime/cpp")
MAX_BYTES = 3 << 20
WEIGHTS = Path("penguin_edge/assets/nano/model.safetensors")


@dataclass(frozen=True)
class Room:
    """A folder of modules: the rooms that it may import, by name (`*`: all), and whether torch is needed.

    Rooms without torch run on devices: they import no room with it either.
    """

    may: str
    torch: bool = False


# One row per folder. `base` is the modules that lie in penguin_edge/ itself. A row is exact: an allowance that no
# module of the room uses fails, as does `torch` where nobody imports it.
ROOMS = {
    "base": Room(""),
    "bundle": Room("base"),
    "media": Room("base"),
    "prompt": Room("base"),
    "tra": Room("base media prompt"),
    "model": Room("base bundle media prompt", torch=True),
    "dataset": Room("base media prompt tra"),
    "dataset.nano": Room("base prompt dataset"),
    "training": Room("base bundle media prompt model dataset", torch=True),
    "evaluation": Room("base media prompt tra dataset runtime.engines"),
    "reports": Room("base tra"),
    "quantize": Room("base model", torch=True),
    "quantize.calibration": Room("base media prompt model dataset quantize", torch=True),
    "quantize.search": Room("base model dataset quantize quantize.calibration", torch=True),
    "export": Room(
        "base bundle media prompt model quantize quantize.calibration quantize.search export.targets", torch=True
    ),
    "export.targets": Room("base bundle model quantize export.targets.onnx export.targets.executorch", torch=True),
    "export.targets.onnx": Room("base bundle model quantize export export.targets", torch=True),
    "export.targets.executorch": Room("base bundle model quantize export export.targets", torch=True),
    "runtime.engines": Room("base bundle media prompt tra"),
    "runtime.core": Room("base media prompt tra runtime.engines"),
    "runtime": Room("base bundle media prompt tra runtime.engines runtime.core"),
    "runtime.latency": Room("base bundle media tra runtime.engines runtime.core runtime"),
    "runtime.live": Room("base media tra runtime.core runtime runtime.latency"),
    "runtime.bench": Room("base media prompt runtime.engines runtime.core runtime runtime.latency runtime.live"),
    "commands": Room("*", torch=True),
}
# Modules that may import more than their room.
EXCEPTIONS = {
    "": "bundle media prompt runtime runtime.engines runtime.live",  # the public names, each at its first use
    "__main__": "commands",
    "model.eager": "runtime.engines",  # the eager engine is one like the others
    "export.verify": "runtime.engines",  # the one place where export meets runtime
}
# Modules of one base name that are meant: one thing in two rooms. A module of `commands` is named after its verb.
NAMESAKES = {
    "base": {"export.targets.base", "runtime.engines.base"},  # the protocol of each
    "stages": {"export.stages", "runtime.bench.stages"},  # of an export; of an engine
    "static": {"quantize.static", "export.targets.onnx.static"},  # static activations: their numbers; their nodes
    "stream": {"tra.stream", "runtime.stream"},  # the sizes of its frames; the stream
}
# These bring torch along.
TORCH = {"torch", "torchao", "torchvision", "safetensors.torch", "executorch", "transformers", "accelerate", "peft"}
# These are optional or heavy: runtime/ imports them inside the function that needs them.
ENGINES = {"onnxruntime", "executorch", "tensorrt", "tensorrt_rtx", "av", "cv2", "starlette", "uvicorn"}
# The ExecuTorch binding needs torch; nothing else in runtime/ does.
TORCH_IN_RUNTIME = "runtime.engines.executorch"


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


def room_of(name: str) -> str:
    """The room of a module, or of something in it, by its name without the leading `penguin_edge`."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in ROOMS:
            return ".".join(parts[:end])
    return "base"


def place_of(module: str) -> str:
    """The room of a whole module by its full name."""
    inside = module.removeprefix("penguin_edge").removeprefix(".")
    return "base" if inside in ("", "__main__") else room_of(inside)


def may_import(room: str) -> set[str]:
    """The rooms that a room may import; its own is not among them."""
    may = set(ROOMS[room].may.split())
    return set(ROOMS) - {room} if may == {"*"} else may


def is_one_of(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@dataclass
class Found:
    """What one file imports: rooms, whether torch, and what is against the rules."""

    rooms: set[str]
    torch: bool
    wrong: list[str]


def look(module: str, source: str, is_package: bool = False) -> Found:
    """Read the imports of a file; `module` is a full name such as `penguin_edge.runtime.session`."""
    inside = module.removeprefix("penguin_edge").removeprefix(".")
    room = place_of(module)
    row, more = ROOMS[room], EXCEPTIONS.get(inside, "").split()
    allowed = {room, *may_import(room), *more}
    found = Found(set(), False, [])
    if is_package and room != "base" and inside != room:
        found.wrong.append(f"{module} is a folder without a row: give it one in ROOMS of tests/test_packaging.py")
    for item in imports_of(module, is_package, source):
        where = f"{module}, line {item.line}: imports {item.name}"
        if is_one_of(item.name, {"penguin_edge"}):
            target = item.name.removeprefix("penguin_edge").removeprefix(".")
            if not target or target.startswith("__"):  # __version__
                continue
            other = room_of(target)
            if other not in allowed:
                found.wrong.append(f"{where}; {room} may import {row.may or 'nothing of the package'}")
            elif other not in more:
                found.rooms.add(other)
                if ROOMS[other].torch and not row.torch:
                    found.wrong.append(f"{where}, which needs torch; {room} is used on devices without torch")
        elif is_one_of(item.name, {"export", "quantize", "runtime"}):
            found.wrong.append(f"{where} by its bare name; wanted penguin_edge.{item.name}")
        if is_one_of(item.name, TORCH):
            if room.startswith("runtime") and inside != TORCH_IN_RUNTIME:
                found.wrong.append(f"{where}; in runtime/ only the ExecuTorch engine may need torch")
            elif not row.torch and inside != TORCH_IN_RUNTIME:
                found.wrong.append(f"{where}; {room} is used on devices without torch")
            found.torch = True
        if room.startswith("runtime") and not item.lazy and is_one_of(item.name, ENGINES | TORCH):
            found.wrong.append(f"{where} at module level; wanted inside the function that needs it")
    return found


def sources() -> list[tuple[str, Path]]:
    """Every Python file that is installed, with its module name."""
    found = {}
    for package, folder in sorted(PACKAGE_DIRS.items(), key=lambda item: len(item[0])):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if (ROOT / NATIVE) in path.parents:
                continue
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
    wrong: list[str] = []
    used: dict[str, set[str]] = {room: set() for room in ROOMS}
    torch: dict[str, bool] = dict.fromkeys(ROOMS, False)
    for module, path in sources():
        found = look(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
        wrong += found.wrong
        room = place_of(module)
        used[room] |= found.rooms - {room}
        direct = found.torch and not module.endswith(TORCH_IN_RUNTIME)
        torch[room] |= direct or any(ROOMS[other].torch for other in found.rooms - {room})
    for room, row in ROOMS.items():
        unused = may_import(room) - used[room] if row.may != "*" else set()
        wrong += [f"{room} may import {other}, and no module of it does: take that out" for other in sorted(unused)]
        if row.torch and not torch[room]:
            wrong.append(f"{room} may need torch, and no module of it does: take that out")
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_two_rooms_import_each_other_but_those_of_one_folder() -> None:
    """`export.targets` is called by `export` and uses its methods; any other pair would be one room in two."""
    may = {room: may_import(room) for room in ROOMS}
    pairs = {(a, b) for a in may for b in may[a] if a in may.get(b, set())}
    assert {(a.split(".")[0], b.split(".")[0]) for a, b in pairs} <= {("export", "export")}, pairs


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("penguin_edge.tra.clip", "from penguin_edge.model.penguin import PenguinModel", "tra may import base"),
        ("penguin_edge.tra.clip", "from penguin_edge import model", "imports penguin_edge.model"),
        ("penguin_edge.tra.clip", "from ..model import penguin", "imports penguin_edge.model.penguin"),
        ("penguin_edge.tra.clip", "def f():\n    import torch", "used on devices without torch"),
        ("penguin_edge.errors", "from penguin_edge.tra.clip import Plan", "base may import nothing"),
        ("penguin_edge.evaluation.score", "import penguin_edge.model.penguin", "imports penguin_edge.model"),
        ("penguin_edge.bundle.manifest", "from safetensors.torch import save_file", "used on devices without torch"),
        ("penguin_edge.model.penguin", "from penguin_edge.commands.cli import main", "imports penguin_edge.commands"),
        ("penguin_edge.quantize.schemes", "import penguin_edge.export.targets.known", "imports penguin_edge.export"),
        ("penguin_edge.export.check", "from penguin_edge.runtime.engines.base import Engine", "export may import"),
        ("penguin_edge.export.check", "from ..runtime.session import Session", "imports penguin_edge.runtime.session"),
        ("penguin_edge.export.check", "from runtime import Session", "wanted penguin_edge.runtime"),
        ("penguin_edge.runtime.session", "from penguin_edge.model.penguin import PenguinModel", "runtime may import"),
        ("penguin_edge.runtime.session", "from penguin_edge.runtime.live.live import Live", "runtime may import"),
        ("penguin_edge.runtime.session", "import onnxruntime", "at module level"),
        ("penguin_edge.runtime.session", "def f():\n    import torch", "only the ExecuTorch engine"),
        ("penguin_edge.runtime.engines.executorch", "import torch", "at module level"),
        (
            "penguin_edge.runtime.engines.onnxruntime",
            "import importlib\nort = importlib.import_module('onnxruntime')",
            "module",
        ),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str, said: str) -> None:
    found = look(module, source).wrong
    assert len(found) >= 1 and any(said in line for line in found), found


def test_a_folder_without_a_row_is_found() -> None:
    assert "give it one in ROOMS" in look("penguin_edge.tra.novelty", "", is_package=True).wrong[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("penguin_edge.export.verify", "from penguin_edge.runtime.engines.base import Engine"),
        ("penguin_edge.runtime.engines.executorch", "def load():\n    import torch\n    import executorch.runtime"),
        ("penguin_edge.runtime.engines.onnxruntime", "def load():\n    import onnxruntime"),
        ("penguin_edge.runtime.session", "from .engines.base import Engine\nfrom penguin_edge import tra, __version__"),
        ("penguin_edge.media.frames", "import av\nimport numpy as np"),
    ],
)
def test_a_right_import_is_left_alone(module: str, source: str) -> None:
    assert look(module, source).wrong == []


def test_a_name_stands_for_one_module() -> None:
    found: dict[str, set[str]] = {}
    for module, path in sources():
        inside = module.removeprefix("penguin_edge.")
        if path.name != "__init__.py" and not inside.startswith("commands."):
            found.setdefault(path.stem, set()).add(inside)
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == NAMESAKES


def test_a_name_stands_for_one_class() -> None:
    found: dict[str, list[str]] = {}
    for module, path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(module)
    twice = {name: modules for name, modules in found.items() if len(modules) > 1}
    assert not twice, f"classes of the same name: {twice}"


def test_the_page_of_the_architecture_is_true() -> None:
    """Its table of rooms is the one above, and every file that it names is there."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z_.]+)` \| ([^|]*) \| (yes|no) \|$", page, re.MULTILINE)
    words = {"everything": {"*"}, "nothing": set()}
    told = {room: (words.get(may, set(re.findall("`([^`]+)`", may))), torch == "yes") for room, may, torch in rows}
    assert told == {room: (set(row.may.split()), row.torch) for room, row in ROOMS.items()}
    ours = page[: page.index("### Coming from")]
    named = set(re.findall(r"`([a-z_]+/[a-z_/]+\.(?:py|html))`", ours))
    assert len(named) > 40 and not [name for name in sorted(named) if not (ROOT / name).is_file()]


def test_every_package_is_listed() -> None:
    found = {
        path.parent
        for path in tracked()
        if path.name == "__init__.py"
        and path.parts[0] != "tests"
        and not path.parts[0].startswith(".")
        and NATIVE not in path.parents
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


def test_both_distributions_have_one_version_and_its_tools_are_pinned() -> None:
    header = (ROOT / NATIVE / "include" / "penguin_ops.h").read_text(encoding="utf-8")
    assert re.findall(r'^#define PENGUIN_OPS_VERSION "(.+)"$', header, re.MULTILINE) == [penguin_edge.__version__]
    native = tomllib.loads((ROOT / NATIVE / "pyproject.toml").read_text(encoding="utf-8"))
    pinned = {canonicalize_name(line.split("==")[0]) for line in PINS.read_text(encoding="utf-8").splitlines()}
    built_with = {canonicalize_name(Requirement(line).name) for line in native["build-system"]["requires"]}
    assert {*built_with, "cmake", "ninja"} <= pinned


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
    rooms = {room for room, row in ROOMS.items() if not row.torch}
    modules = [module for module, _ in sources() if not module.endswith("__main__") and place_of(module) in rooms]
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
        "import penguin_edge.runtime, penguin_edge.tra.clip, penguin_edge.media.frames\n"
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
