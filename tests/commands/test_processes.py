"""How processes begin and end: signals at any time, children that go with their parent, files named as modules."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penguin_edge import child, stopping
from penguin_edge.dataset.nano.assets import cache_folder

CONSOLE = "import sys; from penguin_edge.commands.cli import main; sys.exit(main())"
"""What the console script does."""
MEDIA = Path(__file__).parents[1] / "media"


def start(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-c", CONSOLE, *map(str, arguments)]
    given: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, **{**given, **options})


def export(out: Path) -> tuple[Any, ...]:
    return ("export", "--model", "tiny", "--random-weights", "--no-verify", "-o", out)


def children(pid: int) -> list[int]:
    try:
        return [int(found) for found in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> None:
    for _ in range(6000):
        if condition():
            return
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("it never came")


def answers(process: subprocess.Popen[str]) -> bool:
    """Whether the program has said what signals do: the kernel has a handler of SIGHUP, which Python has not."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGHUP - 1) & 1)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("delay", [0, 0.05, 0.15, 0.3, 0.6, 1.0])
def test_a_signal_ends_it_in_one_line_from_the_first_moment(
    tmp_path: Path, number: signal.Signals, delay: float
) -> None:
    """The moments of the imports, which take a second: the delay spreads them, and nothing depends on its length."""
    process = start(*export(tmp_path / "out"))
    until(lambda: answers(process), process)
    time.sleep(delay)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if not line.startswith(("tiny ->", "[", "note:"))]
    assert process.returncode == 128 + number and lines == ["stopped"], err
    assert not list(tmp_path.iterdir())


