"""What a person sees of a run: lines, bar, time left, the end; what a resumed training says; a recording as text."""

import io
import logging
import re
import runpy
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console as Terminal
from snakemake_interface_logger_plugins.common import LogEvent

from tests.test_training import SETTINGS, run
from tests.workflow.running import ROOT, TINY, snakemake, workplace
from tocom import training
from tocom.console import (
    GO_ON,
    Console,
    lines_of,
    places,
    progress_of,
    reason_of,
    seconds_left,
    span,
)

ERROR = "tocom: error: p5.png is not a readable image; remove or replace it"
BAR = "pets:  45%|████▌     | 45/100 [00:10<00:12,  4.40it/s]"


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("log", "of_cluster", "reason"),
    [
        (f"\rpets:   0%|  | 0/2\r{BAR}\n{ERROR}\nSIGTERM sent\n", "failed", ERROR),
        ("Traceback (most recent call last):\n  File x\nRuntimeError: it broke\n", "", "RuntimeError: it broke"),
        ("starts\n" + BAR, "", f"it was killed, or ended without an error; the last of its log: {BAR}"),
        (BAR, "OUT_OF_MEMORY", "OUT_OF_MEMORY"),
        ("", "", "it ended before it wrote a log"),
    ],
)
def test_a_failed_job_has_a_reason_of_one_line(tmp_path, log, of_cluster, reason):
    assert reason_of([write(tmp_path / "log", log), str(tmp_path / "none")], of_cluster) == reason


def test_a_bar_in_a_log_is_its_last_repaint(tmp_path):
    log = write(tmp_path / "log", f"a line\n\r\rpets:   0%|          | 0/100 [00:00<?, ?it/s]\r{BAR}")
    assert progress_of(log) == " 45% (00:12 left)"
    assert lines_of(log)[-1] == BAR
    assert progress_of(write(tmp_path / "log", "no bar")) == progress_of(str(tmp_path / "none")) == ""


def test_time_left_is_what_the_others_of_the_rule_took_shared_by_as_many_as_ran_at_a_time():
    jobs = {"prepare": 2, "finetune": 4, "tables": 1}
    assert seconds_left(jobs, {}, [("prepare", 1.0)], 1.0) is None
    assert seconds_left(jobs, {"tables": [1.0]}, [], 1.0) is None  # one job of its kind says nothing of the rest
    finished = {"prepare": [2.0, 2.0], "finetune": [20.0, 20.0]}
    running = [("finetune", 5.0), ("finetune", 5.0)]
    # 2 x 20 s of fine-tuning, 5 s of each done; tables as long as the mean, 11 s; 54 job seconds in 27
    assert seconds_left(jobs, finished, running, 27.0) == pytest.approx((2 * 20 - 10 + 11) / 2)
    assert seconds_left({"one": 1}, {"one": [3.0]}, [], 3.0) == 0
    assert seconds_left({"one": 2}, {"one": [3.0]}, [("one", 9.0)], 12.0) > 0  # longer than expected


def test_durations_are_short():
    assert [span(s) for s in (5.4, 99, 600, 9000, 200_000)] == ["5 s", "99 s", "10 min", "2.5 h", "2.3 days"]


# --- records of Snakemake's -------------------------------------------------------------------------------------------


class Own(logging.Handler):
    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record.getMessage())


def screen(tty=False, **settings):
    """Return a console, its Snakemake handler and what it prints, as a function."""
    off = dict.fromkeys(("stdout", "nocolor", "dryrun", "quiet", "verbose", "debug_dag", "printshellcmds"), False)
    own, stream = Own(), io.StringIO()
    terminal = Terminal(file=stream, width=200, force_terminal=tty, highlight=False, no_color=True)
    return Console(own, SimpleNamespace(**off | settings), terminal), own, stream.getvalue


def send(console, event=None, text="", level=logging.INFO, **fields):
    record = logging.LogRecord("snakemake", level, "", 0, text, None, None)
    vars(record).update(fields | ({"event": event} if event else {}))
    console.handle(record)


def started(console, **stats):
    send(console, LogEvent.WORKFLOW_STARTED)
    send(console, LogEvent.RUN_INFO, stats=stats | {"all": 1, "total": sum(stats.values()) + 1})


def begin(console, number, rule, log="", **wildcards):
    send(console, LogEvent.JOB_INFO, jobid=number, rule_name=rule, log=[log], wildcards=wildcards)


