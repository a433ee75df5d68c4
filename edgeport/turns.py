"""Work that stops in its midst and goes on when it is asked to, where the code in between is not ours to make a generator."""

from __future__ import annotations

from collections.abc import Callable
from threading import Semaphore, Thread


class Cancelled(BaseException):
    """Raised in the work, where it stands, when it is not to go on."""


class Turn:
    """A piece of work in a thread that runs only while `advance` waits for it, so that of several one runs at a time."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.asked, self.stopped = Semaphore(0), Semaphore(0)
        self.over = False
        self.error: BaseException | None = None
        self.thread = Thread(target=self.run, args=(work,), daemon=True)
        self.thread.start()

    def run(self, work: Callable[[], None]) -> None:
        try:
            self.wait()
            work()
        except Cancelled:
            pass
        except BaseException as error:  # it belongs to whoever asked
            self.error = error
        finally:
            self.over = True
            self.stopped.release()

    def wait(self) -> None:
        self.asked.acquire()
        if self.over:
            raise Cancelled

    def stop(self) -> None:
        """Called by the work: stand still until the next `advance`."""
        self.stopped.release()
        self.wait()

    def advance(self) -> bool:
        """Let the work run to where it stops; whether there is more of it. Raises what it raises."""
        self.asked.release()
        self.stopped.acquire()
        if self.error:
            raise self.error
        return not self.over

    def cancel(self) -> None:
        """End the work where it stands."""
        if not self.over:
            self.over = True
            self.asked.release()
        self.thread.join()
