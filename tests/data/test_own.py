"""Images of the user: every source gives the same kind of listing, and every mistake is one line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from pydantic import ValidationError

from tests.data.disk import file_limit
from tocom.config import TaskEntry, parse_study
from tocom.data.listing import Items, Listing
from tocom.data.own import OwnOptions, OwnSource, read_own
from tocom.errors import TocomError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own_data.md").read_text()
CONFIGS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]


def draw(path, seed=0, size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def entry(study):
    """The one task of a config of the page."""
    return next({k: v for k, v in c["tasks"][0].items() if k != "name"} for c in CONFIGS if c["study"] == study)


def names(listing, split):
    return [path.name for path in listing.splits[split].files]


def refuse(source, cache="unused", match=""):
    with pytest.raises(TocomError, match=match) as error:
        read_own("mine", OwnSource(**source), Path(cache))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("task 'mine': ")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["study"])
def test_every_config_of_the_page_is_accepted(config):
    for task in config["tasks"]:
        OwnSource.model_validate({key: value for key, value in task.items() if key != "name"})


@pytest.mark.skipif("csv" not in TaskEntry.model_fields, reason="TaskEntry does not take these sources yet")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["study"])
def test_every_config_of_the_page_is_a_whole_study(config):
    assert parse_study(config).task_names == (config["tasks"][0]["name"],)


def test_the_page_shows_every_source():
    assert {OwnSource(**entry(c["study"])).kind for c in CONFIGS} == {"folder", "csv", "hub", "python"}


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({}, "give one of folder, csv, hub, python"),
        ({"folder": "a", "csv": "b"}, "folder and csv are given"),
        ({"folder": "a", "revision": "main"}, "revision goes with hub, not with folder"),
        ({"folder": "a", "classes": 3}, "classes goes with csv or hub or python"),
        ({"csv": {"train": "a.csv"}}, "csv needs train and test"),
        ({"csv": {"training": "a.csv"}}, "training"),
        ({"hub": "a/b", "splits": {"test": "test"}}, "splits needs train and test"),
        ({"python": "module.function"}, "write package.module:function"),
        ({"folder": "a", "clases": 3}, "clases"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(wrong, match):
    with pytest.raises(ValidationError, match=match):
        OwnSource(**wrong)


def test_options_without_a_source_are_refused_and_no_source_is_fine_for_a_registered_task():
    assert OwnOptions().kind is None
    with pytest.raises(ValidationError, match="revision goes with hub"):
        OwnOptions(revision="main")


def test_a_source_survives_being_written_down():
    for config in CONFIGS:
        source = OwnSource(**entry(config["study"]))
        assert OwnSource.model_validate(source.model_dump(mode="json")) == source


def test_listing_own_images_imports_neither_torch_nor_datasets():
    code = "import sys, tocom.data.own; print(sorted({'torch', 'datasets', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# --- a folder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pets(here):
    for number, place in enumerate(("train/cat/b.png", "train/dog/c.jpg", "train/cat/a.BMP", "test/cat/d.webp")):
        draw(here / "data/pets" / place, number)
    (here / "data/pets/test/dog").mkdir()
    return here / "data/pets"


def test_a_folder_is_listed_in_sorted_order_without_hidden_files(pets):
    for hidden in ("train/.DS_Store", "train/cat/.hidden.png", "train/cat/Thumbs.db", ".git/x"):
        (pets / hidden).parent.mkdir(exist_ok=True)
        (pets / hidden).write_bytes(b"")
    listing = read_own("pets", OwnSource(**entry("pets")), Path("unused"))
    assert list(listing.splits) == ["train", "test"]
    assert names(listing, "train") == ["a.BMP", "b.png", "c.jpg"]
    assert listing.splits["train"].labels.tolist() == [0, 0, 1]
    assert names(listing, "test") == ["d.webp"]
    assert (listing.classes, listing.group, listing.source) == (2, "real tasks", "folder pets")
    draw(pets / "val/dog/e.png")
    (pets / "val/cat").mkdir()
    listing = read_own("pets", OwnSource(folder=str(pets), group="animals"), Path("unused"))
    assert listing.splits["val"].labels.tolist() == [1]
    assert listing.group == "animals"


def test_class_folders_that_are_called_by_numbers_are_names(here):
    for number, place in enumerate(("train/10/a.png", "train/2/b.png", "test/10/c.png", "test/2/d.png")):
        draw(here / "years" / place, number)
    listing = read_own("years", OwnSource(folder="years"), Path("unused"))
    assert listing.splits["test"].labels.tolist() == [0, 1]
    assert listing.classes == 2


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda pets: pets.rename(pets.parent / "other"), "there is no folder"),
        (lambda pets: (pets / "test").rename(pets / "tset"), "no sub-folder 'test'"),
        (lambda pets: draw(pets / "test/bird/x.png"), "'bird' is not in train"),
        (lambda pets: (pets / "test/dog").rmdir(), "'dog' is not in test"),
        (lambda pets: (pets / "test/cat/d.webp").unlink(), "the test split is empty"),
        (lambda pets: (pets / "train/dog/c.jpg").unlink(), "train/dog holds no images"),
        (lambda pets: draw(pets / "train/cat/more/x.png"), "folder inside a class folder"),
    ],
)
def test_a_damaged_folder_is_refused(pets, damage, match):
    damage(pets)
    refuse(entry("pets"), match=match)


def test_a_folder_whose_splits_are_the_same_images_by_links_is_refused(pets):
    (pets / "val").symlink_to("train")
    refuse(entry("pets"), match=r"val/cat/a.BMP is in train and in val \(once as data/pets/train/cat/a.BMP\)")
    (pets / "val").unlink()
    (pets / "train/cat/z.png").symlink_to("b.png")
    refuse(entry("pets"), match=r"train/cat/z.png is in train twice \(once as data/pets/train/cat/b.png\)")


# --- CSV ------------------------------------------------------------------------------------------------------------

BIRDS = "path,label,split\nphotos/a.png,wren,train\nphotos/b.png,robin,train\nphotos/c.png,wren,test\n"


@pytest.fixture
def birds(here):
    for number, name in enumerate("abcd"):
        draw(here / f"data/photos/{name}.png", number)
    (here / "data/birds.csv").write_text(BIRDS)
    return here / "data/birds.csv"


def test_a_csv_keeps_its_order_and_numbers_names_in_sorted_order(birds):
    listing = read_own("birds", OwnSource(**entry("birds")), Path("unused"))
    assert names(listing, "train") == ["a.png", "b.png"]
    assert listing.splits["train"].labels.tolist() == [1, 0]
    assert listing.splits["test"].labels.tolist() == [1]
    assert listing.splits["train"].labels.dtype == np.int64
    assert (listing.classes, listing.source) == (2, "CSV birds.csv")


def test_a_csv_of_excel_with_blanks_quotes_and_empty_lines_is_read(birds):
    birds.write_text(
        '\ufeffpath, label ,split\r\n"photos/a.png", 0 ,train\r\n\r\nphotos/b.png,1,train\r\nphotos/c.png,1,test \r\n'
        "photos/d.png,0,val\r\n",
        encoding="utf-8",
    )
    listing = read_own("birds", OwnSource(csv=str(birds)), Path("unused"))
    assert [listing.splits[split].labels.tolist() for split in ("train", "val", "test")] == [[0, 1], [0], [1]]


def test_a_csv_for_each_split_with_columns_of_other_names(birds):
    (birds.parents[1] / "lists").mkdir()
    for split, rows in {"train": ("a,wren", "b,robin"), "val": ("d,wren",), "test": ("c,robin",)}.items():
        text = "species,file\n" + "".join(f"{species},photos/{x}.png\n" for x, species in (r.split(",") for r in rows))
        (birds.parents[1] / f"lists/{split}.csv").write_text(text)
    listing = read_own("birds", OwnSource(**entry("birds_by_file")), Path("unused"))
    assert {split: items.labels.tolist() for split, items in listing.splits.items()} == {
        "train": [1, 0],
        "val": [1],
        "test": [0],
    }
    assert listing.splits["val"].files == (Path("data/photos/d.png"),)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (",split", ",fold", r"no column 'split' .*csv: \{train: train.csv, test: test.csv\}"),
        ("path,", "file,", "no column 'path' but file, label, split; rename one, or .*image_column"),
        ("wren,test", "owl,test", "class 'owl' is in test but not in train"),
        ("wren,test", "wren,tset", r"'tset' \(did you mean 'test'\?\)"),
        ("wren,test", ",test", "row 3 below the header has no label"),
        ("robin,train", "robin", "row 2 below the header has no split"),
        ("wren,test", "wren,train", "no rows of the test split"),
        ("photos/b", "photos/x", r"there is no file data/photos/x.png; paths are relative to data, .*root"),
        ("photos/c", "photos/a", "photos/a.png is in train and in test; keep one"),
        (
            "photos/c",
            "photos/../photos/a",
            r"photos/../photos/a.png is in train and in test \(once as .*photos/a.png\)",
        ),
        ("photos/b", "photos/a", "photos/a.png is in train twice; keep one"),
        (BIRDS, "", "not a readable CSV"),
        (BIRDS, "path,label,split\n", "no rows of the train split"),
    ],
)
def test_a_damaged_csv_is_refused(birds, old, new, match):
    assert old in BIRDS
    birds.write_text(BIRDS.replace(old, new))
    refuse(entry("birds"), match=match)


def test_an_absolute_path_or_a_link_does_not_hide_that_a_file_is_in_two_splits(birds):
    birds.write_text(BIRDS.replace("photos/c.png", str(birds.parent / "photos/b.png")))
    refuse(entry("birds"), match="b.png is in train and in test")
    (birds.parent / "photos/link.png").symlink_to("b.png")
    birds.write_text(BIRDS.replace("photos/c.png", "photos/link.png"))
    refuse(entry("birds"), match="link.png is in train and in test")


def test_a_csv_that_is_missing_or_no_text_is_refused(birds):
    refuse({"csv": "data/bird.csv"}, match="there is no CSV data/bird.csv")
    refuse({"csv": "data/photos/a.png"}, match="not a readable CSV")


def numbered(path, train, test):
    rows = [f"{path.parent}/photos/{name}.png,{label},train" for name, label in zip("ab", train, strict=True)]
    path.write_text("\n".join(["path,label,split", *rows, f"{path.parent}/photos/c.png,{test},test\n"]))
    return {"csv": str(path)}


def test_numbers_are_kept_and_must_count_from_zero_unless_the_number_of_classes_is_stated(birds):
    source = numbered(birds, (1, 0), 1)
    assert read_own("n", OwnSource(**source), Path("unused")).splits["train"].labels.tolist() == [1, 0]
    source = numbered(birds, (1, 2), 1)
    refuse(source, match="no training image has label 0; number classes from 0")
    listing = read_own("n", OwnSource(**source, classes=1000), Path("unused"))
    assert listing.classes == 1000
    assert listing.splits["train"].labels.tolist() == [1, 2]
    source = numbered(birds, (0, 1), 2)
    refuse(source, match="class 2 is in test but not in train")
    assert read_own("n", OwnSource(**source, classes=3), Path("unused")).splits["test"].labels.tolist() == [2]
    refuse(source | {"classes": 2}, match=r"label of the test split lies outside 0\.\.1")
    refuse(numbered(birds, (-1, 0), 0), match="label -1 is negative")
    refuse(numbered(birds, (-1, 0), 0) | {"classes": 2}, match="outside")


@pytest.mark.parametrize(
    ("train", "match"),
    [
        ((0, 300_000_000), "no training image has label 1; number classes"),
        ((0, 10**20), r"100000000000000000\.\.\. is no label; number classes"),
        (("0", "00"), "labels '0' and '00' are one number"),
        ((0, "-0"), "labels '-0' and '0' are one number"),
    ],
)
def test_numbers_that_cannot_be_labels_are_refused_at_once(birds, train, match):
    refuse(numbered(birds, train, 0), match=match)


# --- Hugging Face Hub -----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(here, monkeypatch):
    """A copy of a Hub data set with the columns of CIFAR-100: parquet files with PNG bytes."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", here / "library")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def make(splits=(("train", 20), ("test", 4)), extra=None, **columns):
        features = {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=["a", "b", "c"]),
            "coarse_label": datasets.ClassLabel(names=["x"]),
        }
        for split, count in splits:
            numbers = range(count)
            rows = {
                "img": [Image.fromarray(np.full((8, 6, 3), 10 * i, dtype=np.uint8)) for i in numbers],
                "fine_label": [i % 3 for i in numbers],
                "coarse_label": [0] * count,
            }
            rows |= {name: [function(i) for i in numbers] for name, function in columns.items()}
            table = datasets.Dataset.from_dict(rows, datasets.Features(features | (extra or {})))
            (here / "data/cifar100").mkdir(parents=True, exist_ok=True)
            table.to_parquet(here / f"data/cifar100/{split}-00000-of-00001.parquet")
        return here / "data/cifar100"

    return make


