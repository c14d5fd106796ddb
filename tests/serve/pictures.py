# SPDX-License-Identifier: Apache-2.0
"""Images in files, as clients send them."""

import base64
import io
import struct
import zlib

import numpy as np
from PIL import Image

SIZE = (32, 32)


def picture(size=SIZE, mode="RGB", seed=0):
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), np.uint8)
    return Image.frombytes(mode, size, values.tobytes())


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def halves(size=SIZE):
    """Transparent on the left."""
    mask = Image.new("RGBA", size, (9, 9, 9, 255))
    mask.paste((9, 9, 9, 0), (0, 0, size[0] // 2, size[1]))
    return mask


def base64_png(image):
    return base64.b64encode(saved(image)).decode()


PNG = saved(picture())


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def claimed(width, height):
    """A small file that claims to be large."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 99))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + data + chunk(b"IEND", b"")


def palette(*chunks):
    """A black PNG with a palette, and what is said of it after the pixels."""
    head = struct.pack(">IIBBBBB", *SIZE, 8, 3, 0, 0, 0)
    data = zlib.compress(bytes((SIZE[0] + 1) * SIZE[1]))
    parts = [chunk(b"IHDR", head), chunk(b"PLTE", bytes(3)), chunk(b"IDAT", data), *chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def progressive(more_scans):
    """A JPEG whose last scan is repeated: each costs 30 bytes, and a look at every pixel."""
    data = saved(Image.new("L", (512, 512)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * more_scans + data[-2:]
