"""A large model behind an OpenAI-compatible endpoint: prompts in, answers out, and each is paid for once.

Answers are kept in `rareturn/answers` of the user's cache, a file each, named by a hash of all that decides them, so that
an interrupted run goes on for nothing. The key comes from the environment and goes into no file and no message.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from rareturn.command_line import flag
from rareturn.errors import InputError, first_line
from rareturn.files import cache_dir, packaged, read_json, write_json

RETRIES = 4  # the client's, for lost connections, 429 and 5xx: after what Retry-After says, or 0.5, 1, 2 and 4 seconds


@dataclass
class EndpointArguments:
    _argument_group_name = (
        "Endpoint (its key: OPENAI_API_KEY of the environment; a server of your own needs none)"
    )

    base_url: str = flag(
        "https://api.openai.com/v1", "Of any OpenAI-compatible server; the default is OpenAI's."
    )
    max_requests: int = flag(
        2000, "Refuse to start where more may be sent. The paper's rare rows need 1,280."
    )
    concurrency: int = flag(8, "Requests at a time; 8 stays within the limits of most servers.")

    def __post_init__(self) -> None:
        if not (self.base_url.startswith(("http://", "https://")) and self.host):
            raise ValueError("--base_url must be like http://localhost:8000/v1")
        if self.concurrency < 1:
            raise ValueError(f"--concurrency must be at least 1, not {self.concurrency}")

    @property
    def host(self) -> str:
        """Name and port, for messages and for the cache."""
        return urlsplit(self.base_url).netloc.rpartition("@")[2]


def render_prompt(name: str, **parts: Any) -> str:
    """A template of `rareturn/prompts`, filled in."""
    return _template(name).render(parts)


@functools.cache
def _template(name: str) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    how = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(packaged("prompts")), **how)
    return environment.get_template(f"{name}.jinja")


@dataclass
class Endpoint:
    """One model at one place."""

    model: str
    where: EndpointArguments
    seed: int
    temperature: float = 1.0  # the one value that reasoning models take

    def cached(self, prompt: str) -> str | None:
        """The answer that is kept, if there is one."""
        path = self._path(prompt)
        return read_json(path)["answer"] if path.exists() else None

    def plan(self, prompts: Sequence[str], answers: int) -> None:
        """Print what is going to be sent; an InputError where it is more than `max_requests`.

        Args:
            prompts: at most these will be asked, those with a kept answer among them.
            answers: about how many bytes come back. A token is taken to be four bytes of UTF-8.
        """
        new = [prompt for prompt in prompts if self.cached(prompt) is None]
        tokens = sum(len(prompt.encode()) for prompt in new) // 4
        kept = f"{len(prompts) - len(new)} answers are in the cache"
        about = f"about {tokens:,} tokens there and {answers // 4 if new else 0:,} back"
        print(f"{self.model} at {self.where.host}: at most {len(new)} requests ({kept}), {about}", flush=True)
        if len(new) > self.where.max_requests:
            raise InputError(f"--max_requests: {self.where.max_requests}, but up to {len(new)} are needed")

    def ask(self, prompts: Sequence[str], title: str) -> list[str]:
        """An answer to each prompt, empty where the model refused; an InputError where the server gives none.

        All answers that arrived are kept, whatever happens to the others.
        """
        try:
            from openai import OpenAI
        except ImportError:
            raise InputError("the package openai is missing: pip install 'rareturn[llm]'") from None
        new = [prompt for prompt in dict.fromkeys(prompts) if self.cached(prompt) is None]
        client = OpenAI(base_url=self.where.base_url, api_key=_key() or "none", max_retries=RETRIES)
        with client, ThreadPoolExecutor(self.where.concurrency) as pool:
            jobs = [pool.submit(self._answer, client, prompt) for prompt in new]
            try:
                for job in tqdm(as_completed(jobs), total=len(jobs), desc=title, unit="request"):
                    job.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [self.cached(prompt) for prompt in prompts]

    def _messages(self, prompt: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": prompt}]

    def _path(self, prompt: str) -> Path:
        facts = [self.where.host, self.model, self._messages(prompt), self.temperature, self.seed]
        return cache_dir("answers") / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.json"

    def _answer(self, client: Any, prompt: str) -> None:
        from openai import APIError

        how = {"model": self.model, "temperature": self.temperature, "seed": self.seed}
        try:
            done = client.chat.completions.create(messages=self._messages(prompt), **how)
        except (APIError, ValueError) as error:
            if getattr(error, "code", None) != "content_filter":
                raise self._mistake(error) from None
            answer = ""
        else:
            if not getattr(done, "choices", None):
                no = "the answer is no chat completion; most servers' --base_url ends with /v1"
                raise InputError(f"{self.where.host}: {no}")
            answer = done.choices[0].message.content or ""
        write_json(self._path(prompt), {"answer": answer})

    def _mistake(self, error: Exception) -> InputError:
        status, key = getattr(error, "status_code", None), _key()
        if status == 401:
            said = f"the key in OPENAI_API_KEY is {'refused' if key else 'missing'} (401)"
        elif status == 404:
            said = f"no model {self.model!r} there, or --base_url is wrong (404)"
        else:
            said = first_line(error.__cause__ or error).replace(key or "\0", "***")[:300]
            said = f"{'' if status else 'no answer: '}{said}; the answers so far are kept"
        return InputError(f"{self.where.host}: {said}")


def _key() -> str:
    return os.environ.get("OPENAI_API_KEY", "").strip()
