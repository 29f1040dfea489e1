"""Our engine as a back end: one thread steps the session, callers wait in the event loop.

Between two steps the thread does what callers have asked for, so that a session needs no lock, and a caller who
leaves frees a row before the next cycle.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue

from selfspec.engine.base import Load, Opens, RequestOutput, Session
from selfspec.serve.answer import Answer, request
from selfspec.serve.backend import Call, Chunk, Price
from selfspec.serve.config import Serve
from selfspec.serve.errors import Failed, RequestError, TooLong, Unavailable
from selfspec.serve.metrics import Metrics
from selfspec.types import Completion, Request

log = logging.getLogger(__name__)


class ResponseQueue:
    """Where one call's progress is heard. Only the engine's thread writes here, only the event loop reads."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[RequestOutput | Completion | RequestError] = asyncio.Queue()

    def put(self, news: RequestOutput | Completion | RequestError) -> None:
        """RequestOutput; or what a call that was given up had come to; or why there will be no more."""
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._heard.put_nowait, news)

    async def get(self) -> RequestOutput | Completion:
        """The next news.

        Raises:
            RequestError: there will be no more.
        """
        news = await self._heard.get()
        if isinstance(news, RequestError):
            raise news
        return news


class Local:
    """A back end over one session of our engine."""

    price = Price()

    def __init__(self, name: str, make: Callable[[], Opens], settings: Serve, draft: str, metrics: Metrics) -> None:
        """Begins to load at once, in a thread.

        Args:
            make: the engine, with its head in place; called in the thread that will step it.
            draft: what the engine drafts by, for the metrics.
        """
        self.name, self._settings, self._draft, self._metrics = name, settings, draft, metrics
        self.ready: Future[Opens] = Future()
        """The engine, once it is loaded, or why it cannot be."""
        self.ready.set_running_or_notify_cancel()  # who waits for it no longer does not cancel it
        self._asked: SimpleQueue[Callable[[Session], None] | None] = SimpleQueue()
        self._callers: dict[int, ResponseQueue] = {}
        self._load = Load(0, 0, 0.0)
        metrics.watch(lambda: self._load)
        self._tokenizer = ThreadPoolExecutor(1, "tokenizer")
        self._thread = threading.Thread(target=self._run, args=(make,), name="engine", daemon=True)
        self._thread.start()

    async def healthy(self) -> bool:
        """Whether the engine is loaded and its thread alive."""
        return self.ready.done() and self.ready.exception() is None and self._thread.is_alive()

    async def close(self) -> None:
        """Stops the thread, unless it is still loading; calls that are running end with ``Unavailable``."""
        self._asked.put(None)
        if self.ready.done():
            await asyncio.to_thread(self._thread.join)
        self._tokenizer.shutdown()

    async def stream(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """See :meth:`Backend.stream <selfspec.serve.backend.Backend.stream>`.

        Raises:
            Unavailable: the engine is not ready, or was stopped.
            Invalid, TooLong: what is asked for.
            Failed: the engine broke.
        """
        if not await self.healthy():
            raise Unavailable("the engine is not ready")
        engine, loop, caller = self.ready.result(), asyncio.get_running_loop(), ResponseQueue()
        asked = await loop.run_in_executor(self._tokenizer, request, engine, call, self._settings)
        answer = Answer(engine.tokenizer, call, asked)
        self._asked.put(lambda session: self._submit(session, caller, asked))
        try:
            completion: Completion | None = None
            while completion is None:
                news = await caller.get()
                if isinstance(news, Completion):
                    completion = news
                    break
                completion = news.completion
                if not answer.stopped:
                    yield answer.take(news)
                    if answer.stopped and completion is None:
                        self._asked.put(lambda session: self._cancel(session, caller))
            yield answer.last(completion)
        finally:
            self._asked.put(lambda session: self._cancel(session, caller))

    def _run(self, make: Callable[[], Opens]) -> None:
        """The engine's thread."""
        try:
            engine = make()
            session = self._open(engine)
        except BaseException as error:
            self.ready.set_exception(error)
            return
        self.ready.set_result(engine)
        try:
            while self._drain_commands(session):
                try:
                    told = session.step()
                except Exception:
                    log.exception("a step failed; its requests are given up")
                    self._give_up(Failed("the engine broke"))
                    session = self._open(engine)
                    continue
                self._load = session.load
                for progress in told:
                    self._pass_on(progress)
        finally:
            self._give_up(Unavailable("the engine was stopped"))

    def _open(self, engine: Opens) -> Session:
        return engine.open(self._settings.max_batch, self._settings.max_model_len, self._settings.scheduler)

    def _drain_commands(self, session: Session) -> bool:
        """Does what callers have asked for, and waits for it where there is nothing else to do; false: to stop."""
        while True:
            try:
                action = self._asked.get(block=not session.busy)
            except Empty:
                return True
            if action is None:
                return False
            action(session)
            self._load = session.load

    def _submit(self, session: Session, caller: ResponseQueue, asked: Request) -> None:
        try:
            caller.number = session.submit(asked)
        except ValueError as error:
            caller.put(TooLong(str(error)))
        else:
            self._callers[caller.number] = caller

    def _cancel(self, session: Session, caller: ResponseQueue) -> None:
        """Of a call that is done already, nothing; one that was never admitted has come to nothing."""
        if caller.number is None or self._callers.pop(caller.number, None) is None:
            return
        completion = session.cancel(caller.number)
        if completion is not None:
            self._count(completion)
            caller.put(completion)

    def _pass_on(self, progress: RequestOutput) -> None:
        caller = self._callers[progress.number]
        if progress.completion is not None:
            del self._callers[progress.number]
            self._count(progress.completion)
        caller.put(progress)

    def _give_up(self, error: RequestError) -> None:
        for caller in self._callers.values():
            caller.put(error)
        self._callers.clear()

    def _count(self, completion: Completion) -> None:
        self._metrics.queue.observe(completion.queue_s)
        self._metrics.proposed.labels(self._draft).inc(sum(cycle.proposed for cycle in completion.cycles))
        self._metrics.accepted.labels(self._draft).inc(sum(cycle.accepted for cycle in completion.cycles))
