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

from tests.small import refusal
from tocom.data import own
from tocom.data.own import OwnOptions, read_own

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own_data.md").read_text()
CONFIGS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
#: Study of the page -> what its task says beside its name.
PAGE_SOURCES = {c["study"]: {k: v for k, v in c["tasks"][0].items() if k != "name"} for c in CONFIGS}


def draw(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 9, 3), dtype=np.uint8)).save(path)


def listing_of(source, cache="unused"):
    return read_own("mine", OwnOptions(**source), Path(cache))


def labels(listing):
    return {split: items.labels.tolist() for split, items in listing.splits.items()}


def names(listing, split):
    return [path.name for path in listing.splits[split].files]


def refuse(source, match, cache="unused"):
    message = refusal(listing_of, source, cache)
    assert message.startswith("task 'mine': ")
    assert re.search(match, message)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- the options ----------------------------------------------------------------------------------------------------


def test_the_page_shows_every_source_and_what_it_says_survives_being_written_down():
    sources = [OwnOptions(**source) for source in PAGE_SOURCES.values()]
    assert {source.kind for source in sources} == set(own.OPTIONS)
    assert [OwnOptions.model_validate(source.model_dump(mode="json")) for source in sources] == sources
    assert OwnOptions().kind is None  # of a registered task


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"folder": "a", "csv": "b"}, "folder and csv are given"),
        ({"folder": "a", "revision": "main"}, "revision goes with hub, not with folder"),
        ({"folder": "a", "classes": 3}, "classes goes with segment or csv or hub or python"),
        ({"hub": "a/b", "splits": {"test": "test"}}, "splits needs train and test"),
        ({"python": "module.function"}, "write package.module:function"),
        ({"segment": "a"}, "segment needs the number of classes, 2 to 255"),
        ({"segment": "a", "classes": 256}, "segment needs the number of classes, 2 to 255"),
        ({"folder": "a", "clases": 3}, "clases"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(wrong, match):
    with pytest.raises(ValidationError, match=match):
        OwnOptions(**wrong)


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(here):
    """data/pets of the page with few images, none to choose on."""
    for number, place in enumerate(("train/cat/b.png", "train/dog/c.jpg", "train/cat/a.BMP", "test/cat/d.webp")):
        draw(here / "data/pets" / place, number)
    (here / "data/pets/test/dog").mkdir()
    return here / "data/pets"


def test_a_folder_is_listed_in_sorted_order_without_hidden_files(few):
    for hidden in ("train/.DS_Store", "train/cat/.hidden.png", "train/cat/Thumbs.db", ".git/x"):
        (few / hidden).parent.mkdir(exist_ok=True)
        (few / hidden).write_bytes(b"")
    listing = listing_of(PAGE_SOURCES["pets"])
    assert labels(listing) == {"train": [0, 0, 1], "test": [0]}
    assert names(listing, "train") == ["a.BMP", "b.png", "c.jpg"]
    assert (listing.classes, listing.group, listing.source) == (2, "real tasks", "folder pets")
    for split in ("train", "test", "val"):  # class folders that are called by numbers are names, too
        for name in ("cat", "dog"):
            (few / split / name).mkdir(parents=True, exist_ok=True)
            (few / split / name).rename(few / split / {"cat": "2", "dog": "10"}[name])
    draw(few / "val/10/e.png")
    listing = listing_of(PAGE_SOURCES["pets"] | {"group": "animals"})
    assert labels(listing) == {"train": [0, 1, 1], "val": [0], "test": [1]}
    assert listing.group == "animals"


def twice(pets):
    (pets / "val").symlink_to("train")


def twice_in_train(pets):
    (pets / "train/cat/z.png").symlink_to("b.png")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda pets: pets.rename(pets.parent / "other"), "there is no folder"),
        (lambda pets: (pets / "test").rename(pets / "tset"), "no sub-folder 'test'"),
        (lambda pets: draw(pets / "test/bird/x.png"), "'bird' is not in train"),
        (lambda pets: (pets / "test/cat/d.webp").unlink(), "the test split is empty"),
        (lambda pets: (pets / "train/dog/c.jpg").unlink(), "train/dog holds no images"),
        (lambda pets: draw(pets / "train/cat/more/x.png"), "folder inside a class folder"),
        (twice, r"val/cat/a.BMP is in train and in val \(once as data/pets/train/cat/a.BMP\)"),
        (twice_in_train, r"train/cat/z.png is in train twice \(once as data/pets/train/cat/b.png\)"),
    ],
)
def test_a_damaged_folder_is_refused(few, damage, match):
    damage(few)
    refuse(PAGE_SOURCES["pets"], match)


