"""GPT-4.1, or any model behind an OpenAI-compatible endpoint, as judge: the paper's own way.

Every verdict is kept on disk under the hash of what was asked, so that nothing is paid for twice.
A call that fails, for whatever reason, is an error and never a verdict.
"""

import asyncio
import email.utils
import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seal_jax import config
from seal_jax.errors import SealError
from seal_jax.tasks import grading

LONGEST_WAIT_S = 120.0
"""Between two tries; an endpoint that asks for more is out of order for a run."""
_RETRIED = (408, 409, 425, 429)


@dataclass
class Budget:
    """Requests sent so far, of the number allowed (0 is no limit); one for a whole run."""

    allowed: int
    sent: int = 0

    def spend(self) -> None:
        """Counts a request that is about to be sent, or raises SealError."""
        if self.allowed and self.sent >= self.allowed:
            raise SealError(f"task.openai.max_calls={self.allowed}: all calls were made")
        self.sent += 1


def judge_many(
    items: Sequence[grading.Item], settings: config.OpenAI, budget: Budget | None = None
) -> list[bool]:
    """Returns the endpoint's verdict on each answer; blank ones are wrong and never sent.

    Args:
      items: Equal ones are asked once.
      settings: Endpoint, model, concurrency, retries, cache.
      budget: Shared by calls that one limit covers; None allows `settings.max_calls` to this call.

    Raises:
      SealError: no key, no client, a call that failed for good, or an exhausted budget. Verdicts
        that came before are in the cache.
    """
    return grading.verdicts(
        items, lambda answered: _ask(answered, settings, budget or Budget(settings.max_calls))
    )


def _ask(items: Sequence[grading.Item], settings: config.OpenAI, budget: Budget) -> list[bool]:
    prompts = [grading.prompt(*item) for item in items]
    verdicts = {text: _recall(_entry(text, settings)) for text in prompts}
    missing = [text for text, verdict in verdicts.items() if verdict is None]
    if missing:
        left = budget.allowed - budget.sent
        if budget.allowed and len(missing) > left:
            raise SealError(
                f"task.openai.max_calls={budget.allowed}: {len(missing)} more calls are needed "
                f"and {left} are left"
            )
        key = os.environ.get(settings.key_variable)
        if not key:
            raise SealError(
                f"task.openai: the environment variable {settings.key_variable} holds no key "
                "(any text does for an endpoint that needs none)"
            )
        # A thread of its own, since a notebook's event loop already runs in this one.
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(asyncio.run, _converse(missing, settings, budget, key)).result()
        verdicts.update(zip(missing, found, strict=True))
    return [bool(verdicts[text]) for text in prompts]


async def _converse(
    prompts: list[str], settings: config.OpenAI, budget: Budget, key: str
) -> list[bool]:
    """Returns the verdict on each prompt; the first failure for good ends them all."""
    try:
        import openai
    except ImportError as error:
        raise SealError(
            'task.judge=openai needs the client: pip install "seal_jax[openai]"'
        ) from error
    slots = asyncio.Semaphore(settings.concurrency)
    client = openai.AsyncOpenAI(
        api_key=key,
        base_url=settings.base_url,
        timeout=settings.timeout_s or None,
        max_retries=0,  # its own retries would escape the budget
    )

    async def one(text: str) -> bool:
        async with slots:
            reply = await _reply(client, text, settings, budget)
        verdict = grading.parse_yes_no(reply)
        _remember(_entry(text, settings), {"prompt": text, "reply": reply, "verdict": verdict})
        return verdict

    async with client:
        return await asyncio.gather(*(one(text) for text in prompts))


async def _reply(client: Any, text: str, settings: config.OpenAI, budget: Budget) -> str:
    """Returns the model's reply, after retries with growing pauses or as long as it asks for."""
    import openai

    for attempt in range(settings.retries + 1):
        budget.spend()
        asked_wait = None
        try:
            response = await client.chat.completions.create(
                model=settings.model,
                messages=[{"role": "user", "content": text}],
                temperature=0,
            )
            reply = _content(response)
            if reply:
                return reply
            problem = "the reply holds no text"
        except openai.APIStatusError as error:
            problem = f"status {error.status_code}: {error.message}"
            transient = error.status_code in _RETRIED or error.status_code >= 500
            if not transient or error.code == "insufficient_quota":
                raise SealError(f"judge {settings.model}: {problem}") from error
            asked_wait = _retry_after(error.response.headers)
        except openai.APIConnectionError as error:  # timeouts and hang-ups
            problem = f"{error.message} ({error.__cause__ or 'no details'})"
        except (openai.APIError, ValueError) as error:  # a body that is not what was promised
            problem = f"malformed response: {error}"
        if attempt < settings.retries:
            await asyncio.sleep(_pause(attempt, asked_wait, settings.model))
    raise SealError(
        f"judge {settings.model}: gave up after {settings.retries + 1} tries: {problem}"
    )


def _content(response: Any) -> str:
    """Returns the text of a response, empty if there is none: servers send the oddest things."""
    try:
        content = response.choices[0].message.content
    except (AttributeError, IndexError, TypeError):
        return ""
    return content.strip() if isinstance(content, str) else ""


def _pause(attempt: int, asked: float | None, model: str) -> float:
    """Returns the seconds to wait: what the endpoint asked for, else doubling, spread at random."""
    if asked is not None:
        if asked > LONGEST_WAIT_S:
            raise SealError(f"judge {model}: the endpoint asks to wait {asked:.0f} s")
        return asked
    return min(0.5 * 2**attempt, LONGEST_WAIT_S) * random.uniform(0.5, 1.0)


def _retry_after(headers: Any) -> float | None:
    """Returns the seconds in a Retry-After header, which holds seconds or a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _entry(text: str, settings: config.OpenAI) -> Path:
    """Returns the cache file of a prompt, named by the hash of all that decides the reply."""
    endpoint = settings.base_url or os.environ.get("OPENAI_BASE_URL")  # as the client chooses
    asked = json.dumps([endpoint, settings.model, text])
    name = hashlib.sha256(asked.encode()).hexdigest()
    return Path(settings.cache).expanduser() / name[:2] / f"{name}.json"


def _recall(file: Path) -> bool | None:
    """Returns the cached verdict, or None; a damaged file counts as none."""
    try:
        verdict = json.loads(file.read_text(encoding="utf-8"))["verdict"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return verdict if isinstance(verdict, bool) else None


def _remember(file: Path, content: dict[str, Any]) -> None:
    """Writes a cache file in one step: readers and other writers see all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(content, stream)  # in ASCII: a reply may hold half of a surrogate pair
        os.replace(draft, file)
    except BaseException:
        os.unlink(draft)
        raise