def test_a_run_is_a_line_a_job_and_an_error_is_said_where_it_happens_and_at_the_end(tmp_path):
    console, own, printed = screen()
    console.studies = {"tiny": tmp_path}
    started(console, prepare=2)
    log = write(tmp_path / "pets.log", f"{BAR}\n{ERROR}\n")
    begin(console, 1, "prepare", study="tiny", task="digits")
    begin(console, 2, "prepare", log, study="tiny", task="pets")
    send(console, LogEvent.SHELLCMD, shellcmd="tocom prepare --forty-options")
    send(console, text="RuleException:\nCalledProcessError in file x", level=logging.ERROR)
    send(console, LogEvent.JOB_FINISHED, job_id=1)
    send(console, LogEvent.JOB_ERROR, jobid=2, rule_msg=None)
    send(console, text="Exiting because a job execution failed. Look above for error messages", level=logging.ERROR)
    console.fail()
    lines = printed().splitlines()
    assert lines[:3] == [
        "To do (2): 2 prepare",
        "1/2  prepare digits  (0 s; about 0 s left)",
        f"FAILED  prepare pets: {ERROR}",
    ]
    assert lines[3:7] == ["", "Not finished: 1 of 2 jobs are done, 1 failed.", "", "prepare pets"]
    assert lines[7:] == [f"  {ERROR}", f"  log: {log}", "", GO_ON]
    assert own.records == []


def test_a_job_that_is_tried_again_and_succeeds_is_no_failure():
    console, _, printed = screen()
    started(console, learn=1)
    begin(console, 1, "learn", part="x", store="results/a")
    send(console, LogEvent.JOB_ERROR, jobid=1, rule_msg="TIMEOUT. For further error details see the cluster log")
    begin(console, 1, "learn", part="x", store="results/a")
    send(console, LogEvent.JOB_FINISHED, job_id=1)
    lines = printed().splitlines()
    assert lines[1:3] == ["FAILED  learn x: TIMEOUT.", "again: learn x"]
    assert console.failed == {}
    assert console.done == console.total == 1


def test_a_run_ends_with_the_places_only_if_it_made_the_whole_study(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "main.md").write_text("")
    for targets in ((), ("results/a.csv",)):
        console, _, printed = screen()
        console.studies = {"tiny": tmp_path}
        console.workflow = SimpleNamespace(dag_settings=SimpleNamespace(targets=targets, until=(), omit_from=()))
        started(console, tables=1)
        begin(console, 1, "tables", study="tiny")
        send(console, LogEvent.JOB_FINISHED, job_id=1)
        console.succeed()
        assert "Done: 1 of 1 jobs in 0 s." in printed()
        assert (f"tiny: main table: {tmp_path}/tables/main.md\n" in printed()) == (not targets)
    page = f"All of it as one page: snakemake --configfile a.yaml --report {tmp_path}/report.html"
    assert places({"a": tmp_path}, ["a.yaml"])[-1] == page
    assert "--report results/report.html" in places({"a": tmp_path, "b": tmp_path / "b"})[-1]
    assert places({"b": tmp_path / "b"}) == []


def test_ctrl_c_says_how_to_go_on_and_blames_no_job(tmp_path):
    console, _, printed = screen()
    started(console, learn=1)
    begin(console, 1, "learn", part="x")
    send(console, text="Terminating processes on user request, this might take some time.")
    send(console, LogEvent.JOB_ERROR, jobid=1, rule_msg=None)
    console.fail()
    assert printed().splitlines()[1:] == ["Stopping ...", "", "Stopped: 0 of 1 jobs are done, 0 failed.", "", GO_ON]


@pytest.mark.parametrize("settings", [{"dryrun": True}, {"quiet": {"all"}}, {"verbose": True}])
def test_snakemake_speaks_where_it_is_told_how(settings):
    console, own, printed = screen(**settings)
    started(console, learn=1)
    send(console, text="Building DAG")
    assert printed() == ""
    assert own.records[-1] == "Building DAG"


def test_a_mistake_in_a_config_is_our_one_line_whoever_speaks():
    console, own, printed = screen(dryrun=True)
    text = 'WorkflowError in file "/x/rules/common.smk", line 2:\nstudy \'a\': no task\n  File "/x", line 2, in f'
    send(console, LogEvent.ERROR, text, logging.ERROR)
    assert printed() == "tocom: error: study 'a': no task\n"
    assert own.records == []


