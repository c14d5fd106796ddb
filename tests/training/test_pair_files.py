# SPDX-License-Identifier: Apache-2.0
"""Pairs from a folder: read with every bad line named, encoded once per image."""

import json
import struct
import zlib

import pytest
import torch
from PIL import Image

from msdda_fast.training import InvalidPairs, encode_pairs, read_pairs
from msdda_fast.training.pair_files import load_image

GOOD = {"prompt": "a red dog", "chosen": "red.png", "rejected": "blue.png"}


@pytest.fixture
def folder(tmp_path):
    for name in ("red", "blue", "lime"):
        Image.new("RGB", (8, 8), name).save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


class Encoder:
    """Latents that are the image itself, at half the size; counts images."""

    def __init__(self):
        self.count = 0

    def __call__(self, images):
        self.count += len(images)
        return images[:, :, ::2, ::2]


def encode(folder, encoder, codec="one", size=(8, 8)):
    return encode_pairs(
        read_pairs(folder), encoder, size, codec, folder / "out" / "cache.safetensors",
        progress=False,
    )  # fmt: skip


def test_jsonl_and_csv_say_the_same(folder):
    rows = read_pairs(write(folder, GOOD, "", GOOD | {"prompt": 'a "lime", say'}))
    assert [row.prompt for row in rows] == ["a red dog", 'a "lime", say']
    assert rows[0].chosen == folder / "red.png" and rows[0].rejected == folder / "blue.png"
    (folder / "pairs.jsonl").unlink()
    (folder / "pairs.csv").write_text(
        "prompt,chosen,rejected\n"
        'a red dog,red.png,blue.png\n\n"a ""lime"", say",red.png,blue.png\n'
    )  # fmt: skip
    assert read_pairs(folder) == rows


def test_every_bad_line_is_named_by_its_number(folder):
    (folder / "text.png").write_text("no image")
    rows = [
        GOOD,
        "{not json",
        GOOD | {"chosen": "gone.png"},
        GOOD | {"rejected": "text.png"},
        GOOD | {"prompt": " "},
        {"prompt": "a", "winner": "red.png"},
        GOOD | {"rejected": "red.png"},
        ["a list"],
    ]
    with pytest.raises(InvalidPairs) as caught:
        read_pairs(write(folder, *rows))
    message = str(caught.value)
    for text in (
        "line 2: not JSON", "line 3: no file at", "gone.png", "text.png is not a readable image",
        "line 5: prompt must be", "line 6: expected the columns prompt, chosen, rejected, got",
        "line 7: red.png is preferred to itself", "line 8: ",
    ):  # fmt: skip
        assert text in message
    assert "line 1:" not in message
    with pytest.raises(InvalidPairs, match="and 15 more"):
        read_pairs(write(folder, *["{"] * 25))


def test_bad_csv_and_bad_folders_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"no pairs\.jsonl or pairs\.csv in"):
        read_pairs(folder)
    table = folder / "pairs.csv"
    table.write_text("prompt,chosen,rejected\na,red.png\nb,red.png,blue.png,more\n")
    with pytest.raises(InvalidPairs, match=r"line 2: rejected must be.*line 3: expected the col"):
        read_pairs(folder)
    table.write_text('prompt,chosen,rejected\n"a"b,red.png,blue.png\n')
    with pytest.raises(InvalidPairs, match="not CSV"):
        read_pairs(folder)
    table.write_text("prompt,chosen,rejected\n")
    with pytest.raises(InvalidPairs, match="has no pairs"):
        read_pairs(folder)
    with pytest.raises(InvalidPairs, match=r"both pairs\.jsonl and pairs\.csv"):
        read_pairs(write(folder, GOOD))


def test_each_image_is_encoded_once_and_kept(folder):
    write(folder, GOOD, {"prompt": "lime", "chosen": "lime.png", "rejected": "red.png"})
    encoder = Encoder()
    pairs, prompts = encode(folder, encoder)
    assert encoder.count == 3 and prompts == ["a red dog", "lime"]
    assert pairs.prompt_index.tolist() == [0, 1] and pairs.chosen.shape == (2, 3, 4, 4)
    assert torch.equal(pairs.chosen[0], pairs.rejected[1])
    assert pairs.chosen[:, :, 0, 0].tolist() == [[1, 0, 0], [0, 1, 0]]

    again = Encoder()
    same, _ = encode(folder, again)
    assert again.count == 0 and torch.equal(same.chosen, pairs.chosen)
    Image.new("RGB", (8, 8), "white").save(folder / "lime.png")
    changed, _ = encode(folder, again)
    assert again.count == 1 and changed.chosen[1].min() == 1
    for other in ({"codec": "two"}, {"size": (4, 4)}):
        another = Encoder()
        encode(folder, another, **other)
        assert another.count == 3
    (folder / "out" / "cache.safetensors").write_bytes(b"half")
    anew, _ = encode(folder, again)
    assert again.count == 4 and torch.equal(anew.chosen, changed.chosen)


def test_images_are_fitted_by_the_shorter_side_and_cropped_around_the_centre(tmp_path):
    wide = Image.new("RGB", (40, 10), "black")
    wide.paste((255, 255, 255), (15, 0, 25, 10))
    wide.save(tmp_path / "wide.png")
    fitted = load_image(tmp_path / "wide.png", (10, 10))
    assert fitted.shape == (3, 10, 10) and fitted.min() == 1


@pytest.mark.parametrize("size", [(8192, 8193), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_an_image_that_claims_too_many_pixels_is_not_decoded(folder, monkeypatch, size):
    """A PNG of a few bytes: its header says how much memory it would take."""
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    (folder / "blue.png").write_bytes(bomb)
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(InvalidPairs, match=r"line 1: .*blue\.png is too large to decode"):
        read_pairs(write(folder, GOOD))
    with pytest.raises(InvalidPairs, match=r"blue\.png is too large to decode"):
        load_image(folder / "blue.png", (8, 8))
