"""The compiled operators of penguin-edge: where their libraries lie, and what they say about themselves.

Nothing is loaded on import. `ort_ops` is for `SessionOptions.register_custom_ops_library`, `et_ops` for `ctypes.CDLL`
with `RTLD_GLOBAL` after ExecuTorch's binding.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import metadata
from pathlib import Path

__all__ = ["abi", "et_ops", "isa", "ort_ops", "reason"]
__version__ = metadata.version("penguin-edge-native")


def _library(name: str) -> Path | None:
    path = Path(__file__).resolve().parent / name
    return path if path.is_file() else None


def ort_ops() -> Path | None:
    """Give the library of ONNX Runtime's operators, or None where it was not built."""
    return _library("libpenguin_ort_ops.so")


def et_ops() -> Path | None:
    """Give the library of ExecuTorch's operators, or None where it was built without the package executorch."""
    return _library("libpenguin_et_ops.so")


@cache
def _loaded() -> ctypes.CDLL:
    path = ort_ops()
    if path is None:
        raise OSError(f"got no libpenguin_ort_ops.so beside {__file__}; install penguin-edge-native again")
    library = ctypes.CDLL(str(path))
    for name in ("penguin_ops_isa", "penguin_ops_reason"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def abi() -> int:
    """Give the number that changes with the inputs, outputs or attributes of an operator. OSError: cannot load."""
    return int(_loaded().penguin_ops_abi())


def isa() -> str | None:
    """Give the instruction set in use; None when PENGUIN_EDGE_ISA asks for what cannot run. OSError: cannot load."""
    name: bytes | None = _loaded().penguin_ops_isa()
    return None if name is None else name.decode()


def reason() -> str:
    """Say in a sentence why it is that instruction set, or why there is none. OSError: cannot load."""
    sentence: bytes = _loaded().penguin_ops_reason()
    return sentence.decode()
