# SPDX-License-Identifier: Apache-2.0
from tests.tiny_model import one_thread, pipe, tiny  # noqa: F401 - fixtures
