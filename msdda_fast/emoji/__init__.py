# SPDX-License-Identifier: Apache-2.0
"""How the shipped model `msdda-fast/emoji` was made: sprites, prompts, scorers, training."""
