"""A large model behind an OpenAI-compatible endpoint: prompts in, answers out, and each is paid for once."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from rareturn.command_line import flag
from rareturn.errors import InputError, first_line
from rareturn.files import cache_dir, packaged, read_json, write_json


@functools.cache
def prompt_template(name: str) -> Any:
    """A template of `rareturn/prompts`, to `render`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    how = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=FileSystemLoader(packaged("prompts")), **how).get_template(f"{name}.jinja")


@dataclass
class Endpoint:
    """Where the model is, by flags; the script sets `model` and `seed`.

    An answer is kept in a file of the user's cache, named by a hash of all that decides it, so that an interrupted run
    goes on for nothing. The key comes from the environment and goes into no file and no message.
    """

    _argument_group_name = "Endpoint (its key: OPENAI_API_KEY of the environment; your own server needs none)"

    base_url: str = flag(
        "https://api.openai.com/v1", "Any OpenAI-compatible server; the default is OpenAI's."
    )
    max_requests: int = flag(2000, "Start only where no more are needed. The paper's rare rows take 1,280.")
    concurrency: int = flag(8, "Requests at a time; 8 stays within the limits of most servers.")
    model: str = field(default="", init=False)
    seed: int = field(default=0, init=False)
    temperature: float = field(default=1.0, init=False)  # the one value that reasoning models take

    def __post_init__(self) -> None:
        self.host = urlsplit(self.base_url).netloc.rpartition("@")[2]
        if not (self.base_url.startswith(("http://", "https://")) and self.host):
            raise ValueError("--base_url must be like http://localhost:8000/v1")
        if self.concurrency < 1:
            raise ValueError(f"--concurrency must be at least 1, not {self.concurrency}")

    def _request(self, prompt: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        return {"model": self.model, "messages": messages, "temperature": self.temperature, "seed": self.seed}

    def _path(self, prompt: str) -> Path:
        decides = json.dumps([self.host, self._request(prompt)])
        return cache_dir("answers") / f"{hashlib.sha256(decides.encode()).hexdigest()[:32]}.json"

    def cached(self, prompt: str) -> str | None:
        """The answer that is kept, if there is one."""
        path = self._path(prompt)
        return read_json(path)["answer"] if path.exists() else None

    def plan(self, prompts: Sequence[str], answers: Sequence[str]) -> None:
        """Print what is going to be sent; an InputError where it is more than `max_requests`.

        `prompts` are at most those to come, `answers` as long as the new ones may be. A token is taken for four bytes.
        """
        new = [prompt for prompt in prompts if self.cached(prompt) is None]
        there, back = (len("".join(texts).encode()) // 4 for texts in (new, answers if new else ()))
        requests = f"at most {len(new)} requests ({len(prompts) - len(new)} answers are in the cache)"
        print(f"{self.model} at {self.host}: {requests}, about {there:,} tokens there and {back:,} back")
        if len(new) > self.max_requests:
            raise InputError(f"--max_requests: {self.max_requests}, but up to {len(new)} are needed")

    def ask(self, prompts: Sequence[str], title: str) -> list[str]:
        """An answer to each prompt, empty where the model refused; an InputError where the server gives none.

        All answers that arrived are kept, whatever happens to the others.
        """
        try:
            from openai import OpenAI
        except ImportError:
            raise InputError("the package openai is missing: pip install 'rareturn[llm]'") from None
        new = [prompt for prompt in dict.fromkeys(prompts) if self.cached(prompt) is None]
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "no-key"
        # The client waits as Retry-After says, or 0.5, 1, 2 and 4 seconds, after lost connections, 429 and 5xx.
        client = OpenAI(base_url=self.base_url, api_key=key, max_retries=4)
        with client, ThreadPoolExecutor(self.concurrency) as pool:
            jobs = [pool.submit(self._answer, client, prompt) for prompt in new]
            try:
                for job in tqdm(as_completed(jobs), title, len(jobs), unit="request", disable=not jobs):
                    job.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return [self.cached(prompt) for prompt in prompts]

    def _answer(self, client: Any, prompt: str) -> None:
        from openai import APIError

        try:
            done = client.chat.completions.create(**self._request(prompt))
        except (APIError, ValueError) as error:
            if getattr(error, "code", None) != "content_filter":
                raise self._mistake(error, client.api_key) from None
            answer = ""
        else:
            if not getattr(done, "choices", None):
                no = "the answer is no chat completion; most servers' --base_url ends with /v1"
                raise InputError(f"{self.host}: {no}")
            answer = (done.choices[0].message.content or "").encode(errors="replace").decode()
        write_json(self._path(prompt), {"answer": answer})

    def _mistake(self, error: Exception, key: str) -> InputError:
        status = getattr(error, "status_code", None)
        said = first_line(error.__cause__ or error).replace(key, "***")[:300]
        said = f"{'' if status else 'no answer: '}{said}; the answers so far are kept"
        special = {401: "the key in OPENAI_API_KEY is missing or refused (401)"}
        special[404] = f"no model {self.model!r} there, or --base_url is wrong (404)"
        return InputError(f"{self.host}: {special.get(status, said)}")
