"""GPT-4.1, or any model behind an OpenAI-compatible endpoint, as judge: the paper's own way.

Every verdict is kept on disk under the hash of what was asked, so that nothing is paid for twice.
A call that fails, for whatever reason, is an error and never a verdict.
"""

import asyncio
import concurrent.futures
import contextlib
import email.utils
import hashlib
import json
import os
import random
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seal_jax import config
from seal_jax.errors import SealError
from seal_jax.tasks import grading

LONGEST_WAIT_S = 120.0
"""Between two tries; an endpoint that asks for more is out of order for a run."""
_RETRIED = (408, 409, 425, 429)
_LONG = 8  # characters: a shorter key is a word, for an endpoint that needs none


@dataclass
class Budget:
    """Requests sent so far, of the number allowed (0 is no limit); one for each judge."""

    allowed: int
    sent: int = 0

    def spend(self) -> None:
        """Counts a request that is about to be sent, or raises SealError."""
        if self.allowed and self.sent >= self.allowed:
            raise SealError(f"task.openai.max_calls={self.allowed}: all calls were made")
        self.sent += 1

    def check(self, wanted: int) -> None:
        """Raises SealError where so many more requests are not allowed."""
        left = self.allowed - self.sent
        if self.allowed and wanted > left:
            raise SealError(
                f"task.openai.max_calls={self.allowed}: {wanted} more calls are needed "
                f"and {left} are left"
            )


