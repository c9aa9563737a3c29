"""What made a file is kept beside it and checked: lists of sums, code, jobs, and what must not be mixed."""

import shutil
import subprocess
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.small import refusal, teach, tune
from tocom import made as module
from tocom.analysis.cells import check_config, gather
from tocom.errors import TocomError
from tocom.files import checkpoint_files, load_arrays, load_metadata, recorded_sums, save_arrays, sha256
from tocom.jobs import EvaluateJob, Plan
from tocom.made import check, check_together, code, difference, how, job_hash, made, seal
from tocom.parts import make_part
from tocom.stages.evaluate import evaluate
from tocom.study import parse_study
from tocom.trace import trace

# --- lists of sums --------------------------------------------------------------------------------------------------


def test_inputs_elsewhere_that_are_named_like_the_output_or_each_other_keep_records_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    places = [tmp_path / name / "cells.csv" for name in ("a", "b", "out")]
    for place in places:
        place.parent.mkdir()
        place.write_text(f"a\n{place.parent.name}\n")
    *inputs, output = places
    seal(output, inputs)
    sums = recorded_sums(output.with_suffix(".sha256"))
    assert sums == {
        "cells.csv": sha256(output),
        "../a/cells.csv": sha256(inputs[0]),
        "../b/cells.csv": sha256(inputs[1]),
    }
    check(output)
    save_arrays(tmp_path / "a" / "part.safetensors", {"x": np.zeros(1)}, {})
    about = made({}, tmp_path / "out" / "part.safetensors", {"checkpoint": tmp_path / "a" / "part.safetensors"})
    assert [item["file"] for item in about["inputs"]] == ["../a/part.safetensors"]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table that was made of a CSV, in a study's folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "results" / "s"
    (folder / "tables").mkdir(parents=True)
    (folder / "cells.csv").write_text("a,b\n1,2\n")
    (folder / "tables" / "main.md").write_text("| 1 |\n")
    seal(folder / "cells.csv")
    seal(folder / "tables" / "main.md", [folder / "cells.csv"])
    return folder / "tables" / "main.md"


def test_a_list_of_sums_names_the_file_and_its_inputs_as_sha256sum_reads_it(table):
    assert recorded_sums(table.with_suffix(".sha256")) == {
        "main.md": sha256(table),
        "../cells.csv": sha256(table.parents[1] / "cells.csv"),
    }
    if shutil.which("sha256sum"):
        command = ["sha256sum", "--check", "--strict", "main.sha256"]
        assert not subprocess.run(command, cwd=table.parent, check=False, capture_output=True).returncode


