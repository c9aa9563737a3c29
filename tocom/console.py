"""What a person sees of a study that runs: one line a job, one bar with the time left, and where to look at the end.

Snakemake sends records of what happens to handlers; :class:`Console` takes the place of the one that fills the screen.
It is no logger plugin, because Snakemake finds none in an editable installation, and one that it cannot find stops
every run whose profile names it. Snakemake's own log stays as it is.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.console import Console as Terminal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from snakemake_interface_logger_plugins.common import LogEvent

GO_ON = "To go on, give the same command again: what is finished is kept, a training goes on from its last saved state."
#: Errors of Snakemake's that the line of the failed job and the end say better; what it says when it is told to stop.
REPEATED = ("CalledProcessError", "Look above for error messages", "At least one job did not complete")
STOPPING = ("Terminating processes on user request", "Will exit after finishing")
#: What is said in place of Snakemake's four lines on its lock.
LOCKED = (
    "another run in this folder makes the same files; wait for it or stop it. If there is none, one was killed:"
    " give the same command once with --unlock after it, then again without"
)
#: Marks of the line with which a training says that it was resumed, and of one that says what went wrong.
RESUMED, ERROR = " goes on after ", "tocom: error: "
#: Wildcards that say where files are, not what is done.
PLACES = ("store", "data")
#: Seconds between two looks at the logs of running jobs.
LOOK = 5.0


class Job(NamedTuple):
    """A job that was started: its rule, what tells it from others of the rule, its logs, when it started."""

    rule: str
    title: str
    logs: Sequence[str]
    since: float

    def __str__(self) -> str:
        """Return what it is called in lines."""
        return f"{self.rule} {self.title}".rstrip()


# --- what is said -----------------------------------------------------------------------------------------------------


def lines_of(log: str | Path, last_bytes: int = 1_000_000) -> list[str]:
    """Return the last lines of a log, each repaint of a bar as one; none if there is no such file here."""
    try:
        with Path(log).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - last_bytes))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.strip() for line in re.split(r"[\r\n]+", text) if re.search(r"\w", line)]


def reason_of(logs: Iterable[str], otherwise: str = "") -> str:
    """Return in one line why a job failed: our own error, or ``otherwise``, or how its log ends."""
    lines = [line for log in logs for line in lines_of(log)]
    errors = [line for line in lines if line.startswith(ERROR)]
    if errors or otherwise:
        return errors[-1] if errors else otherwise
    if not lines:
        return "it ended before it wrote a log"
    explains = re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b", lines[-1])
    return lines[-1] if explains else f"it was killed, or ended without an error; the last of its log: {lines[-1]}"


def progress_of(log: str) -> str:
    """Return how far the bar in a running job's log is, such as " 45% (01:30 left)"; nothing if there is none."""
    found = re.search(r"(\d+%)\|.*<([\d:]+)", (lines_of(log, 1000) or [""])[-1])
    return f" {found[1]} ({found[2]} left)" if found else ""


def span(seconds: float) -> str:
    """Return a duration in the two units that matter."""
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 99.5:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def seconds_left(
    jobs: Mapping[str, int], finished: Mapping[str, Sequence[float]], running: Sequence[tuple[str, float]], past: float
) -> float | None:
    """Return the seconds until a run will end, or None until a job of one of its frequent rules has finished.

    A job is taken to need the mean of its rule's, or of all, and as many will run at a time as did on average.

    Args:
        jobs: rule -> jobs of the whole run.
        finished: rule -> seconds that each of its finished jobs took.
        running: rule and seconds so far of every job that runs.
        past: seconds since the start of the run.
    """
    every = [seconds for values in finished.values() for seconds in values]
    if not any(values and 2 * jobs.get(rule, 0) >= max(jobs.values()) for rule, values in finished.items()):
        return None
    need = {rule: fmean(finished.get(rule) or every) for rule in jobs}
    waiting = Counter(jobs)
    waiting.subtract([rule for rule, values in finished.items() for _ in values] + [rule for rule, _ in running])
    work = sum(need[rule] * count for rule, count in waiting.items() if count > 0)
    # One that takes longer than expected is not about to end: a tenth of its time so far is still to come.
    work += sum(max(need.get(rule, 0.0) - seconds, seconds / 10) for rule, seconds in running)
    return work / ((sum(every) + sum(seconds for _, seconds in running)) / max(past, 1e-9))


