"""Laws of the judge behind an endpoint, against a real server on loopback that misbehaves."""

import contextlib
import gc
import json
import signal
import socket
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("openai")

from seal_jax import checkpoint, config, experiment, judge, judge_openai, lesson, rewards  # noqa: E402
from seal_jax.errors import SealError  # noqa: E402
from seal_jax.evals import study  # noqa: E402
from seal_jax.tasks import Context, Question, squad  # noqa: E402

ITEMS = [("Who?", f"gold {i}", f"answer {i}") for i in range(6)]


def reply(text):
    """Returns the server's step that answers in the API's format."""
    message = {"role": "assistant", "content": text}
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }
    return 200, {}, json.dumps(body)


def failure(status, headers=None, code=None):
    return status, headers or {}, json.dumps({"error": {"message": "trouble", "code": code}})


class Server:
    """A fake endpoint: `script(prompt, times asked before)` gives each request's step."""

    def __init__(self, script):
        self.requests, self.times, self.busy, self.most_busy = [], [], 0, 0
        self.connections = 0
        self.stopping = threading.Event()
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # connections are kept, as real endpoints do

            def setup(self):
                super().setup()
                server.connections += 1

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][0]["content"]
                with lock:
                    before = sum(prompt == old["prompt"] for old in server.requests)
                    seen = {"prompt": prompt, "key": self.headers["Authorization"], "body": body}
                    server.requests.append(seen)
                    server.times.append(time.monotonic())
                    server.busy += 1
                    server.most_busy = max(server.most_busy, server.busy)
                step = script(prompt, before)
                if callable(step):
                    step = step(server)
                with lock:
                    server.busy -= 1
                if step is None:  # hang up
                    self.close_connection = True
                    return
                status, headers, text = step
                self.send_response(status)
                headers = {"Content-Type": "application/json", **headers}
                for name, value in {**headers, "Content-Length": len(text.encode())}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_):
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    def stop(self):
        self.stopping.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Returns a function: script and settings -> server, OpenAI settings."""
    monkeypatch.setenv("TEST_JUDGE_KEY", "secret-7")
    monkeypatch.setattr(judge_openai, "_pause", quick_pause)
    servers = []

    def start(script, **settings):
        servers.append(Server(script))
        defaults = dict(retries=2, timeout_s=5.0, concurrency=4, cache=str(tmp_path / "cache"))
        return servers[-1], config.OpenAI(
            base_url=servers[-1].url, key_variable="TEST_JUDGE_KEY", **{**defaults, **settings}
        )

    yield start
    for server in servers:
        server.stop()


real_pause = judge_openai._pause


def quick_pause(attempt, asked, model):
    """Returns the endpoint's own pause, and a hundredth of ours, to keep the tests short."""
    return real_pause(attempt, asked, model) / (100 if asked is None else 1)


def even(prompt, _):
    """A grader that says yes to even golds."""
    number = int(prompt.split("Gold answer: gold ")[1].split("\n")[0])
    return reply("Yes." if number % 2 == 0 else "no")


EVEN = [True, False, True, False, True, False]


def test_verdicts_come_back_in_order_and_are_asked_together(serve):
    def slow(prompt, before):
        time.sleep(0.1)
        return even(prompt, before)

    server, settings = serve(slow, concurrency=3)
    assert judge_openai.judge_many(ITEMS, settings) == EVEN
    assert server.most_busy == 3
    assert {request["key"] for request in server.requests} == {"Bearer secret-7"}
    assert server.requests[0]["body"]["temperature"] == 0


def test_blank_answers_are_wrong_and_never_sent(serve):
    server, settings = serve(lambda *_: reply("yes"))
    items = [("Who?", "me", " \n"), ("Who?", "me", "me"), ("Who?", "me", "")]
    assert judge_openai.judge_many(items, settings) == [False, True, False]
    assert len(server.requests) == 1
    assert judge_openai.judge_many(items[:1], settings) == [False]