def test_no_bit_of_a_text_or_of_its_list_of_sums_can_flip_unnoticed(table, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    for path in (table, table.with_suffix(".sha256")):
        content = path.read_bytes()
        for place in range(len(content)):
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 8
            path.write_bytes(flipped)
            assert "and make it again" in refusal(check, table)
            path.write_bytes(content[:place])
            assert "and make it again" in refusal(check, table)
        path.write_bytes(content)
    check(table)


def test_a_file_without_a_list_of_sums_is_taken_as_it_is(tmp_path):
    (tmp_path / "cells.csv").write_text("a\n")
    check(tmp_path / "cells.csv")
    (tmp_path / "cells.sha256").write_text(f"{'0' * 64}  other.csv\n")  # another program's
    check(tmp_path / "cells.csv")


def test_files_that_were_made_from_two_states_of_an_input_or_by_two_versions_are_refused(table, monkeypatch):
    folder = table.parents[1]
    (folder / "harm.csv").write_text("x\n")
    seal(folder / "harm.csv", [folder / "cells.csv"])
    check_together([table, folder / "cells.csv", folder / "harm.csv"])
    (folder / "cells.csv").write_text("a,b\n1,3\n")
    seal(folder / "cells.csv")
    message = refusal(check_together, [folder / "cells.csv", folder / "harm.csv"])
    assert "harm.csv" in message
    assert "from two states of" in message
    monkeypatch.setattr(module, "__version__", "9.9")
    seal(folder / "harm.csv", [folder / "cells.csv"])
    assert "two versions of tocom (9.9 and" in refusal(check_together, [folder / "cells.csv", folder / "harm.csv"])


def test_a_folder_that_lacks_a_checkpoint_which_its_job_left_is_refused_with_the_folder_to_delete(tmp_path):
    for name in ("a.safetensors", "a.csv", "b.safetensors"):
        (tmp_path / name).write_text(name)
    seal([tmp_path / "a.safetensors", tmp_path / "a.csv"], folder=True)
    seal([tmp_path / "b.safetensors"], folder=True)
    assert [path.name for path in checkpoint_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    (tmp_path / "a.safetensors").unlink()
    message = refusal(checkpoint_files, tmp_path)
    assert f"{tmp_path / 'a.safetensors'} is missing; delete {tmp_path} and make it again" in message


# --- code and jobs --------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the package's sources, whose version is asked for anew every time."""
    package = shutil.copytree(module.PACKAGE, tmp_path / "tocom", ignore=shutil.ignore_patterns("assets", "*.pyc"))
    monkeypatch.setattr(module, "PACKAGE", package)

    def version():
        module._core.cache_clear()
        module._essence.cache_clear()
        return code()["package"]

    yield package, version
    module._core.cache_clear()
    module._essence.cache_clear()


def test_code_is_another_where_a_number_may_be_and_the_same_after_an_edit_of_words_or_of_the_analysis(copy):
    package, version = copy
    before = version()

    def append(name, text):
        with (package / name).open("a") as file:
            file.write(text)

    append("merging.py", "\n# a comment\n")
    append("analysis/tables.py", "\nX = 1\n")
    append("console.py", "\nX = 1\n")
    append("methods/tome.py", "\nX = 1\n")  # counts where it takes part
    text = (package / "vit.py").read_text()
    (package / "vit.py").write_text('"""Another docstring."""' + text[text.index('"""', 3) + 3 :])
    assert version() == before
    for name in ("merging.py", "analysis/scores.py", "stages/evaluate.py"):
        append(name, "\nX = 1\n")
        assert version() != before
        before = version()


def test_the_file_of_a_part_counts_and_so_do_those_that_it_builds_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "own_compressor_that_is_hashed.py"
    file.write_text("from tocom.methods.tome import ToMe\n\nclass Own(ToMe):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    part = make_part("compressor", "own_compressor_that_is_hashed:Own")
    before = code([part])
    assert {"package", "own_compressor_that_is_hashed", "tocom.methods.tome"} == set(before)
    file.write_text(file.read_text() + "    x = 1\n")
    module._essence.cache_clear()
    after = code([part])
    assert {name for name in before if before[name] != after[name]} == {"own_compressor_that_is_hashed"}


def test_a_job_is_told_by_its_settings_but_not_by_which_models_it_is_about():
    jobs = [EvaluateJob.model_validate({"methods": {"tome": {"infer_degrees": (0,), "seeds": s}}}) for s in (None, [1])]
    assert how(jobs[0]) == how(jobs[1])
    other = EvaluateJob.model_validate({"methods": {"tome": {"infer_degrees": (0,)}}, "settings": {"batch_size": 7}})
    assert job_hash(jobs[0]) == job_hash(jobs[1]) != job_hash(other)
    assert difference(how(jobs[0]), how(jobs[1])) is None
    assert difference(how(other), how(jobs[0])).startswith("settings.batch_size is 7, not ")


# --- what artifacts carry, and what must not be mixed ---------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(backbone, digits, tmp_path_factory):
    """A study's folder with predictions of a fine-tuned model with and without a compensator, wherever it is moved."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("chain")
        patch.chdir(root)
        for name, path in (("backbone", backbone), ("digits", digits)):
            shutil.copy(path, root / f"{name}.safetensors")
        teach(root / "backbone.safetensors", root / "learned.safetensors", seed=0)
        tune(root / "backbone.safetensors", root / "digits.safetensors", root / "checkpoints")
        predict(root)
    return root


def predict(root, name="predictions", **settings):
    """Evaluate the model of a chain."""
    plain = {"infer_degrees": (0, 4)}
    job = {"methods": {"tome": plain, "tocom": plain | {"compensated": True}}, "backbone": "tiny"}
    job["settings"] = {"scales": (0, 1), "device": "cpu"} | settings
    data, compensator = root / "digits.safetensors", {"tocom": root / "learned.safetensors"}
    output = root / f"{name}.safetensors"
    evaluate(EvaluateJob.model_validate(job), root / "checkpoints", data, compensator, output)
    return output


@pytest.fixture
def moved(chain, tmp_path, monkeypatch):
    root = shutil.copytree(chain, tmp_path / "elsewhere" / "deeper")
    monkeypatch.chdir(root)
    return root


def test_every_file_says_from_which_files_it_was_made(chain):
    checkpoint = next((chain / "checkpoints").glob("*.safetensors"))
    wanted = {
        "learned.safetensors": [("backbone", "backbone.safetensors")],
        f"checkpoints/{checkpoint.name}": [("backbone", "../backbone.safetensors"), ("data", "../digits.safetensors")],
        "predictions.safetensors": [
            ("data", "digits.safetensors"),
            ("checkpoint", f"checkpoints/{checkpoint.name}"),
            ("compensator", "learned.safetensors"),
        ],
    }
    for name, inputs in wanted.items():
        about = load_metadata(chain / name)["made"]
        assert [(item["role"], item["file"]) for item in about["inputs"]] == inputs
        for item in about["inputs"]:
            assert item["sha256"] == sha256((chain / name).parent / item["file"])
        assert about["job"]["settings"]
        assert "package" in about["code"]
        assert str(chain) not in str(about)


def test_the_same_inputs_elsewhere_give_the_same_bytes(chain, moved):
    before = (moved / "predictions.safetensors").read_bytes()
    (moved / "predictions.safetensors").unlink()
    assert predict(moved).read_bytes() == before


def changed(path, change):
    """Write a copy of predictions of which something else is said, with other cells; return it."""
    arrays, about = load_arrays(path)
    about = deepcopy(about)
    for cell in about["cells"]:
        cell["seed"] += 1
    change(about)
    save_arrays(path.with_name("other.safetensors"), arrays, about)
    return path.with_name("other.safetensors")


def set_code(about, role, module, version):
    for item in [about["made"] | {"role": "predictions"}, *about["made"]["inputs"]]:
        if item["role"] == role:
            item["code"][module] = version


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda it: set_code(it, "predictions", "package", "0.1.0+older"), "two versions of the code (package)"),
        (lambda it: set_code(it, "checkpoint", "tocom.methods.tome", "older"), "(tocom.methods.tome) (older and"),
        (lambda it: set_code(it, "compensator", "package", "older"), "two versions of the code (package)"),
        (lambda it: it["made"]["job"]["settings"].update(batch_size=3), "two settings of evaluation"),
        (lambda it: it["made"]["inputs"][0].update(sha256="0" * 64), "two preparations of digits"),
        (lambda it: it["made"]["inputs"][1]["from"].update(data="0" * 64), "two preparations of digits"),
        (lambda it: it["made"]["inputs"][1]["from"].update(backbone="0" * 64), "two backbones tiny"),
        (lambda it: it["made"]["inputs"][2]["from"].update(backbone="0" * 64), "two backbones tiny"),
    ],
)
def test_predictions_that_do_not_go_together_make_no_cells(moved, change, reason):
    first = moved / "predictions.safetensors"
    message = refusal(gather, "s", [first, changed(first, change)])
    assert reason in message
    assert "; delete " in message


def test_predictions_that_say_nothing_go_with_all(moved):
    first = moved / "predictions.safetensors"
    assert len(gather("s", [first, changed(first, lambda about: about.pop("made"))])) == 8


def test_of_two_versions_the_one_that_is_not_installed_is_to_go(moved):
    first = moved / "predictions.safetensors"
    older = changed(first, lambda about: set_code(about, "predictions", "package", "older"))
    for files in ([first, older], [older, first]):
        assert refusal(gather, "s", files).endswith(f"delete {older} and make it again")


def test_predictions_of_another_config_than_the_studys_are_refused_with_what_differs(tmp_path, monkeypatch):
    from tests.workflow.running import TINY
    from tocom.study import read_study

    monkeypatch.chdir(tmp_path)
    study, root = read_study(TINY), tmp_path / "predictions"
    path = root / "tiny_vit" / "tome" / "digits" / "batch-0.safetensors"
    where = {"study": "tiny", "backbone": "tiny_vit", "tuned": "tome", "task": "digits", "batch": "batch-0"}
    job = Plan({"tiny": study.model_dump(exclude_unset=True, mode="json")}).evaluate(type("W", (), where))
    save_arrays(path, {"x": np.zeros(1)}, {"made": made(job, path, {})})
    check_config(study, root, [path])
    other = parse_study(study.model_dump(exclude_unset=True, mode="json") | {"evaluate": {"device": "cpu"}})
    message = refusal(check_config, other, root, [path])
    assert "of another config than tiny's: settings.decline_within is 0" in message
    assert message.endswith(f"delete {path} and make it again")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pretrain": {"epochs": 9}}, "settings.epochs is"),
        ({"max_degree": 7, "infer_degrees": [0, 7]}, None),  # at most scored elsewhere: the same backbone
        ({"pretrain": {"degree": "random"}}, "settings.degree is"),
    ],
)
def test_a_backbone_that_another_study_made_for_its_name_is_refused_with_what_differs(
    tmp_path, monkeypatch, change, says
):
    from tests.workflow.running import TINY
    from tocom.study import read_study

    monkeypatch.chdir(tmp_path)
    config = read_study(TINY).model_dump(exclude_unset=True, mode="json") | {"store": "store"}
    path = Path("store/backbones/tiny_vit.safetensors")
    plan = Plan({"one": config})
    plan.check_backbones()  # nothing there
    job = plan.pretrain(SimpleNamespace(store="store", backbone="tiny_vit"))
    save_arrays(path, {"x": np.zeros(1)}, {"made": made(job, path, {})})
    plan.check_backbones()
    merged = {key: config.get(key, {}) | value if isinstance(value, dict) else value for key, value in change.items()}
    other = Plan({"two": config | merged})
    if says is None:
        other.check_backbones()
    else:
        message = refusal(other.check_backbones)
        assert message.startswith(f"{path} is of another config than tiny's: {says}")
        assert message.endswith(f"or delete {path} and make it again")


# --- tracing --------------------------------------------------------------------------------------------------------


def names(traced):
    return [path.name for path in traced.here]


def test_a_trace_reaches_the_checkpoint_the_backbone_and_the_images(moved):
    traced = trace(moved / "predictions.safetensors")
    assert traced.error is None
    assert sorted(names(traced)) == sorted(
        ["predictions.safetensors", "digits.safetensors", "train-0_seed-0.safetensors", "learned.safetensors"]
        + ["backbone.safetensors"]
    )
    assert not traced.gone


@pytest.mark.parametrize("about", [{"kind": "task"}, {"made": {"job": 1}}, {"made": [1]}, {"kind": "task", "sizes": 3}])
def test_a_trace_ends_at_metadata_of_another_form(tmp_path, about):
    save_arrays(tmp_path / "odd.safetensors", {"x": np.zeros(1)}, about)
    assert "odd.safetensors holds metadata that this version cannot read" in str(
        trace(tmp_path / "odd.safetensors").error
    )


@pytest.mark.parametrize("name", ["learned.safetensors", "backbone.safetensors", "digits.safetensors"])
def test_a_trace_ends_at_the_first_file_that_was_damaged(moved, name):
    data = bytearray((moved / name).read_bytes())
    data[-3] ^= 4
    (moved / name).write_bytes(data)
    error = str(trace(moved / "predictions.safetensors").error)
    assert f"{name} " in error
    assert f"delete {moved / name}" in error


def test_a_trace_tells_what_was_replaced_by_another_good_file(moved):
    teach(moved / "backbone.safetensors", moved / "learned.safetensors", seed=1)
    error = str(trace(moved / "predictions.safetensors").error)
    assert f"learned.safetensors is not what {moved / 'predictions.safetensors'} was made from" in error


def test_a_trace_says_what_is_not_here_and_a_folder_is_traced_as_a_whole(moved, table):
    (moved / "backbone.safetensors").unlink()
    assert [path.name for path in trace(moved / "predictions.safetensors").gone] == ["backbone.safetensors"]
    folder = table.parents[1]
    assert sorted(names(trace(folder))) == ["cells.csv", "main.md"]
    (folder / "cells.csv").unlink()
    assert "cells.csv is missing" in str(trace(folder).error)
    with pytest.raises(TocomError, match="no such file"):
        trace(folder / "none.csv")
