# SPDX-License-Identifier: Apache-2.0
"""An HTTP server of one's own around `mf.Engine`: concurrent requests share batches.

Start it with `python examples/engine_server.py 8000`, then ask for images:
`curl -o car.png 'http://127.0.0.1:8000/?prompt=A%20blue%20car.&consistency=0.7&seed=1'`
"""

import io
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

import msdda_fast as mf


class Draw(BaseHTTPRequestHandler):
    """Answers every GET with an image."""

    def do_GET(self):
        fields = dict(parse_qsl(urlsplit(self.path).query))
        try:
            w = float(fields.get("consistency", 0.5))
            request = mf.ImageRequest(
                fields.get("prompt", "A blue car."),
                weights={"aesthetic": 1 - w, "consistency": w},
                seed=int(fields.get("seed", 0)),
                num_inference_steps=int(fields.get("steps", 25)),
            )
            result = engine.submit(request).result()
        except mf.QueueFull:
            return self.send_error(429, "too many requests wait, come back later")
        except ValueError as error:  # bad fields, by name, before any work
            return self.send_error(422, str(error).splitlines()[0])
        file = io.BytesIO()
        result.image.save(file, format="PNG")
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.end_headers()
        self.wfile.write(file.getvalue())


port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
pipe = mf.MSDDAPipeline.from_pretrained("msdda-fast/emoji")
with mf.Engine(pipe, max_batch=8, max_wait_ms=20, queue_limit=64) as engine:
    with ThreadingHTTPServer(("127.0.0.1", port), Draw) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()
