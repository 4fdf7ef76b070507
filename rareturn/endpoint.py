"""A large model behind an OpenAI-compatible endpoint: prompts in, answers out, and each is paid for once."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from rareturn.command_line import flag
from rareturn.errors import InputError, first_line
from rareturn.files import cache_dir, packaged, read_json, write_json

logger = logging.getLogger(__name__)

# What a request can do without, where the server refuses it; it may not say which of the first four it does not know.
EXTRAS = ("response_format", "logprobs", "top_logprobs", "n")
OPTIONAL = (*EXTRAS, "temperature", "seed", "max_completion_tokens")
TOP_LOGPROBS = 20  # the most that OpenAI gives
# `text`, `finish` (its reason), `refused`; `tokens` where there are log-probabilities
Choice = dict[str, Any]
NO_ANSWER: Choice = {"text": "", "finish": "content_filter", "refused": True}


@functools.cache
def prompt_template(name: str) -> Any:
    """A template of `rareturn/prompts`, or a file `NAME.jinja`, to `render`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

    path = Path(name) if name.endswith(".jinja") else packaged("prompts") / f"{name}.jinja"
    how = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    try:
        return Environment(loader=FileSystemLoader(path.parent), **how).get_template(path.name)
    except (TemplateError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: cannot be read as a prompt: {first_line(error)}") from None


@dataclass(frozen=True)
class Asking:
    """How a prompt is asked.

    `samples` are answers; where `logprobs` came with the first and `one_will_do`, it is the only one. `schema`, of JSON,
    is what an answer should keep to.
    """

    temperature: float = 1.0  # the one value that reasoning models take
    samples: int = 1
    logprobs: bool = False
    one_will_do: bool = False
    schema: dict[str, Any] | None = None


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
    max_new_tokens: int = flag(
        1024, "Tokens of an answer at most. Models that think first may need thousands: a cut answer is none."
    )
    price_in: float | None = flag(
        None, "USD per million tokens of prompts, to tell the cost. Default: tokens only."
    )
    price_out: float | None = flag(None, "USD per million tokens of answers.")
    model: str = field(default="", init=False)
    seed: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.host = urlsplit(self.base_url).netloc
        if not (self.base_url.startswith(("http://", "https://")) and self.host) or "@" in self.host:
            raise ValueError("--base_url must be like http://localhost:8000/v1")
        for name in ("concurrency", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        self.without: set[str] = set()  # of OPTIONAL: what the server refused

    def _request(self, prompt: str, how: Asking) -> dict[str, Any]:
        request = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "seed": self.seed}
        request |= {
            "temperature": how.temperature,
            "max_completion_tokens": self.max_new_tokens,
        }
        request |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if how.logprobs else {}
        if how.schema:
            schema = {"name": "answer", "strict": True, "schema": how.schema}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        return request

    def _path(self, prompt: str, how: Asking) -> Path:
        decides = json.dumps([self.host, self._request(prompt, how), how.samples, how.one_will_do])
        return cache_dir("answers") / f"{hashlib.sha256(decides.encode()).hexdigest()[:32]}.json"

    def cached(self, prompt: str, how: Asking) -> list[Choice] | None:
        """The answers that are kept, if they are."""
        path = self._path(prompt, how)
        return read_json(path)["choices"] if path.exists() else None

    def plan(self, asked: Iterable[tuple[str, Asking]], back: int | None = None) -> None:
        """Print what is going to be sent, at most; an InputError where it is more than `max_requests`.

        `back` is how many tokens come back, if it is known better than by `max_new_tokens`. A token is taken for four
        bytes.
        """
        asked = list(asked)
        new = [(prompt, how) for prompt, how in asked if self.cached(prompt, how) is None]
        requests = sum(how.samples for _, how in new)
        there = sum(len(prompt.encode()) * how.samples for prompt, how in new) // 4
        if back is None or not new:
            back = requests * self.max_new_tokens
        text = f"at most {requests} requests ({len(asked) - len(new)} answers are in the cache)"
        text += f", about {there:,} tokens there and {back:,} back"
        if self.price_in is not None or self.price_out is not None:
            text += f", {(there * (self.price_in or 0) + back * (self.price_out or 0)) / 1e6:.2f} USD"
        print(f"{self.model} at {self.host}: {text}")
        if requests > self.max_requests:
            raise InputError(f"--max_requests: {self.max_requests}, but up to {requests} are needed")

    def ask(self, prompts: Sequence[str], how: Asking, title: str) -> list[list[Choice]]:
        """The answers to each prompt; an InputError where the server gives none.

        All answers that arrived are kept, whatever happens to the others.
        """
        try:
            from openai import OpenAI
        except ImportError:
            raise InputError("the package openai is missing: pip install 'rareturn[llm]'") from None
        new = [prompt for prompt in dict.fromkeys(prompts) if self.cached(prompt, how) is None]
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "no-key"
        # The client waits as Retry-After says, or 0.5, 1, 2 and 4 seconds, after lost connections, 429 and 5xx.
        client = OpenAI(base_url=self.base_url, api_key=key, max_retries=4)
        with client, ThreadPoolExecutor(self.concurrency) as pool:
            jobs = [pool.submit(self._answer, client, prompt, how) for prompt in new]
            try:
                for job in tqdm(as_completed(jobs), title, len(jobs), unit="prompt", disable=not jobs):
                    job.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return [self.cached(prompt, how) for prompt in prompts]

    def _answer(self, client: Any, prompt: str, how: Asking) -> None:
        request, choices = self._request(prompt, how), []
        while len(choices) < how.samples:
            # Of a server that may give log-probabilities only one is asked first, if one will do.
            some = 1 if how.one_will_do and "logprobs" not in self.without else how.samples - len(choices)
            more = {"seed": self.seed + len(choices)} | ({"n": some} if some > 1 else {})
            choices += self._choices(client, request | more)
            if how.one_will_do and "tokens" in choices[0]:
                break
        write_json(self._path(prompt, how), {"choices": choices[: how.samples]})

    def _choices(self, client: Any, request: dict[str, Any]) -> list[Choice]:
        """One answer or more; what the server refuses is left out, from then on."""
        from openai import APIError

        while True:
            sent = {name: value for name, value in request.items() if name not in self.without}
            if "max_completion_tokens" in self.without:
                sent["max_tokens"] = request["max_completion_tokens"]  # its name before 2024
            try:
                done = client.chat.completions.create(**sent)
                break
            except (APIError, ValueError) as error:
                if getattr(error, "code", None) == "content_filter":
                    return [NO_ANSWER]
                if not (refused := _refused(error, sent)):
                    raise self._mistake(error, client.api_key) from None
                if not refused <= self.without:
                    logger.warning(f"{self.host} refuses {', '.join(sorted(refused))}: going on without")
                self.without |= refused
        if (choices := getattr(done, "choices", None)) is None:
            no = "the answer is no chat completion; most servers' --base_url ends with /v1"
            raise InputError(f"{self.host}: {no}")
        found = list(map(_choice, choices)) or [NO_ANSWER]  # no choice at all is how some servers filter
        if "logprobs" in sent and any(choice["text"] and "tokens" not in choice for choice in found):
            self.without |= {"logprobs", "top_logprobs"}  # not refused, but not given either
        return found

    def _mistake(self, error: Exception, key: str) -> InputError:
        status = getattr(error, "status_code", None)
        said = first_line(error.__cause__ or error).replace(key, "***")[:300]
        said = f"{'' if status else 'no answer: '}{said}; the answers so far are kept"
        special = {401: "the key in OPENAI_API_KEY is missing or refused (401)"}
        special[404] = f"no model {self.model!r} there, or --base_url is wrong (404)"
        return InputError(f"{self.host}: {special.get(status, said)}")


def lists_in(answer: str) -> Iterator[list[Any]]:
    """The JSON lists in an answer that begin with a text, whatever stands around them."""
    decoder, end = json.JSONDecoder(strict=False), 0
    while begins := re.compile(r'\[\s*"').search(answer, end):
        try:
            value, end = decoder.raw_decode(answer, begins.start())
        except (ValueError, RecursionError):
            end = begins.end()
        else:
            yield value


def _refused(error: Exception, sent: dict[str, Any]) -> set[str]:
    """What of a request the server does not take: what its message names, or all that it may not know."""
    if getattr(error, "status_code", None) not in (400, 422):
        return set()
    named = {name for name in OPTIONAL if name in sent and re.search(rf"\b{name}\b", str(error))}
    if not named:
        named = {name for name in EXTRAS if name in sent}
    return named | ({"logprobs", "top_logprobs"} if named & {"logprobs", "top_logprobs"} else set())


def _choice(given: Any) -> Choice:
    """What is kept of a choice. `tokens` are pairs of a token and, where it has a digit, its alternatives' logprobs."""
    message = getattr(given, "message", None)
    text, finish = getattr(message, "content", None), getattr(given, "finish_reason", None)
    text = text.encode(errors="replace").decode() if isinstance(text, str) else ""
    refused = bool(getattr(message, "refusal", None)) or finish == "content_filter" or not text
    choice: Choice = {"text": text, "finish": finish, "refused": refused and finish != "length"}
    try:
        tokens = [
            (one.token, {alt.token: alt.logprob for alt in one.top_logprobs if math.isfinite(alt.logprob)})
            for one in given.logprobs.content
        ]
    except (AttributeError, TypeError):  # none, or not as OpenAI has them
        return choice
    shown = [(token, others if re.search(r"\d", token) else None) for token, others in tokens]
    return choice | ({"tokens": shown} if shown else {})