def test_what_was_answered_once_is_never_asked_again(serve, tmp_path):
    server, settings = serve(even)
    assert judge_openai.judge_many(ITEMS + ITEMS, settings) == EVEN + EVEN
    assert judge_openai.judge_many(ITEMS[::-1], settings) == EVEN[::-1]
    assert len(server.requests) == len(ITEMS)
    other = dict(vars(settings), model="another")
    judge_openai.judge_many(ITEMS[:1], config.OpenAI(**other))
    assert len(server.requests) == len(ITEMS) + 1  # another model's verdict is another verdict
    cached = "".join(file.read_text() for file in tmp_path.rglob("*.json"))
    assert "secret-7" not in cached and "gold 3" in cached


def test_half_a_surrogate_pair_in_a_reply_is_a_verdict_all_the_same(serve):
    _, settings = serve(lambda *_: reply("yes \ud83d"))
    assert judge_openai.judge_many(ITEMS[:1], settings) == [True]


def test_endpoints_named_by_the_environment_share_no_verdicts(serve, monkeypatch):
    first, settings = serve(lambda *_: reply("yes"))
    second, other = serve(lambda *_: reply("no"))
    own = config.OpenAI(**dict(vars(settings), base_url=None))
    for endpoint, verdict in ((settings.base_url, True), (other.base_url, False)):
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint)
        assert judge_openai.judge_many(ITEMS[:1], own) == [verdict]
    assert len(first.requests) == len(second.requests) == 1


def test_a_damaged_cache_file_is_asked_again(serve, tmp_path):
    server, settings = serve(even)
    judge_openai.judge_many(ITEMS[:1], settings)
    (file,) = tmp_path.rglob("*.json")
    for damage in ("", "{", '{"verdict": "yes"}', "[]"):
        file.write_text(damage)
        assert judge_openai.judge_many(ITEMS[:1], settings) == [True]
    assert len(server.requests) == 5


