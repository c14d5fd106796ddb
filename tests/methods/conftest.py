# SPDX-License-Identifier: Apache-2.0
from tests.tiny_model import calls, pipe, tiny  # noqa: F401 - fixtures