def test_a_folder_to_segment_is_in_the_layout_of_ade20k(photographs):
    source = {"segment": str(photographs), "classes": 160, "group": "streets"}
    listing = listing_of(source)
    assert (listing.kind, listing.classes, listing.group) == ("segment", 160, "streets")
    assert names(listing, "test") == [f"ADE_val_{n:08d}.jpg" for n in range(1, 13)]
    assert listing.splits["train"].labels[0] == photographs / "annotations/training/ADE_train_00000001.png"
    for place in ("images/training/ADE_train_00000001.jpg", "annotations/training/ADE_train_00000001.png"):
        copy = photographs / place.replace("training", "validation").replace("train_", "a_")
        copy.symlink_to(photographs / place)
    refuse(source, "ADE_a_00000001.jpg is in train and in test")


# --- CSV ------------------------------------------------------------------------------------------------------------

BIRDS = "path,label,split\nphotos/a.png,wren,train\nphotos/b.png,robin,train\nphotos/c.png,wren,test\n"


@pytest.fixture
def birds(here):
    for number, name in enumerate("abcd"):
        draw(here / f"data/photos/{name}.png", number)
    (here / "data/photos/link.png").symlink_to("b.png")
    (here / "data/birds.csv").write_text(BIRDS)
    return here / "data/birds.csv"


def test_a_csv_keeps_its_order_and_numbers_names_in_sorted_order(birds):
    listing = listing_of(PAGE_SOURCES["birds"])
    assert names(listing, "train") == ["a.png", "b.png"]
    assert labels(listing) == {"train": [1, 0], "test": [1]}
    assert listing.splits["train"].labels.dtype == np.int64
    assert (listing.classes, listing.source) == (2, "CSV birds.csv")


def test_a_csv_of_excel_with_blanks_quotes_and_empty_lines_is_read(birds):
    birds.write_text(
        '\ufeffpath, label ,split\r\n"photos/a.png", 0 ,train\r\n\r\nphotos/b.png,1,train\r\nphotos/c.png,1,test \r\n'
        "photos/d.png,0,val\r\n",
        encoding="utf-8",
    )
    assert labels(listing_of({"csv": str(birds)})) == {"train": [0, 1], "val": [0], "test": [1]}


def test_a_csv_for_each_split_with_columns_of_other_names(birds):
    (birds.parents[1] / "lists").mkdir()
    for split, rows in {"train": ("a,wren", "b,robin"), "val": ("d,wren",), "test": ("c,robin",)}.items():
        text = "species,file\n" + "".join(f"{species},photos/{x}.png\n" for x, species in (r.split(",") for r in rows))
        (birds.parents[1] / f"lists/{split}.csv").write_text(text)
    listing = listing_of(PAGE_SOURCES["birds_by_file"])
    assert labels(listing) == {"train": [1, 0], "val": [1], "test": [0]}
    assert listing.splits["val"].files == (Path("data/photos/d.png"),)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (",split", ",fold", r"no column 'split' .*csv: \{train: train.csv, test: test.csv\}"),
        ("path,", "file,", "no column 'path' but file, label, split; .*image_column"),
        ("wren,test", "owl,test", "class 'owl' is in test but not in train"),
        ("wren,test", "wren,tset", r"'tset' \(did you mean 'test'\?\)"),
        ("wren,test", ",test", "row 3 below the header has no label"),
        ("wren,test", "wren,train", "no rows of the test split"),
        ("photos/b", "photos/x", r"there is no file data/photos/x.png; paths are relative to data, .*root"),
        ("photos/c", "photos/link", "link.png is in train and in test"),
        ("photos/c", "photos/../photos/a", r"is in train and in test \(once as .*photos/a.png\)"),
        ("photos/b", "photos/a", "photos/a.png is in train twice; keep one"),
        (BIRDS, "", "not a readable CSV"),
    ],
)
def test_a_damaged_csv_is_refused(birds, old, new, match):
    assert old in BIRDS
    birds.write_text(BIRDS.replace(old, new))
    refuse(PAGE_SOURCES["birds"], match)


def test_a_csv_that_is_missing_or_no_text_is_refused(birds):
    refuse({"csv": "data/bird.csv"}, "there is no CSV data/bird.csv")
    refuse({"csv": "data/photos/a.png"}, "not a readable CSV")


