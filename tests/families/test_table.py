# SPDX-License-Identifier: Apache-2.0
"""What the package, `doctor` and the pages say was tested is what the tests run."""

import inspect
import re
from pathlib import Path

from msdda_fast.pipelines.families import TESTED
from tests.families.table import FAMILIES

ROOT = Path(__file__).parents[2]
CLASSES = {name for names in TESTED.values() for name in names}


def test_every_class_has_a_row():
    """A row's maker names its class, or that of the maker that it changes."""
    modules = {inspect.getmodule(family.make) for family in FAMILIES.values()}
    made = set(re.findall(r"diffusers\.(\w+Pipeline)\b", "".join(map(inspect.getsource, modules))))
    assert made == CLASSES


def test_every_family_is_on_the_page():
    readme = (ROOT / "README.md").read_text()
    table = readme.split("<!-- where:begin -->")[1].split("<!-- where:end -->")[0]
    assert [family for family in TESTED if family not in table] == []
    page = (ROOT / "docs/guide/pipelines.md").read_text()
    rows = dict(re.findall(r"^\| ([\w .-]+) \| (`.*`) \|$", page, re.M))
    assert {family: tuple(re.findall(r"`(\w+)`", row)) for family, row in rows.items()} == TESTED
