# SPDX-License-Identifier: Apache-2.0
from tests.tiny_model import calls, one_thread, pipe, tiny, tiny_kl  # noqa: F401 - fixtures
