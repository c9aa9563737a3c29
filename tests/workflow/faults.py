"""Faults into a running study (`make faults`): kills, a full disk, damaged and removed files; then the same results.

    python -m tests.workflow.faults                         # the demo, scaled down: some 60 faults in some 20 minutes
    python -m tests.workflow.faults --faults 10 --seed 1 --folder /tmp/faults --output results/faults

A study is run once undisturbed and once with faults. What a refusal says is to be deleted is deleted, as a user would;
then the same command is given again. What is done is drawn under the seed; what runs just then is up to the machine.
"""

from __future__ import annotations

import argparse
import base64
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
import yaml

from tests.data.layouts import make_catalogue
from tests.workflow.running import ENVIRONMENT, ROOT, workplace
from tocom.files import FOLDER_SUMS
from tocom.stages.throughput import device_name
from tocom.study import read_config

#: What holds measured time, so that no two runs agree: curves of trainings, throughput, costs, and tables with them.
MEASURED = re.compile(r"throughput|costs|/(checkpoints|adapted|learned)/.*\.csv$|\.sha256$|SHA256SUMS$")
SUMS = re.compile(r"\.sha256$|^SHA256SUMS$")
#: What a refusal says is to be done.
TOLD = re.compile(r"delete ([^;]+?) and make it again|run `(tocom data fetch [^`]+)`")
#: What a run says that has made all.
ENDED = re.compile(r"^(Done: (\d+) of \2 jobs|Nothing to be done)", re.MULTILINE)
#: Bytes of a file that the full disk still takes.
DISK = 40_000
#: Most runs of the study until it has to be whole.
RUNS = 40


@dataclass
class Fault:
    """One fault: its kind, what it hit, whether anything said so, and whether all was well in the end.

    Attributes:
        left: of a damaged file, its inode: another one at the end, and it was made again. unread: before it was read.
    """

    kind: str
    hit: str
    noticed: bool = False
    recovered: bool = False
    left: int = 0
    unread: bool = False


