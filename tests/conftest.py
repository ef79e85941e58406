"""The shared parts of the golden tests are no test files of their own: let their assertions say what they saw, too."""

import signal

import pytest

pytest.register_assert_rewrite(
    "golden_losses", "golden_model", "golden_pixels", "golden_schedule", "golden_tra", "golden_training_data"
)

# A shell that starts the tests in the background has them ignore SIGINT, which the programs under test would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