class Judge:
    """A function from items to the endpoint's verdicts; any number of threads may call it.

    They share connections, the budget, and `concurrency` requests at a time. Blank answers are
    wrong and never sent; equal items are asked once.
    """

    def __init__(self, settings: config.OpenAI) -> None:
        self._settings = settings
        self._budget = Budget(settings.max_calls)
        self._guard = threading.Lock()
        self._asked: dict[str, asyncio.Task[bool]] = {}  # by prompt, while there is no verdict
        _judges.add(self)
        self._failure = "the judge was interrupted"
        self._replies = grading.Replies("openai")
        self._loop: asyncio.AbstractEventLoop | None = None  # and with it:
        self._thread: threading.Thread | None = None
        self._slots: asyncio.Semaphore | None = None
        self._client: Any = None
        self._leave: weakref.finalize | None = None

    def __call__(self, items: Sequence[grading.Item]) -> list[bool]:
        """Returns verdicts.

        Raises:
          SealError: no key, no client, a call that failed for good, or an exhausted budget.
            Verdicts that came before are in the cache.
        """
        return grading.verdicts(items, self._ask)

    def cancel(self) -> None:
        """Ends the calls under way, in whatever thread: they raise SealError."""
        with self._guard:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(
                    lambda: [task.cancel() for task in self._asked.values()]
                )

    def close(self) -> None:
        """Closes the connections; the next call opens them again."""
        with self._guard:
            if self._loop is None:
                return
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._leave.detach()
            self._loop = None

    def _ask(self, items: Sequence[grading.Item]) -> list[bool]:
        prompts = [grading.prompt(*item) for item in items]
        verdicts = {text: _recall(_entry(text, self._settings)) for text in prompts}
        missing = [text for text, verdict in verdicts.items() if verdict is None]
        if missing:
            self._open()
            future = asyncio.run_coroutine_threadsafe(self._converse(missing), self._loop)
            try:
                found = future.result()
            except concurrent.futures.CancelledError as error:  # another thread's call failed
                raise SealError(self._failure) from error
            except BaseException:  # ours, or an interrupt: what is under way is not waited for
                future.cancel()
                raise
            verdicts.update(zip(missing, found, strict=True))
        return [bool(verdicts[text]) for text in prompts]

    def _open(self) -> None:
        """Makes the client, and the event loop it lives in: a notebook's own is busy."""
        with self._guard:
            if self._loop is None:
                self._client = _client(self._settings)
                self._slots = asyncio.Semaphore(self._settings.concurrency)
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_serve, args=[self._loop], daemon=True)
                self._thread.start()
                # A task that is dropped takes its judge along, and that its thread and connections.
                self._leave = weakref.finalize(self, _leave, self._loop, self._client)
                self._leave.atexit = False

    async def _converse(self, prompts: list[str]) -> list[bool]:
        """Returns the verdict on each prompt; the first failure for good ends them all."""
        # Of another thread's there may be a verdict by now.
        known = {text: _recall(_entry(text, self._settings)) for text in prompts}
        new = [text for text in prompts if known[text] is None and text not in self._asked]
        self._budget.check(len(new))
        for text in new:
            task = asyncio.create_task(self._one(text))
            task.add_done_callback(lambda _, text=text: self._asked.pop(text, None))
            self._asked[text] = task
        tasks = {text: self._asked[text] for text in prompts if known[text] is None}
        try:
            await asyncio.gather(*tasks.values())
        except BaseException as error:
            self._failure = str(error) or self._failure
            for task in tasks.values():
                task.cancel()
            raise
        return [tasks[text].result() if text in tasks else known[text] for text in prompts]

    async def _end(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._client.close()

    async def _one(self, text: str) -> bool:
        async with self._slots:
            reply = await _reply(self._client, text, self._settings, self._budget)
        self._replies.count([reply])
        verdict = grading.parse_yes_no(reply)
        if not grading.is_odd(reply):  # what is no verdict is asked for again by the next run
            content = {"prompt": text, "reply": reply, "verdict": verdict}
            _remember(_entry(text, self._settings), content)
        return verdict


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _leave(loop: asyncio.AbstractEventLoop, client: Any) -> None:
    """Ends a loop that nobody can ask any more; waits for nothing, whatever thread this is."""

    async def end() -> None:
        await client.close()
        loop.stop()

    asyncio.run_coroutine_threadsafe(end(), loop)


_judges: weakref.WeakSet[Judge] = weakref.WeakSet()


def cancel() -> None:
    """Ends the calls of all judges: who waits for one in another thread cannot be interrupted."""
    for judge in list(_judges):
        judge.cancel()


def judge_many(items: Sequence[grading.Item], settings: config.OpenAI) -> list[bool]:
    """Returns the verdicts of a judge that is asked once; see `Judge`."""
    with contextlib.closing(Judge(settings)) as judge:
        return judge(items)


def check(settings: config.OpenAI) -> None:
    """Raises SealError where the endpoint cannot be asked: no key, no client, no address."""
    _client(settings)


def _client(settings: config.OpenAI) -> Any:
    """Returns the client of the endpoint.

    Raises:
      SealError: where it is not installed, or key or address cannot be.
    """
    key = _key(settings)
    if not key:
        raise SealError(
            f"task.openai: the environment variable {settings.key_variable} holds no key "
            "(any text does for an endpoint that needs none)"
        )
    if not (key.isascii() and key.isprintable()):  # libraries would tell of it with the key
        raise SealError(
            f"task.openai: the environment variable {settings.key_variable} holds what is no key: "
            "letters beyond ASCII, or several lines"
        )
    try:
        import openai
    except ImportError as error:
        raise SealError(
            'task.judge=openai needs the client: pip install "seal_jax[openai]"'
        ) from error
    try:
        client = openai.AsyncOpenAI(
            api_key=key,
            base_url=settings.base_url,
            timeout=settings.timeout_s or None,
            max_retries=0,  # its own retries would escape the budget
        )
        if client.base_url.scheme not in ("http", "https") or not client.base_url.host:
            raise ValueError("expected https://HOST/... or http://HOST/...")
    except Exception as error:  # of the address: the client's library has kinds of its own
        address = _endpoint(settings)
        raise SealError(f"task.openai.base_url: {address!r}: {error}") from error
    return client


def _endpoint(settings: config.OpenAI) -> str | None:
    """Returns the address, as the client chooses it; None is its own."""
    return settings.base_url or os.environ.get("OPENAI_BASE_URL")


def _key(settings: config.OpenAI) -> str:
    """Returns the key; files of secrets tend to end with a newline."""
    return os.environ.get(settings.key_variable, "").strip()


async def _reply(client: Any, text: str, settings: config.OpenAI, budget: Budget) -> str:
    """Returns the model's reply, after retries with growing pauses or as long as it asks for."""
    import openai

    for attempt in range(settings.retries + 1):
        budget.spend()
        asked_wait = None
        try:
            # The client's own limit is of the time between two bytes.
            async with asyncio.timeout(settings.timeout_s or None):
                response = await client.chat.completions.create(
                    model=settings.model,
                    messages=[{"role": "user", "content": text}],
                    temperature=0,
                )
            reply = _content(response)
            if reply:
                return reply
            told = getattr(response, "error", None)  # some endpoints fail with status 200
            problem = "the reply holds no text" + (f": {told}" if told else "")
        except openai.APIStatusError as error:
            problem = f"status {error.status_code}: {error.message}"
            transient = error.status_code in _RETRIED or error.status_code >= 500
            if not transient or error.code == "insufficient_quota":
                raise _failure(settings, problem) from None  # it may quote the key, too
            asked_wait = _retry_after(error.response.headers)
        except openai.APIConnectionError as error:  # timeouts and hang-ups
            problem = f"{error.message} ({error.__cause__ or 'no details'})"
        except TimeoutError:
            problem = f"timed out: no whole reply within {settings.timeout_s:g} s"
        except (openai.APIError, ValueError) as error:  # a body that is not what was promised
            problem = f"malformed response: {error}"
        if attempt < settings.retries:
            await asyncio.sleep(_pause(attempt, asked_wait, settings.model))
    raise _failure(settings, f"gave up after {settings.retries + 1} tries: {problem}")


def _failure(settings: config.OpenAI, problem: str) -> SealError:
    """Returns the error of a call; endpoints may quote the key, which is told nobody."""
    key = _key(settings)
    told = problem.replace(key, "[the key]") if len(key) >= _LONG else problem
    return SealError(f"judge {settings.model}: {told}")


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
    asked = json.dumps([_endpoint(settings), settings.model, text])
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