@dataclass
class Driver:
    """A study in a folder of its own, and what is done to it.

    Attributes:
        wanted: what was deleted, as targets: Snakemake makes no checkpoint again from which all is made already.
    """

    folder: Path
    config: Path
    environment: dict[str, str]
    random: random.Random
    faults: list[Fault] = field(default_factory=list)
    orphans: list[psutil.Process] = field(default_factory=list)
    log: Callable[[str], None] = print
    wanted: dict[str, None] = field(default_factory=dict)
    runs: int = 0
    cores: int = 2

    @property
    def results(self) -> Path:
        """The folder of the study."""
        return self.folder / "results" / read_config(self.config)["study"]

    # --- runs ---------------------------------------------------------------------------------------------------

    def start(self, *words: str, limit: int | None = None) -> subprocess.Popen:
        """Start Snakemake as the leader of a group of its own, with at most ``limit`` bytes a file."""

        def limited():
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        options = ["--cores", str(self.cores), "--configfile", str(self.config)]
        command = [sys.executable, "-m", "snakemake", *options, *words]
        self.runs += 1
        with self.printed().open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=ENVIRONMENT | self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=limited,
            )

    def printed(self) -> Path:
        """Return what the last run prints to: a file of its own, of which a full disk takes the start."""
        return self.folder / f"run-{self.runs}.log"

    def run(
        self, disturb: Callable[[subprocess.Popen], None] | None = None, limit: int | None = None
    ) -> tuple[int, str]:
        """Run the study, disturbed or not; return its exit status and what it printed."""
        if (self.folder / ".snakemake" / "locks").is_dir() and any((self.folder / ".snakemake" / "locks").iterdir()):
            self.start("--unlock").wait()
        process = self.start("--", "all", *self.wanted, limit=limit)
        if disturb is not None:
            disturb(process)
        try:
            status = process.wait(timeout=1200)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return status, self.printed().read_text(errors="replace")

    def heal(self, printed: str) -> bool:
        """Do what refusals say: delete a file or folder, or fetch data again; note which faults they are about.

        Returns:
            Whether they said anything.
        """
        told = [match.groups() for match in TOLD.finditer(printed)]
        for command in dict.fromkeys(command for _, command in told if command):
            subprocess.run(command.split(), cwd=self.folder, env=ENVIRONMENT | self.environment, check=True)
        for path in dict.fromkeys(path for paths, _ in told for path in (paths or "").split()):
            named = self.folder / path
            for fault in self.faults:
                hit = self.folder / fault.hit
                is_told = hit == named or hit in named.parent.glob(named.name)
                if named in hit.parents:  # it may go with its folder for the sake of another file
                    is_told = fault.hit in printed
                fault.noticed |= is_told and fault.kind in DAMAGES
            for there in list(named.parent.glob(named.name)):
                shutil.rmtree(there) if there.is_dir() else there.unlink()
                if not SUMS.search(there.name):
                    self.wanted[there.relative_to(self.folder).as_posix()] = None
        return bool(told)

    def finish(self) -> None:
        """Run the study to its end, and trace it, until neither finds anything wrong.

        Raises:
            RuntimeError: it does not get there.
        """
        vain = 0
        for _ in range(RUNS):
            status, printed = self.run()
            vain = vain + 1 if status and not self.heal(printed) else 0
            if status and vain < 3:  # what an orphan was writing to may fail once
                continue
            if status:
                break
            gone_children(self.orphans)
            traced = subprocess.run(
                ["tocom", "trace", self.results.relative_to(self.folder)],
                cwd=self.folder,
                env=ENVIRONMENT | self.environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if not traced.returncode:
                return
            self.heal(traced.stderr)
        raise RuntimeError(f"{self.folder} is not whole after {self.runs} runs; the last one:\n{printed[-3000:]}")

    # --- faults while it runs -----------------------------------------------------------------------------------

    def kill_jobs(self, number: int, among: set[str] = frozenset()) -> None:
        """Kill up to ``number`` jobs, one after the other, those of stages that were spared so far first.

        Args:
            among: the stages that may be hit; empty: all.
        """

        def disturb(process: subprocess.Popen) -> None:
            left, dead = number, set[int]()
            while left and process.poll() is None:
                before = Counter(fault.hit for fault in self.faults if fault.kind == "job killed")
                now = [(before[stage], self.random.random(), stage, job) for stage, job in running(process.pid)]
                now = [item for item in now if item[3].pid not in dead and (not among or item[2] in among)]
                if now and self.random.random() < 0.5:
                    *_, stage, job = min(now, key=lambda item: item[:2])
                    time.sleep(self.random.uniform(0, 1 if among else 3))
                    if signalled(job, signal.SIGKILL):
                        self.faults.append(Fault("job killed", stage))
                        dead.add(job.pid)
                        left -= 1
                time.sleep(0.2)

        before = len(self.faults)
        status, printed = self.run(disturb)
        for fault in self.faults[before:]:
            fault.noticed = status != 0
        self.heal(printed)

    def stop_snakemake(self, kind: str) -> None:
        """Interrupt or kill Snakemake, with its jobs or (what stays of them goes on) alone."""

        def disturb(process: subprocess.Popen) -> None:
            deadline = time.monotonic() + self.random.uniform(4, 12)
            while process.poll() is None and (time.monotonic() < deadline or not running(process.pid)):
                time.sleep(0.2)
            if process.poll() is not None:
                return
            self.faults.append(Fault(kind, "snakemake"))
            if kind == "Snakemake interrupted":
                os.killpg(process.pid, signal.SIGINT)
            elif kind == "Snakemake killed with its jobs":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                self.orphans += [job for _, job in running(process.pid)]
                process.kill()

        before = len(self.faults)
        status, printed = self.run(disturb)
        for fault in self.faults[before:]:
            fault.noticed = status != 0
        if not status and ENDED.search(printed):  # the signal came when all was done
            del self.faults[before:]
        self.heal(printed)

    def fill_disk(self) -> None:
        """Run on a disk that takes only small files."""
        status, printed = self.run(limit=DISK)
        full = "free some space" in printed
        if full or (status and not TOLD.search(printed)):
            self.faults.append(Fault("disk full", "a job", noticed=full))
        self.heal(printed)

    # --- faults in files ----------------------------------------------------------------------------------------

    def finished(self) -> list[Path]:
        """Return a file that finished jobs have left of every kind: by the folder that it is in, and its ending."""
        kinds: dict[str, list[Path]] = {}
        unfinished = self.unfinished()
        for path in artifacts(self.results):
            if not unfinished & {path, *path.parents}:
                place = path.relative_to(self.results)
                kinds.setdefault(f"{place.parts[0] if len(place.parts) > 1 else ''}{path.suffix}", []).append(path)
        hit = {self.folder / fault.hit for fault in self.faults if fault.kind in DAMAGES and not fault.noticed}
        return [path for path in map(self.random.choice, kinds.values()) if path not in hit]

    def unfinished(self) -> set[Path]:
        """Return the outputs that Snakemake knows a stopped run has not finished, and will make again."""
        marks = (self.folder / ".snakemake" / "incomplete").rglob("*")
        names = (base64.b64decode(mark.name + "==", altchars=b"_-") for mark in marks if mark.is_file())
        return {self.folder / name.decode(errors="replace") for name in names}

    def damage(self, kind: str, among: str = "") -> None:
        """Truncate, change or remove a finished file, of all or of those whose place matches ``among``."""
        there = [path for path in self.finished() if re.match(among, path.relative_to(self.results).as_posix())]
        if kind == "file removed":  # without its list of sums a file is one of another program: read, but not checked
            there = [path for path in there if not SUMS.search(path.name)]
        if not there:
            return
        path = self.random.choice(there)
        data, clock = bytearray(path.read_bytes()), path.stat()
        if kind == "file removed":
            path.unlink()
            if not (path.parent / FOLDER_SUMS).exists():  # else what reads the folder is to notice
                self.wanted[path.relative_to(self.folder).as_posix()] = None
        else:
            place = self.random.randrange(max(1, len(data)))
            changed = data[:place] if kind == "file truncated" else data
            if kind == "byte flipped" and data:
                changed[place] ^= 1 << self.random.randrange(8)
            path.write_bytes(changed)
            if kind == "byte flipped":  # as a disk does it, of which Snakemake learns nothing
                os.utime(path, ns=(clock.st_atime_ns, clock.st_mtime_ns))
        left = path.stat().st_ino if path.exists() else 0
        self.faults.append(Fault(kind, path.relative_to(self.folder).as_posix(), left=left))

    # --- all of it ----------------------------------------------------------------------------------------------

    def disturb(self, number: int) -> None:
        """Inject ``number`` faults or a few more: a round of each kind again and again, in an order that is drawn."""
        self.kill_jobs(3, EARLY)
        while len(self.faults) < number:
            steps = [
                lambda: self.kill_jobs(3),
                lambda: self.kill_jobs(3),
                lambda: self.stop_snakemake("Snakemake interrupted"),
                lambda: self.stop_snakemake("Snakemake killed with its jobs"),
                lambda: self.stop_snakemake("Snakemake killed alone"),
                self.fill_disk,
            ]
            self.random.shuffle(steps)
            for step in steps:
                step()
                for kind in self.random.sample(DAMAGES, 2):
                    self.damage(kind)
                self.log(f"{len(self.faults)} faults so far")
            self.finish()
            for path in self.results.glob("*.csv"):
                path.unlink()
            for _ in range(2):
                self.kill_jobs(4, LATE)
            self.finish()
            self.forget()  # so that trainings and evaluations are hit again, too

    def forget(self) -> None:
        """Remove what was made after the trainings, and one folder of checkpoints: jobs of all kinds are left."""
        for name in ("predictions", "transfer", "adapted"):
            shutil.rmtree(self.results / name, ignore_errors=True)
        folders = sorted({path.parent for path in (self.results / "checkpoints").rglob("*.safetensors")})
        shutil.rmtree(self.random.choice(folders))

    def judge(self, undisturbed: Path) -> list[str]:
        """Say of every fault whether it was recovered from; return the files that differ from an undisturbed run's."""
        wrong = differing(undisturbed, self.results)
        for fault in self.faults:
            hit = self.folder / fault.hit
            if fault.kind in DAMAGES:
                fault.recovered = hit.is_file() and hit.relative_to(self.results).as_posix() not in wrong
                if fault.kind == "file removed":
                    fault.noticed |= fault.recovered
                fault.unread = not fault.noticed and fault.recovered and hit.stat().st_ino != fault.left
            else:
                fault.recovered = not wrong
        return wrong


#: Stages that few jobs are of: at the start (download, write), and at the end (aggregation).
EARLY = {"fetch", "prepare", "study"}
LATE = {"cells", "compare", "concat", "costs", "tables", "figures", "throughput"}
#: What is done to files.
DAMAGES = ["byte flipped", "file truncated", "file removed"]


def running(pid: int) -> list[tuple[str, psutil.Process]]:
    """Return the stage and the process of the jobs that run below a process."""
    found = []
    try:
        for process in psutil.Process(pid).children(recursive=True):
            words = process.cmdline()
            names = [Path(word).name for word in words[:3]]
            if "tocom" in names:
                rest = words[names.index("tocom") + 1 :]
                found.append((rest[1] if rest[0] in ("analyse", "data") else rest[0], process))
    except (psutil.Error, IndexError):
        pass
    return found


def signalled(process: psutil.Process, number: int) -> bool:
    """Send a signal to a process that may be gone; return whether it was there."""
    try:
        process.send_signal(number)
    except psutil.Error:
        return False
    return True


def gone_children(processes: list[psutil.Process]) -> None:
    """Wait until processes that outlived their parent have ended."""
    psutil.wait_procs(processes, timeout=600)
    processes.clear()


def artifacts(results: Path) -> list[Path]:
    """Return all files that the jobs of a study have left, but logs and the like."""
    apart = (results / "logs", results / "benchmarks")
    every = (path for path in sorted(results.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return [path for path in every if not {*apart} & {*path.parents}]


def compared(results: Path) -> list[str]:
    """Return the files of a study, relative to its folder, that hold no measured time."""
    places = (path.relative_to(results).as_posix() for path in artifacts(results))
    return [place for place in places if not MEASURED.search(f"/{place}")]


def differing(undisturbed: Path, disturbed: Path) -> list[str]:
    """Return the files that are not byte for byte the same, or in one of the two folders alone."""
    every = {*compared(undisturbed), *compared(disturbed)}
    both = ((undisturbed / name, disturbed / name) for name in sorted(every))
    return [
        one.relative_to(undisturbed).as_posix()
        for one, other in both
        if not (one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes())
    ]


def table(faults: list[Fault]) -> str:
    """Return faults by kind as Markdown: how many were injected, noticed and recovered from."""
    rows = ["| fault | injected | noticed | made again unread | recovered |", "| --- | --- | --- | --- | --- |"]

    def row(name: str, those: list[Fault]) -> str:
        counts = (sum(getattr(fault, what) for fault in those) for what in ("noticed", "unread", "recovered"))
        return f"| {name} | {' | '.join(map(str, (len(those), *counts)))} |"

    for kind in dict.fromkeys(fault.kind for fault in sorted(faults, key=lambda fault: fault.kind)):
        rows.append(row(kind, [fault for fault in faults if fault.kind == kind]))
    rows.append(row("all", faults))
    killed = Counter(fault.hit for fault in faults if fault.kind == "job killed")
    rows += ["", "Jobs killed, by stage: " + ", ".join(f"{stage} {n}" for stage, n in sorted(killed.items())) + "."]
    hit = Counter(re.sub(r"results/\w+/", "", f.hit).split("/")[0] for f in faults if f.kind in DAMAGES)
    return "\n".join([*rows, "Files hit: " + ", ".join(f"{place} {n}" for place, n in sorted(hit.items())) + "."])


def scaled_demo(folder: Path) -> tuple[Path, dict[str, str]]:
    """Write the demo with almost no data, one of its tasks a download from this machine; return config, environment."""
    config = read_config(ROOT / "config" / "demo.yaml")
    config |= {"tasks": ["digits", "cifar100"], "seeds": [0, 1], "infer_degrees": [0, 14], "checkpoints_per_job": 2}
    config["data"] = {"root": "data", "train": 64, "val": 12, "test": 60}
    config["learn"] |= {"images": 128, "epochs": 2, "held_out": 64}
    config["finetune"] |= {"epochs": 3, "batch_size": 8}
    config["throughput"] |= {"batch_size": 8, "repeats": 5}
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    mirror = folder / "mirror"
    mirror.mkdir()
    catalogue = make_catalogue(mirror, mirror.as_uri(), ("cifar100",))
    return path, {"TOCOM_CATALOGUE": str(catalogue)}


def main() -> None:
    """Run the study twice, and print what came of the faults; exit status 1 if one was not noticed or recovered."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder, removed at the end")
    parser.add_argument("--output", type=Path, help="folder to write faults.md to")
    given, began = parser.parse_args(), time.monotonic()
    work = Path(given.folder or tempfile.mkdtemp(prefix="tocom-faults."))
    work.mkdir(parents=True, exist_ok=True)
    config, environment = scaled_demo(work)
    drivers = {}
    for name in ("undisturbed", "disturbed"):
        (work / name).mkdir()
        drivers[name] = Driver(workplace(work / name), config, environment, random.Random(given.seed))
    drivers["undisturbed"].finish()
    print(f"undisturbed run: {time.monotonic() - began:.0f} s", flush=True)
    driver = drivers["disturbed"]
    driver.disturb(given.faults)
    driver.finish()
    wrong = driver.judge(drivers["undisturbed"].results)
    files = len(compared(driver.results))
    minutes = (time.monotonic() - began) / 60
    text = (
        f"# Faults\n\n{table(driver.faults)}\n\n"
        f"{files - len(wrong)} of {files} files are byte for byte those of the undisturbed run: cells, statistics,"
        " tables, figures, predictions, checkpoints, learned and adapted parts, prepared data. Left out is what holds"
        " measured time: curves of trainings, throughput, costs, their tables.\n\n"
        f"`make faults`, seed {given.seed}: {minutes:.0f} minutes on {os.cpu_count()} cores of"
        f" {device_name(torch.device('cpu')).partition(',')[0]}; Python {platform.python_version()}.\n"
    )
    print(text)
    missed = [fault for fault in driver.faults if not (fault.recovered and (fault.noticed or fault.unread))]
    for fault in missed:
        print(f"MISSED {fault}")
    for name in wrong:
        print(f"DIFFERENT {name}")
    if given.output is not None:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "faults.md").write_text(text)
    if given.folder is None:
        shutil.rmtree(work)
    sys.exit(bool(wrong or missed))


if __name__ == "__main__":
    main()