def test_parallel_writers_of_one_entry_leave_a_whole_file(tmp_path):
    file = tmp_path / "ab" / "entry.json"
    content = {"verdict": True, "reply": "yes " * 5000}
    threads = [
        threading.Thread(target=judge_openai._remember, args=(file, content)) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(file.read_text()) == content
    assert list(file.parent.iterdir()) == [file]  # no drafts left


def test_rate_limits_are_waited_out_for_as_long_as_asked(serve):
    def limited(_, before):
        return failure(429, {"Retry-After": "0.5"}) if before == 0 else reply("yes")

    server, settings = serve(limited)
    assert judge_openai.judge_many(ITEMS[:1], settings) == [True]
    assert server.times[1] - server.times[0] >= 0.5


@pytest.mark.parametrize(
    "trouble",
    [
        failure(500),
        failure(503),
        failure(408),
        None,
        (200, {}, '{"choices": [{"mess'),
        (200, {"Content-Type": "text/html"}, "<html>proxy</html>"),
        (200, {}, '{"choices": []}'),
        (200, {}, "null"),
        reply(""),
        reply(None),
    ],
    ids=str,
)
def test_trouble_is_retried_and_never_a_verdict(serve, trouble, tmp_path):
    server, settings = serve(lambda _, before: trouble if before < 2 else reply("yes"))
    assert judge_openai.judge_many(ITEMS[:1], settings) == [True]
    assert len(server.requests) == 3

    server, settings = serve(lambda *_: trouble, cache=str(tmp_path / "other"))
    with pytest.raises(SealError, match="gave up after 3 tries"):
        judge_openai.judge_many(ITEMS[:1], settings)
    assert len(server.requests) == 3
    assert not list((tmp_path / "other").rglob("*.json"))


def test_a_server_that_never_answers_times_out(serve):
    def stuck(server):
        server.stopping.wait(20)

    server, settings = serve(lambda _, before: stuck if before == 0 else reply("no"), timeout_s=0.3)
    assert judge_openai.judge_many(ITEMS[:1], settings) == [False]
    assert len(server.requests) == 2
    _, settings = serve(lambda *_: stuck, timeout_s=0.2, retries=1)
    with pytest.raises(SealError, match="gave up after 2 tries.*[Tt]imed out"):
        judge_openai.judge_many(ITEMS[1:2], settings)


@pytest.mark.parametrize(
    "fatal", [failure(401), failure(404), failure(400), failure(429, code="insufficient_quota")]
)
def test_what_no_retry_can_mend_fails_at_once(serve, fatal):
    server, settings = serve(lambda *_: fatal)
    with pytest.raises(SealError, match=f"status {fatal[0]}.*trouble"):
        judge_openai.judge_many(ITEMS[:1], settings)
    assert len(server.requests) == 1


def test_one_failed_call_is_an_error_but_keeps_what_was_paid_for(serve):
    def one_bad(prompt, before):
        if "gold 3" in prompt and len(server.requests) < 20:
            time.sleep(0.3)
            return failure(400)
        return even(prompt, before)

    server, settings = serve(one_bad)
    with pytest.raises(SealError, match="status 400"):
        judge_openai.judge_many(ITEMS, settings)
    sent = len(server.requests)
    server.requests.extend([{"prompt": ""}] * 20)  # from now on the server is well
    assert judge_openai.judge_many(ITEMS, settings) == EVEN
    assert len(server.requests) - 20 - sent == 1


def test_the_budget_holds_for_a_judge_and_counts_retries(serve):
    server, settings = serve(even, max_calls=4)
    ask = judge.load(config.Task(judge="openai", openai=settings))
    assert ask(ITEMS[:3]) == EVEN[:3]
    with pytest.raises(SealError, match="max_calls=4: 2 more calls are needed and 1 are left"):
        ask(ITEMS[:5])
    assert len(server.requests) == 3
    assert ask(ITEMS[:4]) == EVEN[:4]  # three of them are free

    server, settings = serve(lambda *_: failure(500), max_calls=2, retries=5)
    with pytest.raises(SealError, match="max_calls=2"):
        judge_openai.judge_many([("Q", "gold", "other")], settings)
    assert len(server.requests) == 2


def test_many_threads_share_the_limit_the_connections_and_equal_questions(serve):
    """Candidates are graded side by side: never more requests at once than one of them may send."""

    def slow(prompt, before):
        time.sleep(0.02)
        return even(prompt, before)

    server, settings = serve(slow, concurrency=4)
    groups = [[ITEMS[(i + j) % 6] for j in range(3)] for i in range(24)]
    expected = [[EVEN[(i + j) % 6] for j in range(3)] for i in range(24)]
    with contextlib.closing(judge_openai.Judge(settings)) as ask:
        with ThreadPoolExecutor(24) as pool:
            assert list(pool.map(ask, groups)) == expected
    assert server.most_busy <= 4
    assert len(server.requests) == len(ITEMS)
    assert server.connections <= 4


def test_a_call_that_fails_for_good_ends_those_of_other_threads_with_its_words(serve):
    bad = lambda prompt: "gold 3" in prompt

    def script(prompt, before):
        time.sleep(0.1 if bad(prompt) else 0.3)
        return failure(400) if bad(prompt) else even(prompt, before)

    _, settings = serve(script, concurrency=2)
    ask = judge_openai.Judge(settings)
    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(ask, [ITEMS[3], item]) for item in ITEMS]
        for future in futures:
            with pytest.raises(SealError, match="status 400: .*trouble"):
                future.result()
    assert ask(ITEMS[:1]) == [True]  # and it can be asked again
    ask.close()
    assert ask(ITEMS[1:2]) == [False]
    ask.close()


def candidates(settings, n=6):
    """Returns a configuration, a task and n contexts of one question with answers to grade."""
    cfg = config.Config(task=config.Task(judge="openai", openai=settings))
    contexts = [Context(f"c{i}", "T", "P.", (Question("", f"gold {i}", "Q?"),)) for i in range(n)]
    return cfg, squad.make(contexts, cfg.task), [(context, ["words"]) for context in contexts]


