"""Profiles: real options, each explained, that plan the small study; and the scripts and mechanisms behind them."""

import json
import os
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import yaml

from tests.workflow.running import ENVIRONMENT, ROOT, TINY, jobs, planned, workplace

PROFILES = sorted(path.name for path in (ROOT / "profiles").iterdir())
SCRIPTS = sorted((ROOT / "scripts").rglob("*.sh"))
#: An entry, in use or commented out. Comments that are sentences begin with a capital or are indented.
ENTRY = re.compile(r"^(# )?([a-z][a-z0-9-]*):")


def lines_of(profile):
    return (ROOT / "profiles" / profile / "config.yaml").read_text().splitlines()


def with_profile(folder, name, *words, **environment):
    """Run Snakemake with a profile and nothing that overrides it; return what it printed, or fail."""
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", f"profiles/{name}", *map(str, words)]
    result = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


#: Copies its last argument but one to its last.
RSYNC = """#!/bin/sh
while [ $# -gt 2 ]; do shift; done
exec cp -RLp "$1" "$2"
"""


def program(folder, name, text):
    """Write a program that stands in for a real one; return the environment in which it is found first."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{ENVIRONMENT['PATH']}"}


def storage(folder):
    """Return options, and an environment, for a storage that is a folder, in place of one on the network."""
    pytest.importorskip("snakemake_storage_plugin_fs")
    options = "--default-storage-provider", "fs", "--default-storage-prefix", folder / "storage"
    return options, program(folder / "bin", "rsync", RSYNC)  # the folder storage copies with rsync


def test_there_is_a_profile_for_each_kind_of_machine():
    assert PROFILES == ["default", "kubernetes", "slurm", "workstation"]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_entry_of_a_profile_is_explained_in_the_line_above(profile):
    lines = lines_of(profile)
    entries = [number for number, line in enumerate(lines) if ENTRY.match(line)]
    assert len(entries) >= len(yaml.safe_load("\n".join(lines))) > 3
    for number in entries:
        above = lines[number - 1]
        assert re.match(r"# .*[\w)][.:]?$", above), f"{profile}: {lines[number]}"
        assert not ENTRY.match(above), f"{profile}: {lines[number]}"


@pytest.mark.parametrize("profile", PROFILES)
def test_every_entry_of_a_profile_is_an_option_of_snakemake_or_its_plugins(profile):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    pytest.importorskip("snakemake_executor_plugin_kubernetes")
    from snakemake.cli import get_argument_parser

    known = {word.removeprefix("--") for action in get_argument_parser()._actions for word in action.option_strings}
    named = {match[2] for line in lines_of(profile) if (match := ENTRY.match(line))}
    assert {name for name in named - known if not name.startswith("storage-s3-")} == set()


def resources(printed, rule):
    """Return the resources that a dry run prints for the first job of a rule."""
    return re.search(rf"^rule {rule}:\n(?:    .*\n)*?    resources: (.*)$", printed, re.MULTILINE)[1].split(", ")


@pytest.mark.dag
@pytest.mark.parametrize("profile", ["slurm", "workstation"])
def test_the_small_study_is_planned_alike_with_every_profile(profile, tmp_path):
    if profile == "slurm":
        pytest.importorskip("snakemake_executor_plugin_slurm")
    folder = workplace(tmp_path)
    printed = with_profile(folder, profile, "--configfile", TINY, "--dry-run")
    assert jobs(printed) == planned(folder, "--configfile", TINY)
    assert jobs(printed)["total"] > 10
    if profile == "slurm":
        for rule in ("prepare", "learn", "throughput"):
            assert "slurm_partition=PARTITION" in resources(printed, rule)
        assert "slurm_extra=--exclusive" in resources(printed, "throughput")
        assert "slurm_extra=--exclusive" not in resources(printed, "learn")


@pytest.mark.slow
def test_with_kubernetes_every_path_of_a_command_is_one_that_storage_fills(tmp_path):
    pytest.importorskip("snakemake_executor_plugin_kubernetes")
    folder = workplace(tmp_path)
    options, environment = storage(tmp_path)
    words = ["--configfile", TINY, "--dry-run", "--printshellcmds", *options]
    printed = with_profile(folder, "kubernetes", *words, **environment)
    commands = re.findall(r"^Shell command: (tocom .*)$", printed, re.MULTILINE)
    assert len(commands) == jobs(printed)["total"] - 1  # `all` has none
    copies = f".snakemake/storage/fs{tmp_path}/storage/"
    for command in commands:
        assert f"{copies}results/tiny" in command
        assert "results/tiny" not in command.replace(copies + "results/tiny", ""), command


@pytest.fixture
def kubernetes(tmp_path):
    """Stand in for a cluster's API: remember what is asked for, and say of every job that it failed."""
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def answer(self, body, code=200):
            text = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_POST(self):  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body))
            self.answer(body, 201)

        def do_GET(self):  # noqa: N802
            self.answer({"items": []} if "pods" in self.path else {"status": {"failed": 1}})

        def do_DELETE(self):  # noqa: N802
            self.answer({})

        def log_message(self, *words):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "kubeconfig").write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
                "users": [{"name": "u", "user": {}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
        )
    )
    yield asked
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_kubernetes_is_asked_for_a_pod_whose_gpus_are_limits_too(kubernetes, tmp_path):
    pytest.importorskip("snakemake_executor_plugin_kubernetes")
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    (tmp_path / "Snakefile").write_text(
        'rule one:\n    output: "one"\n    threads: 4\n'
        '    resources: gpu=2, mem_mb=3000, runtime=10\n    shell: "touch {output}"\n'
    )
    options, environment = storage(tmp_path)
    words = ["--workflow-profile", "profiles/kubernetes", "--retries", "0", "--latency-wait", "1", *options]
    result = subprocess.run(
        [sys.executable, "-m", "snakemake", *map(str, words)],
        cwd=tmp_path,
        env=ENVIRONMENT | environment | {"KUBECONFIG": str(tmp_path / "kubeconfig")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode != 0  # the stand-in runs nothing
    made = [body for path, body in kubernetes if path.endswith("/namespaces/default/jobs")]
    assert len(made) == 1, result.stdout + result.stderr
    (container,) = made[0]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "REGISTRY/tocom:latest"
    wanted, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert wanted["nvidia.com/gpu"] == limits["nvidia.com/gpu"] == "2"
    assert wanted["memory"] == limits["memory"] == "3000M"
    assert wanted["cpu"] == "3800m"  # 4 threads, of which the node keeps 5 %


@pytest.mark.dag
def test_on_a_workstation_jobs_at_the_same_time_have_different_gpus(tmp_path):
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    (tmp_path / "locks").mkdir()
    work = (
        "import os, sys, time; from tocom.gpus import claim; claim(); begin = time.time(); time.sleep(2);"
        "print(os.environ['CUDA_VISIBLE_DEVICES'], begin, time.time(), file=open(sys.argv[1], 'w'))"
    )
    (tmp_path / "Snakefile").write_text(
        'rule all:\n    input: expand("{n}", n=range(4))\n'
        'rule one:\n    output: "{n}"\n    resources: gpu=1\n'
        f"    shell: {f'{sys.executable} -c {chr(34)}{work}{chr(34)} {{output}}'!r}\n"
    )
    environment = program(tmp_path / "bin", "nvidia-smi", "#!/bin/sh\necho GPU-a\necho GPU-b\n")
    environment |= {"TMPDIR": str(tmp_path / "locks"), "PYTHONPATH": str(ROOT)}
    with_profile(tmp_path, "workstation", "--cores", 4, "--resources", "gpu=2", "mem_mb=1000", **environment)
    runs = [(tmp_path / str(number)).read_text().split() for number in range(4)]
    assert {gpu for gpu, *_ in runs} == {"GPU-a", "GPU-b"}
    for gpu in ("GPU-a", "GPU-b"):
        times = sorted((float(begin), float(end)) for name, begin, end in runs if name == gpu)
        assert all(end <= begin for (_, end), (begin, _) in zip(times, times[1:], strict=False))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        result = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout


def test_the_slurm_script_says_in_one_line_what_it_misses_and_leaves_nothing(tmp_path):
    project, temporary = tmp_path / "project", tmp_path / "temporary"
    shutil.copytree(ROOT / "scripts", project / "scripts")
    temporary.mkdir()
    result = subprocess.run(
        ["bash", project / "scripts" / "slurm.sh"],
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert re.fullmatch(r"slurm.sh: error: .* is missing; .*\n|slurm.sh: error: .* not on PATH; .*\n", result.stderr)
    assert list(temporary.iterdir()) == []