def test_a_second_signal_does_not_disturb_the_end(tmp_path: Path) -> None:
    process = start(*export(tmp_path / "out"))
    until(lambda: list(tmp_path.glob(".out.*/new")), process)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_was_ignored_at_the_start_stays_so(number: signal.Signals) -> None:
    process = start("info", "tiny", preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
    for _ in range(50):
        process.send_signal(number)
        time.sleep(0.01)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


@pytest.mark.parametrize(
    ("arguments", "sign"),
    [
        (("bench", "tiny", "--repeat", "1000"), "random weights"),
        (("stream", "tiny", "--source", MEDIA / "polar_bear.mp4", "--ui", "--port", "0"), "live view"),
        (("data", "nano", "--split", "train", "--count", "100000", "--workers", "2", "-o"), "records"),
        (("plan", MEDIA / "polar_bear.mp4", "--budget", "6400", "--fps", "30", "--json"), ""),
    ],
    ids=["bench", "stream", "data", "plan"],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_verbs_in_the_middle_of_their_work(
    tmp_path: Path, arguments: tuple[Any, ...], sign: str, number: signal.Signals
) -> None:
    if arguments[0] == "data":
        if len(list(cache_folder().glob("*.whl"))) < 2:
            pytest.skip("its pictures come from a package registry and are not here yet")
        arguments = (*arguments, tmp_path / "out")
    told, stdout = os.pipe()  # too narrow for a plan, which says nothing before it: it waits for its reader
    fcntl.fcntl(told, fcntl.F_SETPIPE_SZ, 4096)
    process = start(*arguments, stdout=subprocess.DEVNULL if sign else stdout)
    os.close(stdout)
    assert process.stderr is not None
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.extend(process.stderr or ()), daemon=True)
    reader.start()
    if sign:
        until(lambda: any(sign in line for line in heard), process)
    else:
        until(lambda: select.select([told], [], [], 0)[0], process)
    os.killpg(process.pid, number)
    until(lambda: "stopped\n" in heard or process.poll() is not None)
    os.close(told)
    process.wait(timeout=60)
    reader.join()
    assert process.returncode == 128 + number, heard
    assert "Traceback" not in "".join(heard) and not list(tmp_path.iterdir())


def test_a_stop_in_a_finalizer_is_not_lost() -> None:
    code = """
import signal, sys, time
from penguin_edge import stopping
stopping.begin(); stopping.let_finish()
class Late:
    def __del__(self): signal.raise_signal(signal.SIGTERM); time.sleep(0.01)
try:
    Late()
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(stopping.code())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 143 and done.stderr == ""


@pytest.mark.parametrize(
    "work",
    [
        "try:\n    fail()\nexcept OSError:\n    again()",
        "with contextlib.suppress(ValueError):\n    try:\n        fail()\n    except OSError as e:\n"
        "        try: raise ValueError from None\n        finally: again()",
        "g = closing(); next(g); g.close()",
        "g = closing(); next(g); del g",
    ],
    ids=["another failure", "a failure of that", "a generator closed", "a generator dropped"],
)
def test_a_second_signal_leaves_the_rest_of_the_clean_up(work: str) -> None:
    code = f"""
import contextlib, signal, sys
from penguin_edge import stopping
stopping.begin(); stopping.let_finish()
def fail(): raise OSError
def again(): signal.raise_signal(signal.SIGINT)
def closing():
    try: yield
    finally: again(); print("inner", flush=True)
def clean():
{textwrap.indent(work, "    ")}
try:
    try:
        again()
    finally:
        clean()
        print("cleaned", flush=True)
except KeyboardInterrupt:
    sys.exit(stopping.code())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 130 and done.stdout.endswith("cleaned\n") and done.stderr == "", done.stderr


def test_a_third_signal_ends_even_what_hangs() -> None:
    code = """
import signal, time
from penguin_edge import stopping
stopping.begin(); stopping.let_finish()
try:
    signal.raise_signal(signal.SIGINT)
finally:
    signal.raise_signal(signal.SIGINT)
    print("still here", flush=True)
    signal.raise_signal(signal.SIGINT)
    print("and here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (130, "still here\n", "stopped\n")


# --- children ---------------------------------------------------------------------------------------------------------


def test_the_worker_of_a_killed_export_ends_and_the_next_export_clears_up(tmp_path: Path) -> None:
    work = tmp_path / "tmp"
    work.mkdir()
    out = tmp_path / "x" / "out"
    environment = {**os.environ, "TMPDIR": str(work)}
    process = start(*export(out), env=environment)
    until(lambda: children(process.pid) and list(out.parent.glob(".out.*/new")), process)
    workers = children(process.pid)
    process.kill()
    process.communicate(timeout=60)
    until(lambda: not any(map(running, workers)))
    assert os.listdir(out.parent) and list(work.glob("penguin-edge-*"))
    rests = [*out.parent.iterdir(), *work.glob("penguin-edge-*")]
    following = start(*export(out), env=environment)
    until(lambda: not any(rest.exists() for rest in rests) and list(out.parent.glob(".out.*/new")), following)
    following.terminate()
    following.communicate(timeout=60)
    assert following.returncode == 143
    assert not list(tmp_path.glob("x/*")) and not list(work.glob("penguin-edge-*"))


@pytest.mark.parametrize("way", ["death signal", "pipe"])
def test_a_child_ends_with_its_parent(tmp_path: Path, way: str) -> None:
    """Either way alone is enough: the parent's thread holds the interpreter, or the system has no death signals."""
    (tmp_path / "sleeper.py").write_text("import time; print('ready', flush=True); time.sleep(600)")
    blunt = "" if way == "death signal" else "child.sys.platform = 'other';"
    main = f"from penguin_edge import child; {blunt} import sys; child.main(sys.argv[1:])"
    stdin = "subprocess.PIPE" if way == "pipe" else "open('/dev/zero')"
    parent = (
        "import os, subprocess, sys, time\n"
        f"c = subprocess.Popen([sys.executable, '-c', {main!r}, str(os.getpid()), 'sleeper'], stdin={stdin},\n"
        "    stdout=subprocess.PIPE, start_new_session=True)\n"
        "c.stdout.readline(); print(c.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", parent]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert running(pid)
        process.kill()
    until(lambda: not running(pid))


def test_a_child_whose_parent_has_ended_before_does_not_begin(tmp_path: Path) -> None:
    (tmp_path / "works.py").write_text("print('worked')")
    command = [sys.executable, "-m", "penguin_edge.child", "1", "works"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, stdin=subprocess.PIPE, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stdout == ""


def test_children_are_started_safely() -> None:
    assert "-P" in child.command("json.tool") and child.environment()["PYTHONSAFEPATH"] == "1"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A working directory with files that are named as modules; each says so when it is imported."""
    folder = tmp_path / "cwd"
    (folder / "penguin_edge").mkdir(parents=True)
    told = f"open({str(tmp_path / 'imported')!r}, 'a').write(__file__ + '\\n'); raise SystemExit('hostile')\n"
    names = ["token", "random", "numpy", "torch", "onnx", "safetensors", "json", "penguin_edge/__init__"]
    for name in names:
        (folder / f"{name}.py").write_text(told)
    return folder


def test_nothing_in_the_working_directory_is_imported(hostile: Path) -> None:
    process = start(*export(Path("out")), cwd=hostile)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0 and not (hostile.parent / "imported").exists(), err


def test_neither_by_python_m(hostile: Path) -> None:
    """Its own package is the one thing that Python takes from there before any of our lines runs."""
    for path in ("penguin_edge/__init__.py", "json.py"):  # runpy is a step before us, too
        (hostile / path).unlink()
    (hostile / "penguin_edge").rmdir()
    command = [sys.executable, "-m", "penguin_edge", "info", "tiny"]
    done = subprocess.run(command, cwd=hostile, capture_output=True, text=True)
    assert done.returncode == 0 and not (hostile.parent / "imported").exists(), done.stderr


# --- the last resort --------------------------------------------------------------------------------------------------

FAILING = """
import sys
from penguin_edge.commands import cli
from penguin_edge import commands
from penguin_edge.commands import doctor
def fail(args): {statement}
doctor.run = fail
def add(verbs): verbs.add_parser("doctor").set_defaults(run=fail)
doctor.add = add
sys.exit(cli.main())
"""


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("fail(args)", "unexpected RecursionError: maximum recursion depth exceeded"),
        ("{}['key']", "unexpected KeyError: 'key'"),
        ("b'\\xff'.decode()", "unexpected UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff"),
        ("import zlib; zlib.decompress(b'xyz')", "unexpected error: Error -3"),
        ("import struct; struct.unpack('<Q', b'x')", "unexpected error: unpack requires"),
        ("raise ValueError('one\\ntwo')", "penguin-edge: one\n"),
        ("raise AssertionError", "unexpected AssertionError; "),
        ("raise MemoryError", "out of memory"),
        ("open('/nowhere/x')", "/nowhere/x: No such file or directory"),
        ("raise GeneratorExit", "unexpected GeneratorExit"),
    ],
)
def test_whatever_fails_is_one_sentence(statement: str, says: str) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-c", FAILING.format(statement=statement), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    done = run("doctor")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and says in done.stderr, done.stderr
    shown = run("--debug", "doctor")
    assert shown.returncode == 1 and "Traceback" in shown.stderr


@pytest.mark.parametrize("arguments", [("doctor",), ("--help",), ("plan", MEDIA / "polar_bear.mp4", "--budget", "64")])
def test_a_full_disk_behind_stdout_is_one_sentence(arguments: tuple[Any, ...]) -> None:
    with open("/dev/full", "w") as full:
        process = start(*arguments, stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 1) and "Traceback" not in err and "Exception" not in err
    if arguments[0] != "--help":
        assert process.returncode == 1 and err.strip().splitlines()[-1] == "penguin-edge: No space left on device"


@pytest.mark.parametrize(("stdout", "code"), [(">/dev/null", 0), (">&-", 1)])
def test_closed_streams_are_no_files_of_ours(tmp_path: Path, stdout: str, code: int) -> None:
    """Descriptor 2 would be the number of the first file that is opened, and warnings would land in it.

    What goes to a stdout that is closed is lost, which is a failure; the file is whole before.
    """
    out = tmp_path / "plan.png"
    command = f'exec "$0" -P -c "$1" plan "{MEDIA}/polar_bear.mp4" --budget 64 -o "{out}" <&- {stdout} 2>&-'
    done = subprocess.run(["bash", "-c", command, sys.executable, CONSOLE], timeout=60)
    assert done.returncode == code and out.read_bytes().endswith(b"IEND\xaeB`\x82")


def test_signs_that_the_terminal_lacks_are_no_failure() -> None:
    process = start(
        "plan", MEDIA / "polar_bear.mp4", "--budget", "64", env={**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    )
    assert (process.communicate(timeout=60), process.returncode)[1] == 0


def test_the_exit_code_of_an_unknown_stop_is_that_of_ctrl_c() -> None:
    assert not stopping.asked() and stopping.code() == stopping.CTRL_C == 130
