"""Draws the tuning subject, which no base model has seen: `python -m tools.proof.subjects` renders its views.

Training recipes are chosen on the tuning subject, and the demo subject is used for measurements only. Views 0 to 4 are
for training, and the rest are held out.
"""

# ruff: noqa: E501  long lines of SVG
import io
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

SIDE = 64  # pixels
TUNING_VIEWS: tuple[dict[str, Any], ...] = (  # arguments of `draw_tuning_subject`
    {}, {"lean": -9, "look": 4, "ear": 6}, {"lean": 8, "look": -4, "ground": "#eef0e2", "scale": 0.92},
    {"lean": 3, "look": 2, "ground": "#e3ecf7", "scale": 0.86, "shift": 5}, {"lean": -5, "look": -2, "ear": -8, "scale": 0.95},
    {"lean": 5, "look": 3, "scale": 0.9}, {"lean": -4, "look": -3, "ear": 5, "scale": 0.97}, {"lean": 2, "shift": 3},
)


def draw_tuning_subject(lean: float = 0, look: float = 0, ear: float = 0, ground: str = "#ffffff", scale: float = 1,
                        shift: float = 0) -> str:
    """Return an SVG of a purple square toy with green aerials, two eyes, a yellow star on its belly and red feet."""
    body = f"""<g transform="translate({64 + shift},68) scale({scale}) rotate({lean})">
<g stroke="#3c9d3f" stroke-width="5" stroke-linecap="round"><path d="M-18 -38 L{-26 - ear} -56"/><path d="M18 -38 L{26 + ear} -56"/></g>
<circle cx="{-26 - ear}" cy="-57" r="6" fill="#6fd54a"/><circle cx="{26 + ear}" cy="-57" r="6" fill="#6fd54a"/>
<rect x="-46" y="-8" width="14" height="30" rx="7" fill="#6a3fa8"/><rect x="32" y="-8" width="14" height="30" rx="7" fill="#6a3fa8"/>
<ellipse cx="-18" cy="46" rx="15" ry="9" fill="#e0403a"/><ellipse cx="18" cy="46" rx="15" ry="9" fill="#e0403a"/>
<rect x="-36" y="-40" width="72" height="84" rx="12" fill="#8a55d6"/>
<circle cx="-15" cy="-20" r="12" fill="#fff"/><circle cx="15" cy="-20" r="12" fill="#fff"/>
<circle cx="{-15 + look}" cy="-19" r="6" fill="#222"/><circle cx="{15 + look}" cy="-19" r="6" fill="#222"/>
<path d="M0 2 L5 15 L19 15 L8 23 L12 37 L0 29 L-12 37 L-8 23 L-19 15 L-5 15 Z" fill="#ffd23c"/></g>"""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="256" height="256" viewBox="0 0 128 128">'
            f'<rect width="128" height="128" fill="{ground}"/>{body}</svg>')


def render(svg: str) -> Image.Image:
    """Render an SVG to an RGB picture of SIDE x SIDE pixels."""
    picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGB")
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main() -> None:
    folder = Path(__file__).with_name("views")
    for number, view in enumerate(TUNING_VIEWS):
        target = folder / ("tuning" if number < 5 else "tuning-held-out") / f"{number:02d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        render(draw_tuning_subject(**view)).save(target)


if __name__ == "__main__":
    main()
