# SPDX-License-Identifier: Apache-2.0
"""`python -m msdda_fast` is the command `msdda-fast`."""

from msdda_fast.cli.app import main

main()
