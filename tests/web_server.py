"""A web server on loopback that misbehaves as the web does; `Web` counts who was asked for what, and when."""

from __future__ import annotations

import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.curation_corpora import picture

ROBOTS = b"User-agent: *\nDisallow: /secret/\nAllow: /secret/open-*.jpg$\n\nUser-agent: clew\nDisallow: /not-for-clew\n"
HEADERS = {
    "noai": ("X-Robots-Tag", "nofollow, NOAI"),
    "noimageai": ("X-Robots-Tag", "clew: noimageai"),
    "dated": ("X-Robots-Tag", "noindex, unavailable_after: 25 Jun 2010 15:00:00 PST"),
    "other-bot": ("X-Robots-Tag", "otherbot: noai, noindex"),
    "tdm": ("TDM-Reservation", "1"),
    "tdm-free": ("TDM-Reservation", "0"),
}


class Web:
    """Serves /image/N.jpg (a picture that depends on N) and faults; a context manager.

    Attributes:
        url: http://127.0.0.1:PORT
        asked: path -> requests.
        times: path -> when each request came, seconds.
        robots: what /robots.txt holds, or the status it answers with.
        gate: requests of /image/N wait for it where N is at least `gated`.
    """

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.agents: set[str] = set()
        self.robots: bytes | int = ROBOTS
        self.gated = 1 << 30
        self.gate = threading.Event()
        self._over = threading.Event()
        self._lock = threading.Lock()
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with web._lock:
                    web.asked[self.path] += 1
                    web.times.setdefault(self.path, []).append(time.monotonic())
                    web.agents.add(self.headers["User-Agent"])
                    again = web.asked[self.path]
                web._answer(self, again)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Web:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler, again: int) -> None:
        name = handler.path.strip("/").partition("?")[0]
        folder, _, rest = name.partition("/")
        number = int(rest.partition(".")[0]) if rest.partition(".")[0].isdigit() else 0
        if name == "robots.txt":
            status = self.robots if isinstance(self.robots, int) else 200
            _send(handler, status, self.robots if isinstance(self.robots, bytes) else b"", {})
        elif folder == "image":
            if number >= self.gated:
                self.gate.wait()
            _send(handler, 200, picture(number), {"Content-Type": "text/html"})  # a name and a type are no proof
        elif folder == "status":
            _send(handler, number, b"no", {})
        elif folder == "busy":  # 429 once, then the image
            _send(handler, 200 if again > 1 else 429, picture(number), {"Retry-After": "0.2"} if again == 1 else {})
        elif folder == "later":
            _send(handler, 503, b"", {"Retry-After": "100000"})
        elif folder == "hang":
            self._over.wait(30)
        elif folder == "huge":  # without a length, without an end
            handler.send_response(200)
            handler.send_header("Connection", "close")
            handler.end_headers()
            try:
                while not self._over.is_set():
                    handler.wfile.write(bytes(1 << 16))
            except OSError:
                pass
            handler.close_connection = True
        elif folder == "short":  # ends before its length
            handler.send_response(200)
            handler.send_header("Content-Length", "100000")
            handler.end_headers()
            handler.wfile.write(picture(number))
            handler.close_connection = True
        elif folder == "cut":
            _send(handler, 200, picture(number)[:500], {})
        elif folder == "loop":
            _send(handler, 302, b"", {"Location": f"/loop/{number + 1}"})
        elif folder == "moved":
            _send(handler, 301, b"", {"Location": f"/image/{rest}"})
        elif folder == "to":  # /to/HOST:PORT/PATH
            _send(handler, 302, b"", {"Location": f"http://{rest}"})
        elif folder == "text":
            _send(handler, 200, b"<html>no image</html>", {"Content-Type": "image/jpeg"})
        elif folder == "tagged":
            header, value = HEADERS[rest]
            _send(handler, 200, picture(3), {header: value})
        else:
            _send(handler, 200, picture(1), {})


def _send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