def places(studies: Mapping[str, Path], configs: Sequence[str] = ()) -> list[str]:
    """Return the lines that say where the results of some studies (name -> folder) are, as far as they are there."""
    rows = [
        (name, label, folder / file)
        for name, folder in studies.items()
        for label, file in (("main table", "tables/main.md"), ("figures", "figures"))
        if (folder / file).exists()
    ]
    lines = [f"{name}: {label}: {path}" for name, label, path in rows]
    page = next(iter(studies.values())) if len(studies) == 1 else Path("results")
    options = ["--configfile", *configs] if configs else []
    command = shlex.join(["snakemake", *options, "--report", str(page / "report.html")])
    return [*lines, f"All of it as one page: {command}"] if lines else []


def account(
    failed: Sequence[tuple[Job, str]], done: int, total: int, stopped: bool, errors: Sequence[str]
) -> list[str]:
    """Return the last lines of a run that did not reach its end: each failed job, its reason and log, how to go on."""
    lines = [f"{'Stopped' if stopped else 'Not finished'}: {done} of {total} jobs are done, {len(failed)} failed."]
    for job, reason in failed:
        lines += ["", str(job), f"  {reason}"]
        lines += [f"  log: {log}" for log in job.logs]
    return lines + ([] if failed or stopped else list(errors)) + ["", GO_ON]


# --- the handler ------------------------------------------------------------------------------------------------------


