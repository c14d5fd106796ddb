# SPDX-License-Identifier: Apache-2.0
"""Results are continued with the settings that made them, or refused by name."""

import hashlib
import json
import threading
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

from msdda_fast import resume
from msdda_fast.errors import MSDDAError, ResumeMismatch

SETTINGS = {"steps": 2, "prompts": ["a", "b"], "objectives": {"warm": {"eta": 1.0}}, "none": None}


def test_the_error_is_a_value_error_of_this_package():
    assert issubclass(ResumeMismatch, MSDDAError) and issubclass(ResumeMismatch, ValueError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 3}, "steps was 2, is 3"),
        ({"prompts": ["a", "c"]}, r"prompts\[1\] was 'b', is 'c'"),
        ({"prompts": ["a"]}, r"prompts\[1\] was 'b', is absent"),
        ({"objectives": {"warm": {"eta": 0.8}}}, r"objectives\.warm\.eta was 1\.0, is 0\.8"),
        ({"objectives": {"cool": {"eta": 1.0}}}, r"objectives\.cool\.eta was absent, is 1\.0"),
        ({"none": "x"}, "none was None, is 'x'"),
        ({"more": 1}, "more was absent, is 1"),
    ],
)
def test_each_change_is_named_with_both_values_and_what_to_do(tmp_path, change, message):
    resume.bind(tmp_path, SETTINGS)
    kept = (tmp_path / "settings.json").read_bytes()
    for refused in (resume.check, resume.bind):
        with pytest.raises(ResumeMismatch, match=f"{message}.*Use the earlier values.*folder"):
            refused(tmp_path, {**SETTINGS, **change})
    assert (tmp_path / "settings.json").read_bytes() == kept
    resume.check(tmp_path, {**SETTINGS, "prompts": ("a", "b")})


def test_of_many_differences_a_few_are_shown(tmp_path):
    with pytest.raises(ResumeMismatch, match=r"and 7 more\. Use"):
        resume.require_same(tmp_path, dict.fromkeys("abcdefghij", 1), {})


def test_another_version_is_named_first(tmp_path, monkeypatch):
    resume.bind(tmp_path, SETTINGS)
    monkeypatch.setattr(resume, "FORMAT", resume.FORMAT + 1)
    with pytest.raises(ResumeMismatch, match=f"otherwise: format was 1, is {resume.FORMAT}"):
        resume.check(tmp_path, {**SETTINGS, "steps": 3})
    (tmp_path / "settings.json").write_text('{"steps": 2}')  # of a version without formats
    with pytest.raises(ResumeMismatch, match="format was absent"):
        resume.check(tmp_path, SETTINGS)


def test_checking_writes_nothing(tmp_path):
    resume.check(tmp_path / "new", SETTINGS)
    assert not list(tmp_path.iterdir())


def test_of_those_that_start_together_one_wins_and_those_with_other_settings_lose(tmp_path):
    barrier, outcomes = threading.Barrier(8), []

    def start(steps):
        barrier.wait()
        try:
            resume.bind(tmp_path / "new", {"steps": steps})
            outcomes.append(steps)
        except ResumeMismatch as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=start, args=(n % 2,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = json.loads((tmp_path / "new" / "settings.json").read_text())["steps"]
    assert outcomes.count(won) == 4
    assert sum(f"steps was {won}, is {1 - won}" in str(o) for o in outcomes) == 4
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["settings.json"]


def test_a_file_system_without_links_will_do(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(resume.os, "link", refused)
    resume.bind(tmp_path, SETTINGS)
    resume.check(tmp_path, SETTINGS)
    with pytest.raises(ResumeMismatch, match="steps was 2, is 3"):
        resume.bind(tmp_path, {**SETTINGS, "steps": 3})


def test_a_result_without_its_record_is_refused_or_compared_by_its_own_fingerprint(tmp_path):
    table = tmp_path / "scores.csv"
    resume.check(tmp_path, SETTINGS, unmarked=[table])
    table.touch()
    with pytest.raises(ResumeMismatch, match=r"scores\.csv is there without settings\.json.*move"):
        resume.check(tmp_path, SETTINGS, unmarked=[table])
    image = tmp_path / "image.png"
    with pytest.raises(ResumeMismatch, match=r"image\.png has no fingerprint.*delete it"):
        resume.check(tmp_path, SETTINGS, results=[(image, None, SETTINGS)])
    with pytest.raises(ResumeMismatch, match=r"image\.png was made otherwise: seed was 1, is 2"):
        resume.check(tmp_path, {}, results=[(image, resume.mark({"seed": 1}), {"seed": 2})])
    resume.check(tmp_path, {}, results=[(image, resume.mark({"seed": 2}), {"seed": 2})])


@pytest.mark.parametrize(("text", "message"), [("", "damaged"), ("[1]", "holds no settings")])
def test_a_damaged_record_is_named(tmp_path, text, message):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ResumeMismatch, match=rf"settings\.json.*{message}"):
        resume.check(tmp_path, SETTINGS)


class Score:
    name = "score"

    def __init__(self, **attributes):
        vars(self).update(attributes)


@dataclass
class Frame:
    inner: object


def scaled(scale):
    return lambda images: scale * images


def test_digests_change_with_the_content(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("1")
    folder.mkdir()
    (folder / "weights").write_text("1")
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    other = nn.Linear(2, 2)
    values = [
        0, 0.0, "0", None, (), (0,), {"a": 0}, {"b": 0}, {0}, torch.zeros(2), torch.zeros(2, 1),
        torch.zeros(2, dtype=torch.half), torch.ones(2), layer, other, file, folder, tmp_path / "x",
        Score(), Score(a=1), Score(a=2), Score(a=layer), Score(a=Score(b=layer)),
        Score(a=Score(b=other)), Score(a=torch.zeros(2).numpy()), Score(a=torch.ones(2).numpy()),
        Frame(0), Frame(1), Frame(Frame(1)), scaled(1.0), scaled(2.0), scaled(layer),
        lambda x: x + 1, lambda x: x + 2, lambda x, y=1: x + 2, partial(scaled, 1), partial(scaled),
        torch.no_grad()(scaled(1.0)), layer.forward, other.forward,
    ]  # fmt: skip
    digests = [resume.digest(value) for value in values]
    same = {digests[29], digests[37]}  # a function, and one wrapped
    assert len(same) == 1 and len(set(digests)) == len(values) - 1
    assert digests == [resume.digest(value) for value in values]


def test_digests_do_not_count_caches_and_loops():
    loop = Score(a=1)
    loop.self = loop
    assert resume.digest(loop) == resume.digest(loop)
    states = [Score(cache=Score(calls=n, text="x" * n)) for n in (0, 1)]
    assert resume.digest(states[0]) == resume.digest(states[1])
    assert resume.named(states[0]) == f"score {resume.digest(states[0])}"


def test_files_are_read_once_until_they_change(tmp_path, monkeypatch):
    file = tmp_path / "adapter" / "weights"
    file.parent.mkdir()
    file.write_bytes(b"1")
    before = resume.file_digest(file.parent)
    read = []
    real = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, kind: (read.append(file.name), real(file, kind))[1]
    )
    assert resume.file_digest(file.parent) == before and read == []
    file.write_bytes(b"22")
    assert resume.file_digest(file.parent) != before and read == [str(file)]
    with pytest.raises(FileNotFoundError):
        resume.file_digest(tmp_path / "nothing")
