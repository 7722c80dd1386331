"""A browser's EventSource as a program that run.py can ask, to check the vectors themselves.

    python tests/vectors/run.py --format sse --splits whole -- python tests/vectors/chromium.py

It starts a headless Chromium on a page that opens an EventSource for each question. What an EventSource does not show,
such as the reconnection time, is left out of the answers.
"""

from __future__ import annotations

import json
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__: list[str] = []

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ANSWER_DEADLINE_S = 30.0

# Types must be known to be listened to. Names that no event has do no harm.
EVENT_LINE = re.compile("(?:^|[\r\n])\ufeff?event: ?([^\r\n]*)")

PAGE = """<!doctype html><script>
const ask = async () => {
  const {types} = await (await fetch('/question')).json();
  const events = [], source = new EventSource('/stream');
  const take = e => events.push({event: e.type, data: e.data, id: e.lastEventId});
  for (const type of types) if (type !== 'error') source.addEventListener(type, e => { if ('data' in e) take(e) });
  source.onerror = e => {
    if (e instanceof MessageEvent) return take(e);
    source.close();
    fetch('/answer', {method: 'POST', body: JSON.stringify({events})}).then(ask);
  };
};
ask();
</script>"""

questions: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
streams: queue.SimpleQueue[list[str]] = queue.SimpleQueue()


class Handler(BaseHTTPRequestHandler):
    """The page, the next question, its stream, and the answer."""

    def do_GET(self) -> None:
        if self.path == "/question":
            asked = questions.get()
            text = "".join(asked["pieces"]).encode("latin-1").decode("utf-8", "replace")
            streams.put(asked["pieces"])
            types = sorted({"message", *EVENT_LINE.findall(text)})
            self.reply("application/json", [json.dumps({"types": types})])
        elif self.path == "/stream":
            self.reply("text/event-stream", streams.get())
        else:
            self.reply("text/html", [PAGE])

    def do_POST(self) -> None:
        answers.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.reply("text/plain", [])

    def reply(self, media_type: str, pieces: list[str]) -> None:
        """Answers with a body that ends with the connection, one write for each piece."""
        self.send_response(200)
        self.send_header("content-type", media_type)
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece.encode("latin-1"))
            self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def main() -> int:
    """Answers questions until there are no more."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        print("no Chromium found", file=sys.stderr)
        return 1
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, *flags, f"--user-data-dir={profile}", f"http://127.0.0.1:{server.server_port}/"]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=subprocess.DEVNULL
        ) as process:
            try:
                for line in sys.stdin:
                    questions.put(json.loads(line))
                    print(json.dumps(answers.get(timeout=ANSWER_DEADLINE_S)), flush=True)
            finally:
                process.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
