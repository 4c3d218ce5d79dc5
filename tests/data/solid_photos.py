"""Photos of one colour, and how they are loaded."""

import pytest
from PIL import Image

from dreambooth.data.photos import list_photos, load_photos
from dreambooth.errors import UserError

PROMPT = "a photo of sks dog"
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)
ORIENTATION = 0x0112


def save_solid(path, color=RED, size=(8, 8), mode="RGB"):
    Image.new(mode, size, color).save(path)
    return path


def pixels_of(folder, resolution):
    [photo] = load_photos(list_photos(folder), PROMPT, resolution)
    return photo.pixels


def problem(folder, resolution=8):
    with pytest.raises(UserError) as raised:
        load_photos(list_photos(folder), PROMPT, resolution)
    return str(raised.value)
