"""Colour profiles of the International Color Consortium (ICC), built from their published numbers.

The format of the tags is in ICC.1:2022, sections 9 and 10. The primaries are adapted to D50, which is the
white of profiles.
"""

import struct

Colorant = tuple[float, float, float]
SRGB = (0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)
DISPLAY_P3 = (0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)
ADOBE_RGB = (0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # parameters of IEC 61966-2.1


def _fixed(*numbers: float) -> bytes:
    return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))


def _curve(curve: tuple[float, ...]) -> bytes:
    return b"para\0\0\0\0" + struct.pack(">HH", {1: 0, 5: 3}[len(curve)], 0) + _fixed(*curve)


def _profile(space: bytes, device: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    white = b"XYZ \0\0\0\0" + _fixed(0.9642, 1.0, 0.8249)
    tags = {b"desc": _text("a profile"), b"cprt": _text("none"), b"wtpt": white} | tags
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", start + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    head = struct.pack(">I4s4s4s4s4s12s4s", start + len(body), b"lcms", b"\4\x30\0\0", device, space, connection,
                       bytes(12), b"acsp")
    return (head + bytes(28) + _fixed(0.9642, 1.0, 0.8249)).ljust(128, b"\0") + table + body


def _text(words: str) -> bytes:
    text = words.encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(text), 28) + text


def rgb_profile(primaries: tuple[Colorant, Colorant, Colorant], curve: tuple[float, ...] = SRGB_CURVE) -> bytes:
    """Return the profile of an RGB space with the given primaries (XYZ of red, green and blue) and tone curve."""
    xyz = {name: b"XYZ \0\0\0\0" + _fixed(*color)
           for name, color in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}
    return _profile(b"RGB ", b"mntr", b"XYZ ", xyz | {name: _curve(curve) for name in (b"rTRC", b"gTRC", b"bTRC")})


def grey_profile(gamma: float) -> bytes:
    """Return the profile of grey levels with a power law as their tone curve."""
    return _profile(b"GRAY", b"mntr", b"XYZ ", {b"kTRC": _curve((gamma,))})


def cmyk_profile() -> bytes:
    """Return the profile of a printer whose four inks all have the same effect: each makes the paper darker."""
    ramp = bytes(range(256))
    nodes = bytes(value for inks in range(16) for value in (255 - 255 * inks.bit_count() // 4, 128, 128))  # Lab
    lut = (b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + nodes + ramp * 3)
    return _profile(b"CMYK", b"prtr", b"Lab ", {b"A2B0": lut})