@pytest.mark.parametrize(
    ("train", "test", "classes", "match"),
    [
        ((1, 0), 1, None, None),
        ((1, 2), 1, None, "no training image has label 0; number classes from 0"),
        ((1, 2), 1, 1000, None),
        ((0, 1), 2, None, "class 2 is in test but not in train"),
        ((0, 1), 2, 2, r"label of the test split lies outside 0\.\.1"),
        ((-1, 0), 0, None, "label -1 is negative"),
        ((0, 10**20), 0, None, r"100000000000000000\.\.\. is no label; number classes"),
    ],
)
def test_numbers_are_kept_and_must_count_from_zero_unless_the_number_of_classes_is_stated(
    birds, train, test, classes, match
):
    rows = [f"photos/{name}.png,{label},train" for name, label in zip("ab", train, strict=True)]
    birds.write_text("\n".join(["path,label,split", *rows, f"photos/c.png,{test},test\n"]))
    source = {"csv": str(birds), "classes": classes}
    if match:
        refuse(source, match)
    else:
        assert labels(listing_of(source)) == {"train": list(train), "test": [test]}
        assert listing_of(source).classes == (classes or 2)


# --- Hugging Face Hub -----------------------------------------------------------------------------------------------

OFFLINE = PAGE_SOURCES["hub_offline"]


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

    return make


def test_images_of_the_hub_become_files_and_another_content_goes_to_another_folder(hub, here):
    hub()
    listing = listing_of(OFFLINE, "cache")
    assert listing.classes == 3
    assert labels(listing) == {"train": [i % 3 for i in range(20)], "test": [0, 1, 2, 0]}
    assert all(path.suffix == ".png" and path.is_relative_to("cache/hub") for path in listing.splits["test"].files)
    pixels = [np.asarray(Image.open(path))[0, 0, 0] for path in listing.splits["train"].files]
    assert pixels == [10 * i for i in range(20)]
    hub(splits=(("train", 21), ("test", 4)))
    other = listing_of(OFFLINE, "cache").splits["train"].files
    assert len(other) == 21
    assert other[0].parents[2] != listing.splits["train"].files[0].parents[2]


def test_parts_of_splits_are_taken_as_the_page_has_it(hub):
    hub()
    listing = listing_of(PAGE_SOURCES["hub_cifar100"] | {"hub": "data/cifar100", "revision": None}, "cache")
    assert {split: len(items) for split, items in listing.splits.items()} == {"train": 18, "val": 2, "test": 4}
    assert np.asarray(Image.open(listing.splits["val"].files[0]))[0, 0].tolist() == [180] * 3
    touching = {"train": "train[:10]", "val": "train[10:15]", "test": "train[-5:]+test"}
    listing = listing_of(OFFLINE | {"splits": touching}, "cache")
    assert [len(items) for items in listing.splits.values()] == [10, 5, 9]
    for sharing in (
        {"train": "train", "test": "train"},
        {"train": "train[:90%]", "val": "train[50%:]", "test": "test"},
        {"train": "train", "test": "test+train[:1]"},
        {"train": "train+train", "test": "test"},
    ):
        refuse(OFFLINE | {"splits": sharing}, "share images; take parts that do not overlap", "other")
    assert not Path("other").exists()


def test_a_validation_split_is_found_and_columns_of_names_and_of_pixels_are_read(hub):
    from datasets import Array3D, Value

    hub(
        splits=(("train", 20), ("validation", 4), ("test", 4)),
        extra={"word": Value("string"), "pixels": Array3D((3, 5, 7), "uint8")},
        word=lambda i: "odd" if i % 2 else "even",
        pixels=lambda i: np.full((3, 5, 7), i, dtype=np.uint8),
    )
    listing = listing_of({"hub": "data/cifar100", "label_column": "word", "image_column": "pixels"}, "cache")
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
        (OFFLINE | {"splits": {"train": "train[:1]", "test": "test"}}, "class 1 is in test but not in train"),
        (OFFLINE | {"image_column": "coarse_label"}, "image 0 of train is not a readable image .*shape"),
    ],
)
def test_a_data_set_of_the_hub_that_does_not_fit_is_refused(hub, here, source, match):
    hub()
    refuse({"hub": "data/cifar100"} | source, match, "cache")
    assert not list((here / "cache").rglob("index.json")) or "class" in match


