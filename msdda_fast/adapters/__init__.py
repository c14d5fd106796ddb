# SPDX-License-Identifier: Apache-2.0
"""Adapters from files and from peft layers, as factors per objective."""
