"""Color profiles built by hand (ICC.1:2001-04), and what colors of theirs are in sRGB, by the formulas."""

import struct

import numpy as np

# Columns: the XYZ, relative to D50, of full red, green, and blue.
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.1571], [0.2412, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]])
WHITE = (0.9642, 1.0, 0.82491)  # D50


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(x) + fixed(y) + fixed(z)


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def text(words: str) -> bytes:
    return b"desc\0\0\0\0" + struct.pack(">I", len(words) + 1) + words.encode() + bytes(1 + 8 + 3 + 67)


def profile(space: bytes, connection: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    """A profile of some tags."""
    tags = {b"desc": text("by hand"), b"wtpt": xyz(*WHITE)} | tags
    table, content, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        padded = value + bytes(-len(value) % 4)
        table += name + struct.pack(">II", start + len(content), len(value))
        content += padded
    header = struct.pack(
        ">I4sI4s4s4s12x4s28x", start + len(content), b"\0\0\0\0", 0x02400000, kind, space, connection, b"acsp"
    )
    header += b"".join(map(fixed, WHITE)) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + content


def rgb(matrix: np.ndarray, exponent: float) -> bytes:
    """A display's profile: three primaries and one exponent."""
    columns = {name: xyz(*column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix.T, strict=True)}
    return profile(b"RGB ", b"XYZ ", columns | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(exponent)))


def gray(exponent: float) -> bytes:
    return profile(b"GRAY", b"XYZ ", {b"kTRC": gamma(exponent)})


def cmyk() -> bytes:
    """A printer's profile by a table of the 16 corners in Lab, whose colors Pillow's own formula misses."""
    corners = []
    for c, m, y, k in np.ndindex(2, 2, 2, 2):
        light = 100 * (1 - 0.3 * c) * (1 - 0.5 * m) * (1 - 0.1 * y) * (1 - 0.9 * k)
        inked = 0.1 if k else 1.0
        a, b = inked * (60 * m - 30 * c), inked * (70 * y - 40 * c)
        corners += [round(light * 2.55), round(a + 128), round(b + 128)]
    ramp = bytes(range(256))
    unit = b"".join(map(fixed, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + unit + 4 * ramp + bytes(corners) + 3 * ramp
    return profile(b"CMYK", b"Lab ", {b"A2B0": table, b"A2B1": table}, b"prtr")


def encoded(linear: np.ndarray) -> np.ndarray:
    """Linear light, 0 to 1, by sRGB's curve to levels of 255 (IEC 61966-2-1)."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def in_srgb(levels: np.ndarray, matrix: np.ndarray, exponent: float) -> np.ndarray:
    """Levels of 255 (..., 3) in a display's colors to those of sRGB, without rounding."""
    return encoded((levels / 255.0) ** exponent @ matrix.T @ np.linalg.inv(SRGB).T)
