# SPDX-License-Identifier: Apache-2.0
import pytest

from msdda_fast.files import write_atomically


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
