"""What holds for all tests: threads, order, hypothesis, the fixtures that many files use."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from exports import Exports
from hypothesis import settings

BundleMaker = Callable[[str, str], Path]

# No test asserts how long something takes, nor does hypothesis for it.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# The shared parts of the golden tests are no test files of their own: let their assertions say what they saw, too.
pytest.register_assert_rewrite(
    "golden_losses", "golden_model", "golden_pixels", "golden_schedule", "golden_tra", "golden_training_data"
)

# A second thread of torch saves nothing on models this small, and where another process wants the core as well, as the
# other worker of pytest-xdist does, threads that wait for each other took twenty times as long. Programs under test
# inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background has them ignore SIGINT, which the programs under test would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = (
    "test_nano_model.py", "test_auto.py", "test_manifest.py", "test_nano.py", "test_calibrate.py", "test_kv_cache.py",
    "test_processes.py", "test_layer_errors.py", "test_quantize.py", "test_train.py", "test_resume.py",
    "test_clip_limits.py", "test_cli.py", "test_static.py", "test_bundle_identity.py", "test_convert.py",
    "test_evaluate.py", "test_not_finite.py", "test_shared_engine.py",
)  # fmt: skip
"""Files that take half a minute or more. Where several workers share the tests these come first, so that no worker is
left with a long one while the others are done. The first two wait for no bundle that the other one is exporting."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        ranks = {name: rank for rank, name in enumerate(LONGEST)}
        items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """A command that is called in this process sets its threads; with other threads the next test's sums differ."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    try:
        return (yield)
    finally:
        if torch:
            torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def nano_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BundleMaker]:
    """Exports penguin-nano for a target at a preset, once for all tests. They do the verifying, and change copies."""
    run = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # Each worker of pytest-xdist has a folder in that of the run.
        run = run.parent
    root = run / "exports"
    root.mkdir(exist_ok=True)
    exports = Exports(root)
    yield exports.nano
    exports.check()


@pytest.fixture(scope="session")
def _browser() -> Iterator[Any]:
    """Headless Chromium of the system; nothing is fetched."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium; Debian, Ubuntu: apt install chromium")
    offline = ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as tool:
        browser = tool.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--no-first-run", *offline]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(_browser: Any) -> Iterator[Any]:
    """An empty page of 1280 by 900; what goes wrong in it fails the test."""
    page = _browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    assert not wrong