class Console(logging.Handler):
    """Shows a run of Snakemake's; before it starts, in a dry run and with --quiet or --verbose Snakemake speaks."""

    def __init__(self, own: logging.Handler | None, settings: Any, terminal: Terminal | None = None):
        """Take over from Snakemake's ``own`` handler; None shows nothing, because the user chose another logger."""
        super().__init__()
        stream = sys.stdout if settings.stdout else sys.stderr
        plain = {"no_color": settings.nocolor or None, "highlight": False}
        self.terminal = terminal or Terminal(file=stream, force_terminal=stream.isatty(), **plain)
        self.own, self.settings = own, settings
        other = settings.dryrun or settings.quiet or settings.verbose or settings.debug_dag
        self.speaks, self.started = own is not None and not other, False
        self.workflow: Any = None
        self.studies: dict[str, Path] = {}
        self.configs: list[str] = []
        self.jobs: Counter[str] = Counter()  # those that failed are taken out
        self.total, self.began, self.looked, self.stopped = 0, time.monotonic(), 0.0, False
        self.running: dict[int, Job] = {}
        self.failed: dict[int, tuple[Job, str]] = {}
        self.finished: dict[str, list[float]] = defaultdict(list)
        self.percent: dict[int, str] = {}
        self.errors: list[str] = []
        self.live = Live(self, console=self.terminal, refresh_per_second=2, transient=True)

    @classmethod
    def attach(cls, workflow: Any) -> Console:
        """Put a console in the place of Snakemake's handler, in the process that runs the study."""
        logger = logging.getLogger("snakemake.logging")
        own = next((it for it in logger.handlers if it.name == "DefaultStreamHandler"), None)
        console = cls(own if workflow.is_main_process else None, workflow.output_settings)
        console.workflow = workflow
        console.configs = [os.path.relpath(path) for path in workflow.config_settings.configfiles or ()]
        if workflow.is_main_process:
            if own is not None:
                logger.removeHandler(own)
            logger.addHandler(console)
        return console

    def emit(self, record: logging.LogRecord) -> None:
        """Note what a record says and show what a person wants to see of it."""
        try:
            event, text = getattr(record, "event", None), record.getMessage()
            self.started |= event == LogEvent.WORKFLOW_STARTED
            ours = re.match(r'WorkflowError in file ".*common\.smk", line \d+:\n(.*)\n\s+File "', text)
            locked = text.startswith("LockException")
            if ours or locked:
                self.say(ERROR + (LOCKED if locked else ours[1]), style="red")
            elif self.own is not None and not (self.speaks and self.started):
                self.own.handle(record)
            if action := getattr(self, f"_{event}", None):
                action(record)
            elif self.started and not (ours or locked) and event in (None, LogEvent.ERROR):
                self._message(record.levelno, text)
        except Exception:
            self.handleError(record)

    def say(self, *lines: str, style: str | None = None) -> None:
        """Print lines above the bar."""
        for line in lines:
            self.terminal.print(line, style=style, markup=False, soft_wrap=True)

    def _tell(self, *lines: str, style: str | None = None) -> None:
        if self.speaks:
            self.say(*lines, style=style)

    def _message(self, level: int, text: str) -> None:
        told, self.stopped = self.stopped, self.stopped or text.startswith(STOPPING)
        if text.startswith("Nothing to be done"):
            self._tell("Nothing to be done: all is there and up to date.", *self._places())
        elif text.startswith(STOPPING):
            if not told:  # Snakemake says so again and again while jobs end
                self._tell("Stopping ...")
        elif level >= logging.WARNING and not any(words in text for words in REPEATED):
            self.errors += [text] if level >= logging.ERROR else []
            self._tell(text.strip(), style="red" if level >= logging.ERROR else "yellow")

    @property
    def makes_backbones(self) -> bool:
        """Whether this run makes a backbone."""
        return any(self.jobs[rule] for rule in ("import_backbone", "pretrain_backbone"))

    @property
    def made_in_stores(self) -> bool:
        """Whether this run makes something that studies share."""
        return self.makes_backbones or bool(self.jobs["learn"])

    def _run_info(self, record: Any) -> None:
        self.jobs = Counter({rule: n for rule, n in record.stats.items() if rule not in ("total", "all")})
        self.total, self.began = self.jobs.total(), time.monotonic()
        self._tell(
            f"To do ({self.total}): " + ", ".join(rule if n == 1 else f"{n} {rule}" for rule, n in self.jobs.items())
        )
        if self.speaks and self.terminal.is_terminal:
            self.live.start()

    def _shellcmd(self, record: Any) -> None:
        if self.settings.printshellcmds and record.shellcmd:
            self._tell(record.shellcmd)

    def _job_info(self, record: Any) -> None:
        hidden = {*PLACES, *(["study"] if len(self.studies) == 1 else [])}
        title = " ".join(str(value) for name, value in record.wildcards.items() if name not in hidden)
        self.running[record.jobid] = Job(record.rule_name, title, list(record.log), time.monotonic())
        if self.failed.pop(record.jobid, None):
            self.jobs[record.rule_name] += 1
            self._tell(f"again: {self.running[record.jobid]}")

    def _job_finished(self, record: Any) -> None:
        job = self.running.pop(record.job_id, None)
        if job is None or job.rule == "all":
            return
        seconds = time.monotonic() - job.since
        self.finished[job.rule].append(seconds)
        resumed = next((line.partition(RESUMED) for log in job.logs for line in lines_of(log) if RESUMED in line), None)
        notes = [span(seconds)] + ([f"went on after {resumed[2]}"] if resumed else [])
        notes += [] if self.terminal.is_terminal or self.done == self.jobs.total() else [self.time_left()]
        self._tell(f"{self.done:{len(str(self.total))}}/{self.total}  {job}  ({'; '.join(notes)})")

    def _job_error(self, record: Any) -> None:
        job = self.running.pop(record.jobid, None)
        if job is None or self.stopped:
            return
        # A cluster's word, such as that it ran out of memory.
        reason = reason_of(job.logs, (record.rule_msg or "").partition("For further error details")[0].strip())
        self.failed[record.jobid] = job, reason
        self.jobs[job.rule] -= 1
        self._tell(f"FAILED  {job}: {reason}", style="red")

    @property
    def done(self) -> int:
        """Jobs that have finished."""
        return sum(map(len, list(self.finished.values())))

    def time_left(self) -> str:
        """Return the time left as text."""
        now = time.monotonic()
        running = [(job.rule, now - job.since) for job in list(self.running.values()) if job.rule != "all"]
        seconds = seconds_left(dict(self.jobs), dict(self.finished), running, now - self.began)
        return "time left not known yet" if seconds is None else f"about {span(seconds)} left"

    def __rich__(self) -> Table:
        """Return the bar, with the jobs that run and how far each is by its log."""
        now, running = time.monotonic(), dict(self.running)
        if now - self.looked > LOOK:
            self.looked = now
            self.percent = {number: progress_of(job.logs[0]) for number, job in running.items() if job.logs}
        names = (f"{job}{self.percent.get(number, '')}" for number, job in running.items())
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for options in ({}, {"no_wrap": True}, {"no_wrap": True, "overflow": "ellipsis", "ratio": 1}):
            grid.add_column(**options)
        text = f"{self.done}/{self.total} jobs  {span(now - self.began)} so far, {self.time_left()}"
        grid.add_row(ProgressBar(max(self.total, 1), self.done, width=20), text, ", ".join(names))
        return grid

    # --- the end --------------------------------------------------------------------------------------------------

    def succeed(self) -> None:
        """Say where the results are; called when all jobs are done."""
        self.live.stop()
        self._tell(f"Done: {self.done} of {self.total} jobs in {span(time.monotonic() - self.began)}.")
        self._tell(*self._places())

    def _places(self) -> list[str]:
        # After the whole study alone: committed results must not pass for those of a run that made others.
        asked = getattr(self.workflow, "dag_settings", None)
        part = asked is None or asked.targets or asked.until or asked.omit_from
        return [] if part else places(self.studies, self.configs)

    def fail(self) -> None:
        """Say which jobs failed, why, and how to go on; called when the run ends early, whoever speaks."""
        self.live.stop()
        self.say("", *account(list(self.failed.values()), self.done, self.total, self.stopped, self.errors))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.live.stop()
        super().close()