def test_a_call_that_fails_for_good_does_not_wait_for_those_that_hang(serve):
    def script(prompt, _):
        return failure(401) if "gold 3" in prompt else lambda server: server.stopping.wait(20)

    _, settings = serve(script, concurrency=6, timeout_s=15.0)
    cfg, task, pairs = candidates(settings)
    start = time.monotonic()
    with pytest.raises(SealError, match="status 401"):
        rewards.grade(task, pairs, cfg)
    assert time.monotonic() - start < 5


def test_an_interrupt_ends_grading_at_once(serve):
    """Ctrl-C reaches the main thread alone, which waits for others."""
    _, settings = serve(lambda *_: lambda server: server.stopping.wait(20), timeout_s=15.0)
    cfg, task, pairs = candidates(settings)
    start = time.monotonic()
    main = threading.main_thread().ident
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist's workers ignore it
    try:
        threading.Timer(0.5, signal.pthread_kill, [main, signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            rewards.grade(task, pairs, cfg)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 5


def test_a_verdict_that_came_meanwhile_is_not_asked_for_again(serve, monkeypatch):
    """Between a thread's look into the cache and its question another's may have been answered."""
    server, settings = serve(even, max_calls=6)
    real, here = judge_openai._recall, threading.current_thread()
    early = lambda file: None if threading.current_thread() is here else real(file)
    monkeypatch.setattr(judge_openai, "_recall", early)  # this thread's look comes too early
    with contextlib.closing(judge_openai.Judge(settings)) as ask:
        assert ask(ITEMS) == EVEN and ask(ITEMS) == EVEN
    assert len(server.requests) == len(ITEMS)


def test_the_candidates_of_a_chunk_are_graded_side_by_side(serve):
    """One question each, asked together: as many at once as the endpoint may get."""

    def slow(prompt, before):
        time.sleep(0.1)
        return even(prompt, before)

    server, settings = serve(slow, concurrency=6)
    cfg, task, pairs = candidates(settings)
    grades = rewards.grade(task, pairs, cfg)
    assert [grade.reward for grade in grades] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert server.most_busy == 6


def test_a_missing_key_is_named_before_anything_is_sent(serve, monkeypatch):
    server, settings = serve(even)
    monkeypatch.delenv("TEST_JUDGE_KEY")
    with pytest.raises(SealError, match="TEST_JUDGE_KEY"):
        judge_openai.judge_many(ITEMS, settings)
    assert not server.requests


def test_it_works_inside_a_running_event_loop(serve):
    import asyncio

    _, settings = serve(even)

    async def notebook():
        return judge_openai.judge_many(ITEMS, settings)

    assert asyncio.run(notebook()) == EVEN


def test_pauses_double_and_follow_the_endpoint():
    drawn = [[real_pause(attempt, None, "m") for _ in range(50)] for attempt in range(4)]
    for attempt, pauses in enumerate(drawn):
        assert all(0.25 * 2**attempt <= pause <= 0.5 * 2**attempt for pause in pauses)
    assert real_pause(5, 0.0, "m") == 0.0
    assert judge_openai._retry_after({"retry-after": "7"}) == 7.0
    in_a_minute = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert 57 < judge_openai._retry_after({"retry-after": in_a_minute}) < 62
    assert judge_openai._retry_after({"retry-after": "soon"}) is None
    with pytest.raises(SealError, match="asks to wait 3600 s"):
        real_pause(0, 3600.0, "m")


def test_an_odd_reply_counts_as_no_is_told_of_and_not_kept(serve, tmp_path):
    server, settings = serve(lambda *_: reply("I cannot help with that."))
    for asked in (1, 2):
        with pytest.warns(UserWarning, match="task.judge=openai: 1 of 1 replies .*'I cannot help"):
            assert judge_openai.judge_many(ITEMS[:1], settings) == [False]
        assert len(server.requests) == asked and not list(tmp_path.rglob("*.json"))
    many = [("Who?", "gold", f"answer {i}") for i in range(60)]
    with pytest.warns(UserWarning), pytest.raises(SealError, match="this model cannot judge: 50"):
        judge_openai.judge_many(many, settings)


def test_what_an_endpoint_says_is_wrong_is_told_whatever_its_status(serve):
    body = json.dumps({"error": {"message": "the provider is down"}})
    _, settings = serve(lambda *_: (200, {}, body), retries=0)
    with pytest.raises(SealError, match="the reply holds no text: .*the provider is down"):
        judge_openai.judge_many(ITEMS[:1], settings)


@pytest.mark.parametrize("key", ["secret-7\n", "secret-7\r\nX: y", "secret-7“"], ids=ascii)
def test_a_key_is_told_nobody(serve, monkeypatch, key):
    """Neither one that no header can hold, nor one that the endpoint quotes."""
    monkeypatch.setenv("TEST_JUDGE_KEY", key)
    quoting = lambda *_: (401, {}, json.dumps({"error": {"message": "bad: secret-7"}}))
    server, settings = serve(quoting)
    with pytest.raises(SealError) as caught:
        judge_openai.judge_many(ITEMS[:1], settings)
    told = "".join(traceback.format_exception(caught.value))
    assert "secret-7" not in told
    if key.strip() == "secret-7":
        assert "status 401: " in told and server.requests[0]["key"] == "Bearer secret-7"
    else:
        assert "TEST_JUDGE_KEY holds what is no key" in told and not server.requests


@pytest.mark.parametrize("address", ["localhost:8000/v1", "http://[::1/v1", "http:///v1"])
def test_an_address_that_is_none_is_named_at_once(serve, address):
    _, settings = serve(even)
    wrong = config.OpenAI(**dict(vars(settings), base_url=address, retries=6))
    start = time.monotonic()
    with pytest.raises(SealError, match="task.openai.base_url: '(localhost|http)"):
        judge_openai.judge_many(ITEMS[:1], wrong)
    assert time.monotonic() - start < 2


def test_a_reply_that_comes_byte_by_byte_times_out(serve):
    """Some gateways send blanks while the model behind them hangs."""
    _, settings = serve(even)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:

        def drip():
            line = stack.enter_context(listener.accept()[0])
            with contextlib.suppress(OSError):
                line.sendall(head)
                while True:
                    line.sendall(b" ")
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        slow = config.OpenAI(**dict(vars(settings), base_url=url, timeout_s=0.5, retries=0))
        start = time.monotonic()
        with pytest.raises(SealError, match="gave up after 1 tries: timed out"):
            judge_openai.judge_many(ITEMS[:1], slow)
    assert time.monotonic() - start < 3


def test_a_judge_that_is_dropped_leaves_no_thread_behind(serve):
    """A notebook loads a task, and runs it, many times."""
    before = set(threading.enumerate())
    _, settings = serve(even)
    ask = judge_openai.Judge(settings)
    assert ask(ITEMS) == EVEN
    own = ask._thread
    assert own.is_alive() and own not in before
    del ask
    gc.collect()
    own.join(5)
    assert not own.is_alive()


def study_of_single(cfg):
    return study.run(cfg, "single")


@pytest.mark.parametrize(
    "start", [experiment.run, lesson.teach, study_of_single], ids=lambda x: x.__name__
)
def test_a_missing_key_is_named_before_any_model_is_loaded(start, monkeypatch, tmp_path):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    asked = [{"question": "Who?", "answer": "Ida"}]
    entries = [{"title": "T", "context": f"{i}.", "questions": asked} for i in range(2)]
    (tmp_path / "passages.json").write_text(json.dumps(entries))
    words = ["model.path=tiny-world", "task.path=passages.json", "task.size=1", "outer.contexts=1"]
    words += ["task.judge=openai", "task.openai.key_variable=NO_SUCH_KEY"]
    monkeypatch.setattr(checkpoint, "load_model", None)
    with pytest.raises(SealError, match="NO_SUCH_KEY holds no key"):
        start(config.load_config(None, words))
    nowhere = ["task.judge=model", "task.judge_model=./nowhere"]
    with pytest.raises(SealError, match="./nowhere: no such folder"):
        start(config.load_config(None, [*words[:4], *nowhere]))
    assert [path.name for path in tmp_path.iterdir()] == ["passages.json"]
