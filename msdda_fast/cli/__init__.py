# SPDX-License-Identifier: Apache-2.0
"""The command line `msdda-fast`: one file per command."""