def test_images_of_the_hub_become_files_with_their_original_bytes(hub, here):
    import datasets

    folder = hub()
    listing = read_own("hub", OwnSource(**entry("hub_offline")), here / "cache")
    assert listing.classes == 3
    assert listing.splits["train"].labels.tolist() == [i % 3 for i in range(20)]
    assert [len(items) for items in listing.splits.values()] == [20, 4]
    table = datasets.load_dataset("parquet", data_files=str(folder / "test-00000-of-00001.parquet"))["train"]
    raw = table.cast_column("img", datasets.Image(decode=False))
    for path, row in zip(listing.splits["test"].files, raw, strict=True):
        assert path.suffix == ".png"
        assert path.read_bytes() == row["img"]["bytes"]
        assert path.is_relative_to(here / "cache" / "hub")


def test_parts_of_splits_by_the_page_as_written(hub, here):
    hub()
    source = entry("hub_cifar100") | {"hub": "data/cifar100", "revision": None}
    listing = read_own("hub", OwnSource(**source), here / "cache")
    assert {split: len(items) for split, items in listing.splits.items()} == {"train": 18, "val": 2, "test": 4}
    assert np.asarray(Image.open(listing.splits["val"].files[0]))[0, 0].tolist() == [180] * 3


@pytest.mark.parametrize(
    "splits",
    [
        {"train": "train", "test": "train"},
        {"train": "train", "val": "test", "test": "test"},
        {"train": "train[:90%]", "val": "train[50%:]", "test": "test"},
        {"train": "train[:10]", "test": "train[-11:]"},
        {"train": "train", "test": "test+train[:1]"},
        {"train": "train+train", "test": "test"},
    ],
)
def test_parts_of_splits_that_share_images_are_refused(hub, here, splits):
    hub()
    refuse(entry("hub_offline") | {"splits": splits}, here / "cache", "share images; take parts that do not overlap")
    assert not (here / "cache").exists()