def test_a_missing_test_split_and_a_split_without_labels_are_refused_with_the_setting_that_helps(hub):
    hub(splits=(("train", 4), ("validation", 4)))
    refuse(OFFLINE, r"no test split but train, validation; .*splits: \{train: train, test", "cache")
    assert list(listing_of(OFFLINE | {"splits": {"train": "train", "test": "validation"}}, "cache").splits) == [
        "train",
        "test",
    ]
    hub(splits=(("train", 4), ("test", 4)), fine_label=lambda i: -1)
    refuse(OFFLINE, "the train split is not labelled", "cache")


def test_without_network_the_error_says_how_to_download_before(tmp_path):
    code = (
        "from pathlib import Path; from tocom.data.own import *\n"
        "read_own('mine', OwnOptions(hub='someone/photos', revision='v2'), Path('cache'))"
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    line = result.stderr.strip().splitlines()[-1]
    assert "Hub data set someone/photos cannot be reached" in line
    command = "hf download someone/photos --repo-type dataset --revision v2 --local-dir data/photos`"
    assert f"{command}, then give that folder as `hub:`" in line


# --- Python ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def module(here, monkeypatch):
    """Write a module under a name of its own and return the source of its function `load`."""

    def write(text, name="own_module", **options):
        (here / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return {"python": f"{name}:load"} | options

    for name in "abc":
        draw(here / f"{name}.png")
    yield write
    for name in ("own_module", "shapes"):
        sys.modules.pop(name, None)


def test_the_function_of_the_page_gives_images(module):
    path = list(sys.path)
    module(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], "shapes")
    listing = listing_of(PAGE_SOURCES["shapes"])
    assert sys.path == path
    assert listing.classes == 2
    assert listing.splits["train"].arrays.shape == (400, 3, 32, 32)
    assert listing.splits["val"].labels.tolist() == [0, 1] * 50


def test_a_function_may_return_paths_and_names_or_a_listing(module):
    text = "def load():\n return {'test': (['c.png'], ['x']), 'train': (['a.png', 'b.png'], ['y', 'x'])}"
    listing = listing_of(module(text))
    assert listing.splits["train"].files == (Path("a.png"), Path("b.png"))
    assert labels(listing) == {"train": [1, 0], "test": [0]}
    text = "from tocom.data.listing import Items, Listing\nimport numpy as np\n"
    text += "items = Items(np.zeros(2, int), arrays=np.zeros((2, 3, 4, 4), np.uint8))\n"
    text += "def load(): return Listing(5, 'my group', 'me', dict.fromkeys(['train', 'test'], items))"
    listing = listing_of(module(text))
    assert (listing.classes, listing.group, listing.source, len(listing.splits["train"])) == (5, "my group", "me", 2)
    refuse(module(text.replace(", 'test']", "]")), "its Listing has splits train; it needs train and test")


ARRAYS = "import numpy as np\nx = np.zeros((2, 3, 4, 4), np.uint8)\ndef load(**more):\n return "
PATHS = "def load():\n return {'train': (['a.png', './b.png'], [0, 1]), 'test': (['b.png'], [1])}"


@pytest.mark.parametrize(
    ("text", "options", "match"),
    [
        ("import nothing_like_this", {}, "cannot be imported .*nothing_like_this.*is looked for in /"),
        ("def lode(): pass", {}, "cannot be imported .*no attribute 'load'"),
        ("def load(a): pass", {}, "missing a required argument: 'a'; mend it or `arguments:`"),
        ("def load(): pass", {"arguments": {"b": 1}}, "unexpected keyword argument 'b'"),
        ("def load(): raise KeyError('oh')", {}, "own_module:load raised KeyError: 'oh'"),
        ("def load(): pass", {}, "own_module:load returned NoneType"),
        (ARRAYS + "{'train': (x, [0, 1]), 'test': (x, [0])}", {}, "test has 2 images but 1 labels"),
        (ARRAYS + "{'train': (x, [0, 1]), 'test': (x, [0, 2])}", {}, "class 2 is in test but not in train"),
        (ARRAYS + "{'train': (x, [0, 0.5]), 'test': (x, [0, 1])}", {}, "not all whole numbers or all names"),
        (ARRAYS + "{'train': (x / 2, [0, 1]), 'test': (x, [0, 1])}", {}, r"images of train are float64 .*uint8"),
        (ARRAYS + "{'train': (['x.png'], [0]), 'test': (x, [0, 0])}", {}, "there is no file x.png"),
        (PATHS, {}, "b.png is in train and in test"),
    ],
)
def test_a_function_that_does_not_do_its_work_is_named(module, text, options, match):
    refuse(module(text, **options), match)
