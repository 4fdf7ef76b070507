"""An OpenAI-compatible server on loopback whose answers a test scripts; the client that asks it is the real one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What comes back: a completion whose message is `text` (None: a refusal without text), or the `body` of an error."""

    text: str | None = ""
    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class LlmServer:
    """The server and what it met.

    Attributes:
        answer: the reply to a prompt, or its text.
        faults: replies to the next requests, in place of answers.
        key: the key that it wants; None: any.
        requests: the body of every request, with the `time` it came and its `key`; `answered` are those that got a text.
    """

    answer: Callable[[str], str | Reply | None]
    faults: Iterable[Reply] = ()
    key: str | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)

    def __enter__(self) -> LlmServer:
        self.lock, self.faults = threading.Lock(), list(self.faults)
        handler = type("BoundHandler", (Handler,), {"llm": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def prompts(self) -> list[str]:
        """What was asked, in the order in which it came."""
        return [request["messages"][-1]["content"] for request in self.requests]

    def reply(self, request: dict[str, Any]) -> Reply:
        prompt = request["messages"][-1]["content"]
        with self.lock:
            self.requests.append(request)
            fault = self.faults.pop(0) if self.faults else None
        if self.key and request["key"] != self.key:
            # As bad as a server can be: it says the key back.
            return Reply(status=401, body={"error": {"message": f"Incorrect API key: {request['key']}"}})
        reply = fault or self.answer(prompt)
        reply = reply if isinstance(reply, Reply) else Reply(reply)
        if reply.status == 200 and reply.body is None:
            with self.lock:
                self.answered.append(prompt)
        return reply


class Handler(BaseHTTPRequestHandler):
    llm: LlmServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request |= {"time": time.monotonic(), "key": self.headers["Authorization"].removeprefix("Bearer ")}
        if self.path != "/v1/chat/completions":
            reply = Reply(status=404, body={"error": {"message": f"no {self.path} here"}})
        else:
            reply = self.llm.reply(request)
        message = {"role": "assistant", "content": reply.text}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        usual = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": choices}
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body or usual).encode()
        self.send_response(reply.status)
        for name, value in ({"Content-Type": "application/json"} | reply.headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