def test_a_terminal_has_a_bar_with_the_jobs_that_run_and_the_time_left(tmp_path):
    console, _, printed = screen(tty=True)
    try:
        started(console, finetune=3)
        begin(console, 1, "finetune", task="pets")
        send(console, LogEvent.JOB_FINISHED, job_id=1)
        begin(console, 2, "finetune", write(tmp_path / "log", BAR), task="digits")
        console.looked = 0.0
        console.live.refresh()
        assert "1/3  finetune pets  (0 s)" in printed()
        assert re.search(r"1/3 jobs  0 s so far, about 0 s left +finetune digits 45% \(00:12 left\)", printed())
    finally:
        console.close()


# --- a resumed training -----------------------------------------------------------------------------------------------


def test_a_resumed_training_says_from_where_and_its_rate_is_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    bars, real = [], training.tqdm
    monkeypatch.setattr(training, "tqdm", lambda *words, **options: bars.append(real(*words, **options)) or bars[-1])
    with pytest.raises(KeyboardInterrupt):
        run(SETTINGS, tmp_path / "state", 7)
    assert "goes on after" not in capsys.readouterr().err
    run(SETTINGS, tmp_path / "state")
    said = re.search(r"^test goes on after epoch 1 of 3 and 2 of 5 steps, saved (.*)$", capsys.readouterr().err, re.M)
    assert abs(time.mktime(time.strptime(said[1], "%Y-%m-%d %H:%M:%S")) - time.time()) < 60
    assert (bars[-1].initial, bars[-1].n, bars[-1].total) == (7, 15, 15)


# --- a recording ------------------------------------------------------------------------------------------------------


def test_a_recording_shows_lines_once_the_bar_half_way_and_no_more_than_it_may():
    seen = runpy.run_path(str(ROOT / "scripts" / "console.py"))["seen"]
    bar = "━━━━━━━━━━  {n}/40 jobs"
    raw = "To do (40): 40 finetune\r\n\x1b[?25l"
    raw += "".join(
        f"{bar.format(n=n)}\r\x1b[2K{bar.format(n=n)}\r\x1b[2K{n + 1}/40 \x1b[32mpets\x1b[0m\r\n" for n in range(40)
    )
    raw += f"{bar.format(n=40)}\r\n\x1b[?25h\r\x1b[1A\x1b[2KDone\r\n"
    lines = seen(raw, 100)
    assert [line for line in lines if line.endswith("pets")] == [f"{n + 1}/40 pets" for n in range(40)]
    assert (lines[0], lines[-1]) == ("To do (40): 40 finetune", "Done")
    assert len([line for line in lines if line.startswith("━")]) == 1
    short = seen(raw, 20)
    assert len(short) <= 20
    assert (short[0], short[-1]) == (lines[0], "Done")
    assert any(re.fullmatch(r"\[\.\.\. \d+ more lines \.\.\.\]", line) for line in short)


@pytest.mark.dag
def test_the_last_lines_of_a_real_run_with_a_mistake_are_the_job_its_reason_its_log_and_how_to_go_on(tmp_path):
    workplace(tmp_path)
    (tmp_path / "pets").mkdir()
    for number in range(6):
        (tmp_path / "pets" / f"{number}.png").write_bytes(b"no image %d" % number)
    rows = [f"pets/{n}.png,{'ab'[n % 2]},{('train', 'val', 'test')[n // 2]}" for n in range(6)]
    (tmp_path / "pets.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")
    config = TINY.read_text().replace("tasks: [digits, rotation]", "tasks: [digits, {name: pets, csv: pets.csv}]")
    (tmp_path / "mine.yaml").write_text(config)
    result = snakemake(tmp_path, "--configfile", "mine.yaml", "--until", "prepare")
    assert result.returncode == 1
    lines = result.stderr.rstrip().splitlines()
    assert lines[-7:-4] == ["Not finished: 1 of 2 jobs are done, 1 failed.", "", "prepare pets"]
    assert re.fullmatch(r"  tocom: error: pets/\d.png is not a readable image .*; remove or replace it", lines[-4])
    assert lines[-3:] == ["  log: results/tiny/logs/prepare/pets.log", "", GO_ON]
    assert any(re.match(r"1/2  prepare digits  \(\d+ s", line) for line in lines)
    assert len(lines) < 20
    assert "--output" not in result.stderr
    assert "tocom prepare" in "".join(path.read_text() for path in Path(tmp_path, ".snakemake", "log").iterdir())
