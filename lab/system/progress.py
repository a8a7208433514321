"""How far a long computation is: one live bar on a terminal, plain log lines elsewhere."""

import logging
import sys
import time

from tqdm import tqdm


class Progress:
    """A progress bar on standard error; without a terminal, lines in the log. Of several processes
    the first one shows it.

    On a terminal every line goes to the log too, below the level that the console shows.

    logger: where the lines go; line: their format, with the fields `done`, `total`, `text`, `rate`
    (steps a second) and `left` (seconds); total: number of steps; start: steps that were done
    before, by an earlier process; bar: `bar_format` of tqdm; unit: of the steps; every_steps,
    every_seconds: without a terminal, the distance of two lines. The last step always has one.

        with Progress(log, "{text}: {done} of {total}, {left:.0f} s left", total=10) as progress:
            for i in range(10):
                ...
                progress.show(i + 1, "files")
    """

    def __init__(
        self, logger: logging.Logger, line: str, total: int, *, start: int = 0,
        bar: str | None = None, unit: str = "it", every_steps: int = 1, every_seconds: float = 0.0,
    ):  # fmt: skip
        self.logger, self.line, self.total, self.start = logger, line, total, start
        self.bar_format, self.unit = bar, unit
        self.live = sys.stderr.isatty()
        self.every_steps = 1 if self.live else every_steps
        self.every_seconds = every_seconds

    def __enter__(self) -> "Progress":
        from lab.system import distributed  # imports torch

        self.bar = tqdm(
            total=self.total,
            initial=max(self.start, 0),
            bar_format=self.bar_format,
            unit=self.unit,
            miniters=1,
            disable=not self.live or distributed.rank() > 0,
            dynamic_ncols=True,
        )
        self.began = self.last_line = time.perf_counter()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()

    def show(self, done: int, text: str) -> None:
        """`done` (more than `start`) steps are done; text: what is being done, or how it goes."""
        self.bar.set_description_str(text, refresh=done == self.bar.n)
        self.bar.update(done - self.bar.n)
        now = time.perf_counter()
        due = done % self.every_steps == 0 and now - self.last_line >= self.every_seconds
        if not due and done != self.total:
            return
        self.last_line = now
        each = (now - self.began) / (done - self.start)
        text = self.line.format(
            done=done,
            total=self.total,
            text=text,
            rate=1 / max(each, 1e-9),
            left=each * (self.total - done),
        )
        self.logger.log(logging.DEBUG if self.live else logging.INFO, "%s", text)
