"""Penguin-VL on edge devices: the model, its export, its quantization and its runtime.

Importing this package is cheap: no torch, no engine, no codec. Import the module you need, for instance
`penguin_edge.runtime` on a device or `penguin_edge.model` where torch is installed.
"""

from __future__ import annotations

__version__ = "0.1.0"
