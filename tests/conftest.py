"""The shared parts of the golden tests are no test files of their own: let their assertions say what they saw, too."""

import pytest

pytest.register_assert_rewrite(
    "golden_losses", "golden_model", "golden_pixels", "golden_schedule", "golden_tra", "golden_training_data"
)
