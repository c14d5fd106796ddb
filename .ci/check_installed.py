# SPDX-License-Identifier: Apache-2.0
"""Check the msdda_fast that this Python has, installed from a wheel: python check_installed.py ROOT

It lies outside of the checkout ROOT, has its models and its CPU kernels but nothing that they were
made from, and runs the first Python block of ROOT's README.
"""

import importlib.metadata
import os
import re
import runpy
import sys
import tempfile
from pathlib import Path

root = Path(sys.argv[1]).resolve()
with tempfile.TemporaryDirectory() as room:
    os.chdir(room)
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != root]

    import msdda_fast

    package = Path(msdda_fast.__file__).resolve().parent
    assert root not in package.parents, f"{package} is in the checkout"
    assert importlib.metadata.version("msdda-fast") == msdda_fast.__version__

    files = sorted(path.relative_to(package).as_posix() for path in package.rglob("*"))
    extra = [name for name in files if "sprites/" in name or "emoji/training" in name]
    assert not extra, f"the wheel should not have {extra}"
    for needed in ("py.typed", "assets/emoji/model_index.json", "serve/page/index.html"):
        assert needed in files, f"the wheel should have {needed}"

    from msdda_fast import _C  # noqa: F401 - its CPU kernels, built where the wheel was
    from msdda_fast.emoji.sprites import painted_sprites
    from msdda_fast.errors import AssetsMissing

    try:
        painted_sprites("noto")
    except AssetsMissing as error:
        assert "checkout" in str(error)
    else:
        raise AssertionError("there should be no sprites")

    block = re.search(r"```python\n(.*?)```", (root / "README.md").read_text("utf-8"), re.S)
    Path("first.py").write_text(block[1], "utf-8")
    runpy.run_path("first.py", run_name="__main__")
    print(f"{package}: msdda_fast {msdda_fast.__version__} works, {len(files)} files")