def test_parts_of_splits_that_touch_are_fine(hub, here):
    hub()
    splits = {"train": "train[:10]", "val": "train[10:15]", "test": "train[-5:]+test"}
    listing = read_own("hub", OwnSource(**entry("hub_offline"), splits=splits), here / "cache")
    assert [len(items) for items in listing.splits.values()] == [10, 5, 9]


def test_a_disk_that_fills_up_during_an_export_leaves_only_whole_images_and_the_next_run_goes_on(hub, here):
    from tocom.data import own

    noise = np.random.default_rng(0).integers(0, 256, (120, 120, 3), dtype=np.uint8)  # 43 kB
    hub(img=lambda i: Image.fromarray(noise if i == 3 else noise[:9, :9]))
    source = OwnSource(**entry("hub_offline"))
    own._load_hub(source, "the library's own cache is on another disk")
    with file_limit(20_000), pytest.raises(TocomError, match="cannot write .*free some space or choose another folder"):
        read_own("hub", source, here / "cache")
    files = [path for path in (here / "cache").rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == [f"{number:08d}.png" for number in range(3)]
    assert len(read_own("hub", source, here / "cache").splits["train"]) == 20


def test_an_interrupted_export_goes_on_where_it_was(hub, here, monkeypatch):
    from tocom.data import own

    hub()
    real, calls = own._image_file, []

    def dies(value, what):
        calls.append(what)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return real(value, what)

    source = OwnSource(**entry("hub_offline"))
    monkeypatch.setattr(own, "_image_file", dies)
    with pytest.raises(KeyboardInterrupt):
        read_own("hub", source, here / "cache")
    kept = sorted((here / "cache").rglob("*.png"))
    assert len(kept) == 10
    assert [path for path in (here / "cache").rglob("*") if path.is_file() and path not in kept] == []
    before = {path: path.stat().st_mtime_ns for path in kept}
    monkeypatch.setattr(own, "_image_file", real)
    listing = read_own("hub", source, here / "cache")
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert all(path.is_file() for items in listing.splits.values() for path in items.files)
    # A second reading takes what the index says and writes nothing.
    monkeypatch.setattr(own, "_image_file", dies)
    again = read_own("hub", source, here / "cache")
    assert again.splits["train"].files == listing.splits["train"].files
    assert again.splits["train"].labels.tolist() == listing.splits["train"].labels.tolist()


def test_another_content_is_exported_to_another_folder(hub, here):
    source = OwnSource(**entry("hub_offline"))
    hub()
    first = read_own("hub", source, here / "cache").splits["train"].files[0]
    hub(splits=(("train", 21), ("test", 4)))
    second = read_own("hub", source, here / "cache").splits["train"].files
    assert len(second) == 21
    assert first.parents[2] != second[0].parents[2]


def test_a_validation_split_is_found_and_columns_of_names_and_of_pixels_are_read(hub, here):
    from datasets import Array3D, Value

    hub(
        splits=(("train", 20), ("validation", 4), ("test", 4)),
        extra={"word": Value("string"), "pixels": Array3D((3, 5, 7), "uint8")},
        word=lambda i: "odd" if i % 2 else "even",
        pixels=lambda i: np.full((3, 5, 7), i, dtype=np.uint8),
    )
    source = {"hub": "data/cifar100", "label_column": "word", "image_column": "pixels"}
    listing = read_own("hub", OwnSource(**source), here / "cache")
    assert list(listing.splits) == ["train", "val", "test"]
    assert listing.splits["val"].labels.tolist() == [0, 1, 0, 1]
    image = np.asarray(Image.open(listing.splits["train"].files[5]))
    assert image.shape == (5, 7, 3)
    assert (image == 5).all()


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ({}, "several columns of type ClassLabel; choose with `label_column:` among fine_label, coarse_label"),
        ({"label_column": "fine"}, r"no column 'fine' \(did you mean 'fine_label'\?\)"),
        ({"subset": "other"}, "cannot be loaded .*BuilderConfig 'other' not found"),
        ({"splits": {"train": "train", "test": "val"}}, "cannot be loaded .*Unknown split"),
        (
            {"label_column": "fine_label", "splits": {"train": "train[:1]", "test": "test"}},
            "class 1 is in test but not in train",
        ),
    ],
)
def test_a_data_set_of_the_hub_that_does_not_fit_is_refused(hub, here, source, match):
    hub()
    refuse({"hub": "data/cifar100"} | source, here / "cache", match)


