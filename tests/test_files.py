# SPDX-License-Identifier: Apache-2.0
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from msdda_fast import files
from msdda_fast.errors import InvalidOutput, WriteFailed
from msdda_fast.files import check_files, check_folder, read_json, write_atomically


def put(path, text="new"):
    write_atomically(path, lambda partial: partial.write_text(text))


def test_a_write_makes_the_folder_and_replaces_the_file(tmp_path):
    file = tmp_path / "new" / "x"
    for text in ("one", "two"):
        put(file, text)
        assert file.read_text() == text
    assert [p.name for p in file.parent.iterdir()] == ["x"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "x"
    file.write_text("old")

    def fail(partial):
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, fail)
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_write_that_fails_names_the_file(tmp_path):
    def full(partial):
        partial.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(WriteFailed, match=f"cannot write {tmp_path}/x: No space left on device"):
        write_atomically(tmp_path / "x", full)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", [torch.save, save_file])
def test_libraries_that_make_files_of_their_own_leave_nothing(tmp_path, library):
    write_atomically(tmp_path / "x", lambda partial: library({"a": torch.ones(2)}, partial))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.fixture(params=["link", "dangling link", "link to a device", "folder", "pipe", "device"])
def unfit(request, tmp_path):
    place = tmp_path / "place"
    (tmp_path / "real").write_text("old")
    match request.param:
        case "link":
            place.symlink_to(tmp_path / "real")
        case "dangling link":
            place.symlink_to(tmp_path / "missing")
        case "link to a device":
            place.symlink_to("/dev/null")
        case "folder":
            place.mkdir()
        case "pipe":
            os.mkfifo(place)
        case "device":
            return Path("/dev/null")
    return place


def test_only_regular_files_are_replaced(unfit, tmp_path):
    before = os.lstat(unfit)
    for attempt in (check_files, put):
        with pytest.raises(InvalidOutput, match=str(unfit)):
            attempt(unfit)
    assert os.lstat(unfit).st_ino == before.st_ino and os.lstat(unfit).st_mode == before.st_mode
    assert (tmp_path / "real").read_text() == "old" and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("check", [check_files, lambda file: check_folder(file.parent)])
class TestBeforeAnyWork:
    def test_nothing_is_made_where_all_is_well(self, tmp_path, check):
        check(tmp_path / "new" / "folder" / "x")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
    def test_a_place_that_cannot_be_written_is_refused(self, tmp_path, check, code, monkeypatch):
        def refuse(*_, **__):
            raise OSError(code, os.strerror(code))

        name = "mkdir" if code in (errno.EROFS, errno.EACCES) else "write_bytes"
        monkeypatch.setattr(Path, name, refuse)
        with pytest.raises(InvalidOutput, match=f"cannot write in {tmp_path}: {os.strerror(code)}"):
            check(tmp_path / "new" / "x")
        monkeypatch.undo()
        assert not list(tmp_path.iterdir())

    def test_a_file_is_no_folder(self, tmp_path, check):
        (tmp_path / "file").write_text("old")
        (tmp_path / "lost").symlink_to(tmp_path / "missing")
        for name in ("file", "lost"):
            with pytest.raises(InvalidOutput, match=f"{tmp_path}/{name} is not a folder"):
                check(tmp_path / name / "deep" / "x")

    def test_a_name_that_is_too_long_is_refused(self, tmp_path, check):
        with pytest.raises(InvalidOutput, match="longer than 255 bytes"):
            check(tmp_path / ("\N{DOG}" * 64) / "x")


def test_a_long_name_that_fits_is_written(tmp_path):
    file = tmp_path / ("\N{DOG}" * 62 + ".png")
    check_files(file)
    put(file)
    assert file.read_text() == "new"


KILLED = """
import signal, sys, time
from pathlib import Path
from msdda_fast.files import write_atomically

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background

def slowly(partial):
    partial.write_text("half")
    print("writing", flush=True)
    time.sleep(60)

write_atomically(Path(sys.argv[1]), slowly)
"""


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, tmp_path / name], stdout=subprocess.PIPE, text=True
        )
        for name in ("killed", "living")
    ]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "writing\n"
        writers[0].kill()
        writers[0].wait()
        assert len(list(tmp_path.glob(".*.partial"))) == 2
        put(tmp_path / "other")
        check_folder(tmp_path)
        (left,) = tmp_path.glob(".*.partial")
        assert "living" in left.name and (left / "living").read_text() == "half"
        writers[1].send_signal(signal.SIGINT)  # a Ctrl-C removes its own
        writers[1].wait()
        assert [p.name for p in tmp_path.iterdir()] == ["other"]
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def test_leftovers_of_a_run_are_found_in_its_folders(tmp_path):
    (tmp_path / "cells").mkdir()
    for name in (".grid.png.4711.partial", "cells/.x.png.1.partial"):
        (tmp_path / name).write_text("half")
    others = {".notes.partial", "kept.partial"}
    for name in others:
        (tmp_path / name).write_text("somebody's")
    check_folder(tmp_path)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} == {"cells", *others}


def test_a_place_is_not_lost_when_another_takes_a_new_folder_for_a_leftover(tmp_path, monkeypatch):
    lock, rivals = files._lock, []

    def late(descriptor, *, wait):
        if wait and not rivals:
            rivals.append(descriptor)
            files._remove_leftovers(tmp_path, (".*.partial",))
        return lock(descriptor, wait=wait)

    monkeypatch.setattr(files, "_lock", late)
    put(tmp_path / "x")
    assert rivals and [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device")
def test_json_without_an_end(tmp_path):
    (tmp_path / "x.json").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="it has more than 33554432 bytes"):
        read_json(tmp_path / "x.json", "a list of things")


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff", b"[" * 100_000, b"null"], ids=range(5))
def test_json_that_is_no_object(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=r"x\.json is not a list of things in JSON") as raised:
        read_json(file, "a list of things")
    assert "\n" not in str(raised.value)
