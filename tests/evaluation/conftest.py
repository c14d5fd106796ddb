# SPDX-License-Identifier: Apache-2.0
import pytest

import msdda_fast as mf
from tests.tiny_model import calls, one_thread, quiet, tiny  # noqa: F401 - fixtures


@pytest.fixture
def pipe(tiny) -> mf.MSDDAPipeline:  # noqa: F811 - the fixture
    """Runs stock forwards, which can be counted."""
    pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))
    pipe.set_forward("sequential")
    return pipe