def test_nothing_is_taken_for_exported_if_an_image_cannot_be_read(hub, here):
    hub()
    source = {"hub": "data/cifar100", "label_column": "fine_label", "image_column": "coarse_label"}
    refuse(source, here / "cache", "image 0 of train is not a readable image .*shape")
    assert [path for path in (here / "cache").rglob("*") if path.is_file()] == []


def test_a_missing_test_split_and_a_split_without_labels_are_refused_with_the_setting_that_helps(hub, here):
    hub(splits=(("train", 4), ("validation", 4)))
    refuse(entry("hub_offline"), here / "cache", r"no test split but train, validation; .*splits: \{train: train, test")
    source = entry("hub_offline") | {"splits": {"train": "train", "test": "validation"}}
    assert list(read_own("hub", OwnSource(**source), here / "cache").splits) == ["train", "test"]
    hub(splits=(("train", 4), ("test", 4)), fine_label=lambda i: -1)
    refuse(entry("hub_offline"), here / "cache", "the train split is not labelled")


def test_without_network_the_error_says_how_to_download_before(tmp_path):
    code = (
        "from pathlib import Path; from tocom.data.own import *\n"
        "read_own('mine', OwnSource(hub='someone/photos', revision='v2'), Path('cache'))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    line = result.stderr.strip().splitlines()[-1]
    assert "Hub data set someone/photos cannot be reached" in line
    assert (
        "hf download someone/photos --repo-type dataset --revision v2 --local-dir data/photos`,"
        " then give that folder as `hub:`" in line
    )


# --- Python ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def module(here, monkeypatch):
    """Write a module under a name of its own and return the source of one of its functions."""

    def write(text, name="own_module", function="load", **options):
        (here / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return {"python": f"{name}:{function}"} | options

    yield write
    for name in ("own_module", "shapes"):
        sys.modules.pop(name, None)


def test_the_function_of_the_page_gives_images(module):
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    path = list(sys.path)
    module(code, "shapes")
    listing = read_own("shapes", OwnSource(**entry("shapes")), Path("unused"))
    assert sys.path == path
    assert listing.classes == 2
    assert listing.splits["train"].arrays.shape == (400, 3, 32, 32)
    assert listing.splits["val"].labels.tolist() == [0, 1] * 50
    again = read_own("shapes", OwnSource(**entry("shapes")), Path("unused"))
    assert np.array_equal(again.splits["test"].arrays, listing.splits["test"].arrays)


def test_a_function_may_return_paths_and_names(module, here):
    for name in "abc":
        draw(here / f"{name}.png")
    source = module("def load():\n return {'test': (['c.png'], ['x']), 'train': (['a.png', 'b.png'], ['y', 'x'])}")
    listing = read_own("mine", OwnSource(**source), Path("unused"))
    assert list(listing.splits) == ["train", "test"]
    assert listing.splits["train"].files == (Path("a.png"), Path("b.png"))
    assert listing.splits["train"].labels.tolist() == [1, 0]


def test_a_file_that_a_function_gives_twice_is_refused(module, here):
    for name in "abc":
        draw(here / f"{name}.png")
    source = module("def load():\n return {'train': (['a.png', './b.png'], [0, 1]), 'test': (['b.png'], [1])}")
    refuse(source, match="b.png is in train and in test")
    text = "from pathlib import Path\nfrom tocom.data.listing import Items, Listing\nimport numpy as np\n"
    text += "a, b = Path('a.png'), Path('b.png')\ndef items(*files): return Items(np.zeros(len(files), int), files)\n"
    text += "def load(): return Listing(1, 'g', 's', {'train': items(a, a), 'test': items(b)})"
    refuse(module(text), match="a.png is in train twice")


def test_a_listing_is_taken_as_it_is(module, monkeypatch):
    items = Items(np.zeros(2, dtype=np.int64), arrays=np.zeros((2, 3, 4, 4), dtype=np.uint8))
    whole = Listing(5, "my group", "me", {"train": items, "test": items})
    source = module("LISTING = None\ndef load():\n return LISTING")
    sys.path.insert(0, ".")
    import own_module

    sys.path.remove(".")
    monkeypatch.setattr(own_module, "LISTING", whole)
    assert read_own("mine", OwnSource(**source), Path("unused")) is whole
    monkeypatch.setattr(own_module, "LISTING", Listing(5, "my group", "me", {"train": items}))
    refuse(source, match="own_module:load: its Listing has splits train; it needs train and test")


ARRAYS = "import numpy as np\nx = np.zeros((2, 3, 4, 4), np.uint8)\ndef load(**more):\n return "


@pytest.mark.parametrize(
    ("text", "options", "match"),
    [
        ("import nothing_like_this", {}, "cannot be imported .*ModuleNotFoundError: .*nothing_like_this"),
        ("1/0", {}, "cannot be imported .*ZeroDivisionError"),
        ("def lode(): pass", {}, r"no function 'load' \(did you mean 'lode'\?\)"),
        ("load = 3", {}, "no function 'load'"),
        ("def load(a): pass", {}, "missing a required argument: 'a'; mend `arguments:`"),
        ("def load(): pass", {"arguments": {"b": 1}}, "unexpected keyword argument 'b'"),
        ("def load(): raise KeyError('oh')", {}, "own_module:load raised KeyError: 'oh'"),
        ("def load(): pass", {}, "own_module:load returned NoneType"),
        (ARRAYS + "{'train': (x, [0, 1])}", {}, "returned a mapping of train"),
        (ARRAYS + "{'train': (x, [0, 1]), 'test': x}", {}, "test is not a pair"),
        (ARRAYS + "{'train': (x, [0, 1]), 'test': (x, [0])}", {}, "test has 2 images but 1 labels"),
        (ARRAYS + "{'train': (x, [0, 1]), 'test': (x, [0, 2])}", {}, "class 2 is in test but not in train"),
        (ARRAYS + "{'train': (x, [0, 0.5]), 'test': (x, [0, 1])}", {}, "not all whole numbers or all names"),
        (ARRAYS + "{'train': (x[:0], []), 'test': (x, [0, 1])}", {}, "the train split is empty"),
        (ARRAYS + "{'train': (x / 2, [0, 1]), 'test': (x, [0, 1])}", {}, r"images of train are float64 .*uint8"),
        (ARRAYS + "{'train': (x[:, 0], [0, 1]), 'test': (x, [0, 1])}", {}, r"shape \[2, 4, 4\]"),
        (ARRAYS + "{'train': (['a.png'], [0]), 'test': (x, [0, 0])}", {}, "there is no file a.png"),
    ],
)
def test_a_function_that_does_not_do_its_work_is_named(module, text, options, match):
    refuse(module(text, **options), match=match)


def test_a_module_that_is_not_there_says_where_it_was_looked_for(here):
    refuse({"python": "no_such_module:load"}, match=f"is looked for in {here}")
