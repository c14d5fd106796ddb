# SPDX-License-Identifier: Apache-2.0
"""The tables of the pages, one file per kind of result; `report.py` writes them."""
