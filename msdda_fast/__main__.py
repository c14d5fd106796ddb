# SPDX-License-Identifier: Apache-2.0
"""`python -m msdda_fast` is the command `msdda-fast`."""

from msdda_fast.cli import main

main()
