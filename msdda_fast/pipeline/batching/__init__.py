# SPDX-License-Identifier: Apache-2.0
"""An engine that draws the requests of many callers in shared batches."""
