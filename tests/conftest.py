"""The shared parts of the golden tests are no test files of their own: let their assertions say what they saw, too."""

import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

pytest.register_assert_rewrite(
    "golden_losses", "golden_model", "golden_pixels", "golden_schedule", "golden_tra", "golden_training_data"
)

# A shell that starts the tests in the background has them ignore SIGINT, which the programs under test would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def nano_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Exports penguin-nano for a target at a preset, once for all tests. They do the verifying."""

    @cache
    def export(target: str, quant: str) -> Path:
        out = tmp_path_factory.mktemp("nano") / f"{target}-{quant}"
        command = [sys.executable, "-m", "penguin_edge", "export", "--model", "nano", "--target", target]
        command += ["--quant", quant, "--max-seq-len", "512", "--no-verify", "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return out

    return export
