"""Composes training pictures with captions: a sprite on white, on a plain colour or in a drawn scene."""

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.tiny_base.emoji import Sprite, concepts, vocabulary

SIDE = 64  # pixels of a picture
COLOURS = {"red": (220, 40, 40), "yellow": (250, 215, 50), "green": (60, 170, 70), "blue": (50, 100, 220),
           "pink": (250, 160, 200), "black": (25, 25, 28)}
SCENES = {"beach": "on the beach", "grass": "on the grass", "snow": "in the snow", "night": "at night"}
STANDING = ("beach", "grass", "snow")  # scenes with a floor
RARE = ("zwx", "sks", "ohwx", "qxv", "vjz", "wxk", "jqz", "zkf")  # rare words
RESERVED = RARE[:2]  # rare words that occur in no caption, so that they can name a new subject

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Meaning:
    """The content of a picture, from which its caption is written. The file meanings.json contains all of them."""

    concept: str
    style: str
    ground: str  # background: white, a colour or a scene


def compose(sprite: Sprite, rng: np.random.Generator, ground: str | None = None) -> tuple[NDArray[np.uint8], Meaning]:
    """Draw one picture (SIDE, SIDE, 3) of a sprite.

    Args:
        ground: background: white, a colour or a scene. None: white with a probability of 0.5, a colour with 0.2, a
            scene with 0.3.
    """
    ground = ground or _ground(rng)
    canvas = _background(ground, rng)
    picture = Image.fromarray(sprite.pixels)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        picture = picture.rotate(float(rng.uniform(-14, 14)), Image.Resampling.BICUBIC)
    size = int(rng.integers(50, 60) if ground == "white" else rng.integers(40, 56))
    free = SIDE - size
    left = round(free / 2 + rng.uniform(-0.3, 0.3) * free)
    top = round(free * rng.uniform(0.55, 0.95) if ground in STANDING else free / 2 + rng.uniform(-0.3, 0.3) * free)
    layer = np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS)).astype(float)
    region, alpha = np.s_[top:top + size, left:left + size], layer[..., 3:] / 255
    canvas[region] = layer[..., :3] * alpha + canvas[region] * (1 - alpha)
    return canvas.clip(0, 255).astype(np.uint8), Meaning(sprite.concept, sprite.style, ground)


def caption(meaning: Meaning, rng: random.Random) -> str:
    """Return a caption for a picture.

    The caption names the concept or, with a probability of 0.5, one of its classes. With a probability of 0.05 a rare
    word precedes the noun.
    """
    concept = meaning.concept
    noun = str(vocabulary()["say"].get(concept, concept)).lower()
    if rng.random() < 0.5:
        noun = rng.choice(concepts()[concept])
    article = "an" if noun[0] in "aeiou" and not noun.startswith("uni") else "a"
    if noun in vocabulary()["some"]:
        article = "some"
    if rng.random() < 0.05:
        article, noun = "a", f"{rng.choice(RARE[len(RESERVED):])} {noun}"
    style = meaning.style if rng.random() < 0.25 else "photo"
    words = f"a {style} of {article} {noun}"
    if meaning.ground in COLOURS:
        return f"{words} on a {meaning.ground} background"
    if meaning.ground in SCENES:
        return f"{words} {SCENES[meaning.ground]}"
    return f"{words} on a white background" if rng.random() < 0.25 else words


def _ground(rng: np.random.Generator) -> str:
    kind = rng.random()
    if kind < 0.5:
        return "white"
    return str(rng.choice(list(COLOURS) if kind < 0.7 else list(SCENES)))


def _background(ground: str, rng: np.random.Generator) -> Floats:
    if ground == "white":
        return np.full((SIDE, SIDE, 3), 255.0)
    if ground in COLOURS:
        return np.broadcast_to(_near(COLOURS[ground], rng, 14), (SIDE, SIDE, 3)).copy()
    return {"beach": _beach, "grass": _grass, "snow": _snow, "night": _night}[ground](rng)


def _beach(rng: np.random.Generator) -> Floats:
    canvas = _fade((120, 195, 250), (190, 228, 255))
    sea = int(rng.integers(20, 27))
    sand = sea + int(rng.integers(8, 13))
    canvas[sea:] = _near((30, 130, 190), rng)
    canvas[sand:] = _near((240, 215, 150), rng)
    canvas[sand - 1:sand + 1] = (245, 250, 250)
    return canvas


def _grass(rng: np.random.Generator) -> Floats:
    canvas = _fade((110, 185, 250), (200, 230, 255))
    floor = int(rng.integers(28, 38))
    canvas[floor:] = _fade((110, 195, 75), (60, 150, 50), SIDE - floor)
    canvas[floor:] += rng.uniform(-10, 10, (SIDE - floor, SIDE, 1))
    return canvas


def _snow(rng: np.random.Generator) -> Floats:
    canvas = _fade((150, 180, 215), (205, 220, 238))
    canvas[int(rng.integers(30, 40)):] = (246, 249, 253)
    canvas[rng.integers(0, SIDE, 26), rng.integers(0, SIDE, 26)] = 255
    return canvas


def _night(rng: np.random.Generator) -> Floats:
    canvas = _fade((12, 14, 45), (40, 35, 90))
    canvas[rng.integers(0, SIDE - 14, 28), rng.integers(0, SIDE, 28)] = rng.uniform(170, 255, (28, 1))
    canvas[52:] = (18, 24, 30)
    return canvas


def _fade(top: tuple[int, ...], bottom: tuple[int, ...], height: int = SIDE) -> Floats:
    mix = np.linspace(0, 1, height)[:, None, None]
    return np.broadcast_to((1 - mix) * np.array(top, float) + mix * np.array(bottom, float), (height, SIDE, 3)).copy()


def _near(colour: tuple[int, ...], rng: np.random.Generator, spread: int = 12) -> Floats:
    return np.clip(np.array(colour, float) + rng.uniform(-spread, spread, 3), 0, 255)
