"""Writers for tests of synthesis: a function that plays the model, and a small HTTP server."""

import contextlib
import hashlib
import http.server
import json
import os
import threading
from unittest import mock

VERBS = ("describe", "compare", "praise", "measure", "imagine", "repair", "translate", "sort")


def play(prompt):
    """A model that always says the same to a prompt, and now and then something useless."""
    draw = hashlib.sha256(prompt.encode()).digest()
    if prompt.startswith("Below is a list"):
        lines = ["Sure, here they are:"]
        for n in range(4):
            verb, things = VERBS[draw[n] % 8].title(), draw.hex()[8 * n : 8 * n + 8]
            lines.append(f"{n + 9}. {verb} the {things[:2]} {things[2:5]} of {things[5:]}.")
        lines += ["13. Draw a picture of a small house.", "14. Sing it."]
        return "\n".join(lines)
    if prompt.startswith("Is the last task"):
        return "Yes" if draw[0] % 3 == 0 else "No."
    if prompt.startswith("The last task below is a classification"):
        return "Label: warm\nInput: a summer day\nLabel: cold\nInput: a winter night"
    if prompt.startswith("Carry out"):
        output = "" if draw[0] % 5 == 0 else f"It is number {draw[1]}."
        return f"**Input:** none\n**Output:** {output}"
    if prompt.startswith("Judge how good"):
        return f"Fair.\nGrade: {1 + draw[0] % 10}"
    if prompt.startswith("Which of two"):
        return f"Hm.\nVerdict: {'AB'[draw[0] % 2]}"
    return f"Answer {draw[0] % 4}"


def completion(text, finish="stop"):
    """A chat completion as servers send it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    answer = {"choices": [choice | {"finish_reason": finish}], "usage": {"completion_tokens": 3}}
    return json.dumps(answer).encode()


def friendly(body, number):
    """(status, headers, body) of a server that works."""
    return 200, {}, completion(play(body["messages"][-1]["content"]))


class Server:
    """What a running server has seen: `seen` holds (path, headers, body) of every request."""

    def __init__(self, answer):
        self.answer = answer
        self.seen = []
        self.lock = threading.Lock()
        self.address = ""


@contextlib.contextmanager
def serving(answer=friendly):
    """A server on a free local port; `answer(body, number)` gives (status, headers, bytes)."""
    server = Server(answer)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.seen.append((self.path, dict(self.headers), body))
                number = len(server.seen)
            status, headers, raw = server.answer(body, number)
            with contextlib.suppress(OSError):  # the client may have gone
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(raw))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    server.address = f"http://127.0.0.1:{httpd.server_port}/v1"
    try:
        # Whatever proxy the machine has, it does not stand between.
        with mock.patch.dict(os.environ, {"no_proxy": "127.0.0.1"}):
            yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def rows_of(path):
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
