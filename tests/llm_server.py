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
    """What comes back: a completion whose message is `text` (None: a refusal without text), or the `body` of an error.

    Several texts are as many choices. `tokens` are the answer's, each with the log-probabilities of its alternatives.
    With `cut` the connection breaks in the middle of the body.
    """

    text: str | list[str] | None = ""
    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    tokens: list[tuple[str, dict[str, float]]] | None = None
    finish: str = "stop"
    refusal: str | None = None
    cut: bool = False

    def choices(self) -> list[dict[str, Any]]:
        made = []
        for index, text in enumerate(self.text if isinstance(self.text, list) else [self.text]):
            message = {"role": "assistant", "content": text, "refusal": self.refusal}
            made.append({"index": index, "finish_reason": self.finish, "message": message})
            if self.tokens is not None:
                content = [
                    {
                        "token": token,
                        "logprob": others.get(token, 0.0),
                        "top_logprobs": [{"token": name, "logprob": value} for name, value in others.items()],
                    }
                    for token, others in self.tokens
                ]
                made[-1]["logprobs"] = {"content": content}
        return made


@dataclass
class LlmServer:
    """The server and what it met.

    Attributes:
        answer: the reply to a prompt, or its text.
        faults: replies to the next requests, in place of answers.
        key: the key that it wants; None: any.
        refuses: parameters that it does not know; `names_them` says whether it tells which it met.
        requests: the body of every request, with the `time` it came and its `key`; `answered` are those that got a text.
    """

    answer: Callable[[str], str | Reply | None]
    faults: Iterable[Reply] = ()
    key: str | None = None
    refuses: tuple[str, ...] = ()
    names_them: bool = True
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
        if met := [name for name in self.refuses if name in request]:
            said = f"unknown: {', '.join(met)}" if self.names_them else "bad request"
            return Reply(status=400, body={"error": {"message": said}})
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
        usual = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
        usual |= {"choices": reply.choices(), "usage": {"prompt_tokens": 100, "completion_tokens": 5}}
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body or usual).encode()
        self.send_response(reply.status)
        for name, value in ({"Content-Type": "application/json"} | reply.headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if reply.cut else body)
        self.close_connection = reply.cut

    def log_message(self, *_: object) -> None:
        pass
