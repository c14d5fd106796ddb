# SPDX-License-Identifier: Apache-2.0
import pytest

from msdda_fast.files import read_json, write_atomically


def test_a_write_makes_the_folder_and_replaces_the_file(tmp_path):
    file = tmp_path / "new" / "x"
    for text in ("one", "two"):
        write_atomically(file, lambda partial, text=text: partial.write_text(text))
        assert file.read_text() == text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "x"
    file.write_text("old")

    def fail(partial):
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, fail)
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff", b"[" * 100_000, b"null"], ids=range(5))
def test_json_that_is_no_object(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=r"x\.json is not a list of things in JSON") as raised:
        read_json(file, "a list of things")
    assert "\n" not in str(raised.value)
