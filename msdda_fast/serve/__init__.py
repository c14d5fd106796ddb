# SPDX-License-Identifier: Apache-2.0
"""An engine served over HTTP: `app.create_app(engine, settings)`; needs the extra `serve`."""
