# SPDX-License-Identifier: Apache-2.0
"""Forms and files that are refused: by the name of the field, and before they cost anything."""

import json
import time

import pytest
from PIL import Image

from tests.serve.pictures import (
    PNG,
    SIZE,
    base64_png,
    chunk,
    claimed,
    halves,
    palette,
    picture,
    progressive,
    saved,
)
from tests.serve.test_fields import OUT_OF_RANGE, check

#: Opacity of 999 colours, where a palette has 256 at most.
MANY_OPACITIES = palette(chunk(b"tRNS", bytes(999)))
BAD_FILES = [
    (b"", "image", "PNG or JPEG or WEBP"),
    (b"GIF89a" + b"\0" * 99, "image", "PNG or JPEG or WEBP"),
    (saved(picture(), "GIF"), "image", "PNG or JPEG or WEBP"),
    (saved(picture(), "TIFF"), "image", "PNG or JPEG or WEBP"),
    (saved(picture(), "PPM"), "image", "PNG or JPEG or WEBP"),
    (b"%!PS-Adobe-3.0\n%%BoundingBox: 0 0 9 9\n", "image", "PNG or JPEG or WEBP"),
    (PNG[:-40], "image", "damaged"),
    (PNG[: len(PNG) // 2] + bytes(len(PNG) - len(PNG) // 2), "image", "damaged"),
    (saved(picture((64, 64)), "JPEG")[:-200], "image", "damaged"),
    (claimed(20_000, 20_000), "image", ""),
    (claimed(9_000, 9_000), "image", "more than 16777216"),
    (claimed(2**31 - 1, 2**31 - 1), "image", ""),
    (claimed(0, 0), "image", ""),
    (saved(picture(), "PNG", save_all=True, append_images=[picture(seed=1)]), "image", "animated"),
    (saved(picture(), "WEBP", save_all=True, append_images=[picture(seed=1)]), "image", "animated"),
    (saved(Image.new("I;16", SIZE)), "image", "8 bits a channel"),
    (MANY_OPACITIES, "image", "damaged"),
    (progressive(20_000), "image", "more than 100 scans"),
]
BAD_MASKS = [
    (saved(halves((16, 32))), "it has 16 x 32 pixels, and the image 32 x 32"),
    (saved(halves((64, 64))), "more than 1024"),
    (saved(picture()), "transparent where"),
    (saved(picture(), "JPEG"), "expected PNG"),
    (b"", "expected PNG"),
    (MANY_OPACITIES, "damaged"),
]
SMALL = base64_png(picture((16, 16), "L"))


class TestRefusals:
    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize(("data", "param", "reason"), BAD_FILES, ids=lambda v: ascii(v)[:30])
    def test_images(self, edit, data, param, reason):
        start = time.monotonic()
        answer = edit(data)
        check(answer, param)
        assert reason in answer.json()["error"]["message"]
        assert time.monotonic() - start < 5

    @pytest.mark.parametrize(("data", "reason"), BAD_MASKS, ids=lambda v: ascii(v)[:30])
    def test_masks(self, edit, data, reason):
        answer = edit(mask=data)
        check(answer, "mask")
        assert reason in answer.json()["error"]["message"]

    @pytest.mark.parametrize(
        ("fields", "param", "reason"),
        [
            ({"image": None}, "image", "required"),
            ({"prompt": None}, "prompt", "required"),
            ({"image": "text"}, "image", "expected a file"),
            ({"mask": "text"}, "mask", "expected a file"),
            ({"markup": PNG}, "markup", "no file is expected"),
            ({"prompt": b"text"}, "prompt", "no file is expected"),
            ({"input_fidelity": "high"}, "input_fidelity", "not permitted"),
            ({"n": "one"}, "n", "valid integer"),
            ({"n": "1.5"}, "n", "valid integer"),
            ({"n": ""}, "n", "valid integer"),
            ({"n": "9" * 5000}, "n", "valid integer"),
            ({"n": ["1", "2"]}, "n", "more than once"),
            ({"seed": "[" * 5000}, "seed", "valid integer"),
            ({"stream": "yes"}, "stream", "valid boolean"),
            ({"image_strength": "0"}, "image_strength", "greater than 0"),
            ({"image_strength": "1.01"}, "image_strength", "less than or equal to 1"),
            ({"image_strength": "NaN"}, "image_strength", "finite"),
            ({"weights": "warm"}, "weights", "valid dictionary"),
            ({"weights[warm": "1"}, "weights[warm", "not permitted"),
            ({"weights[]": "1"}, "weights", ""),
            ({"weights": "{}", "weights[warm]": "1"}, "weights", "given at once"),
            ({"weights[warm][x]": "1", "weights[warm]": "1"}, "weights", "more than once"),
            ({"prompt[x]": "1"}, "prompt", ""),
            ({"masks[warm]": SMALL}, "masks.warm", "it has 16 x 16 pixels"),
        ],
        ids=lambda v: str(v)[:40],
    )
    def test_fields(self, edit, fields, param, reason):
        answer = edit(**fields)
        check(answer, param)
        assert reason in answer.json()["error"]["message"]

    @pytest.mark.parametrize("field", sorted(OUT_OF_RANGE.keys() - {"model", "prompt"}))
    def test_what_a_generation_refuses(self, edit, field):
        for value in OUT_OF_RANGE[field]:
            if "\ud800" not in str(value) and value != 0.99:  # guidance of other pipelines
                check(
                    edit(**{field: value if isinstance(value, str) else json.dumps(value)}), field
                )

    def test_several_images_by_name(self, served):
        for name in ("image", "image[]"):
            files = [(name, ("a.png", PNG)), (name, ("b.png", PNG))]
            answer = served.http.post("/v1/images/edits", data={"prompt": "a"}, files=files)
            check(answer, "image")
            assert "one file is taken" in answer.text

    @pytest.mark.parametrize(
        ("content", "kind"),
        [
            (b"{}", "application/json"),
            (b"prompt=a", "application/x-www-form-urlencoded"),
            (b"", ""),
            (b"", "multipart/form-data"),
            (b"x", "multipart/form-data; boundary=b"),
            (b"--b\r\n\r\n\r\n--b--\r\n", "multipart/form-data; boundary=b"),
            (b"--b\r\nX: y\r\n\r\n\r\n--b--\r\n", "multipart/form-data; boundary=b"),
            (b"--b\r\n" + b"X: y\r\n" * 99, "multipart/form-data; boundary=b"),
            (b"--b--\r\n", "multipart/form-data; boundary=b; charset=punycode"),
            (b"--b--\r\n", "multipart/form-data; boundary=" + "b" * 999),
            (b"--b--\r\n", "multipart/form-data; boundary=b"),
        ],
        ids=lambda v: ascii(v)[:40],
    )
    def test_what_is_no_form(self, served, content, kind):
        headers = {"content-type": kind} if kind else {}
        answer = served.http.post("/v1/images/edits", content=content, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"

    def test_too_many_parts_and_too_long_ones(self, served, edit):
        many = {f"a{i}": "1" for i in range(300)}
        assert "Too many fields" in edit(**many).json()["error"]["message"]
        files = [("image", ("a.png", b"")) for _ in range(18)]
        answer = served.http.post("/v1/images/edits", data={"prompt": "a"}, files=files)
        assert "Too many files" in answer.json()["error"]["message"]
        assert "exceeded maximum size" in edit(prompt="a" * 2**21).json()["error"]["message"]
        answer = edit(bytes(2**24))
        assert answer.status_code == 413 and "longer than 16777216" in answer.text
