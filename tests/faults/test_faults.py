# SPDX-License-Identifier: Apache-2.0
"""The list of faults follows the code; `plant.py` shows that tests notice them."""

import json

import pytest

from tests.faults import plant
from tests.faults.list import FAULTS, Fault

FAULT = Fault("here", "One is two.", "one.py", "1", "2", ())


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.id for fault in FAULTS])
def test_the_fault_can_still_be_planted(fault):
    assert plant.planted(plant.ROOT, fault) != (plant.ROOT / fault.file).read_text("utf-8")
    assert fault.tests and all((plant.ROOT / test).exists() for test in fault.tests)


def test_faults_have_names_of_their_own():
    assert len({fault.id for fault in FAULTS}) == len(FAULTS) >= 40


@pytest.mark.parametrize(("text", "count"), [("one = 0", 0), ("one = 1\nother = 1", 2)])
def test_a_fault_without_its_text_is_named(text, count, tmp_path):
    (tmp_path / "one.py").write_text(text)
    with pytest.raises(ValueError, match=f"'here': its text is {count} times in one.py, not once"):
        plant.planted(tmp_path, FAULT)


def test_a_fault_is_gone_afterwards(tmp_path, monkeypatch):
    tree, copy = tmp_path / "tree", tmp_path / "copy"
    for folder in (tree, copy):
        folder.mkdir()
        (folder / "one.py").write_text("one = 1")
    monkeypatch.setattr(plant, "ROOT", tree)
    with plant.in_place(copy, FAULT):
        assert (copy / "one.py").read_text() == "one = 2"
        assert (tree / "one.py").read_text() == "one = 1"
    assert (copy / "one.py").read_text() == "one = 1"


def test_what_was_planted_is_not_planted_again(tmp_path, monkeypatch):
    monkeypatch.setattr(plant, "RESULTS", tmp_path / "results.json")
    first, second = FAULTS[:2]
    stored = {fault.id: {"text": plant.digest(fault), "noticed_by": "test"} for fault in FAULTS[1:]}
    plant.keep({**stored, "gone": {}})
    assert plant.missing(plant.kept()) == [first]
    stored[second.id]["text"] = "another"
    (tmp_path / "results.json").write_text(json.dumps(stored))
    assert plant.missing(plant.kept()) == [first, second]


def test_failing_tests_are_read_off_what_pytest_says():
    said = "F.\nFAILED tests/a.py::test_b[x 1] - assert 0\nERROR tests/c.py\n1 failed"
    assert plant.NOTICED.findall(said) == ["tests/a.py::test_b[x 1]", "tests/c.py"]


def test_every_fault_of_the_list_was_planted_as_it_is_and_noticed():
    stored = json.loads(plant.RESULTS.read_text("utf-8"))
    again = "python -m tests.faults.plant"
    assert not plant.missing(stored), again
    assert stored.keys() == {fault.id for fault in FAULTS}, again
    assert not [name for name, result in stored.items() if result["noticed_by"] is None]
