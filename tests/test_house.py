"""The rules of the house: parts by name in one place, a docstring a module, no circle of imports, names that import."""

import ast
import re
from pathlib import Path

import pytest

import tocom
from tocom.methods import PARTS
from tocom.parts import part_class

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.glob("tocom/**/*.py"))
}
SOURCES = [*MODULES.values(), *sorted(ROOT.glob("workflow/**/*.smk")), ROOT / "Snakefile"]
REGISTRY = ROOT / "tocom" / "methods" / "__init__.py"
#: Names that mean other things, too.
COMMON = {"full", "head", "none", "tocom", "topk"}
#: Place of a part -> what must not be found outside of its file: its name as a word, or as a quoted one.
FOREIGN = {place: rf"\b{name}\b" for names in PARTS.values() for name, place in names.items() if name not in COMMON}
FOREIGN["tocom.methods.tocom:ToCom"] = r"""(?<!module )["']tocom["']|\bToCom\("""


@pytest.mark.parametrize("place", FOREIGN, ids=lambda place: place.partition(":")[2])
def test_a_part_is_named_in_its_own_file_and_in_the_registry_alone(place):
    module = place.partition(":")[0]
    found = []
    for path in SOURCES:
        if path in (MODULES[module], REGISTRY):
            continue
        text = path.read_text(encoding="utf-8")
        if path.parent == REGISTRY.parent:  # a part may build on another
            text = text.replace(module, "")
        lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if re.search(FOREIGN[place], line)]
        found += [f"{path.relative_to(ROOT)}:{n}: {line.strip()}" for n, line in lines]
    assert not found, "\n".join(found)


def test_every_module_starts_by_saying_what_lives_in_it():
    silent = []
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        first = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
        if not (text.startswith('"""') and len(first) > 20 and first.endswith((".", ":", "?"))):
            silent.append(name)
    assert not silent


@pytest.mark.parametrize("kind", [kind for role in ("compressor", "compensator") for kind in PARTS[role]])
def test_every_compressor_and_compensator_has_a_page_and_tests(kind):
    page = (ROOT / "docs" / "methods" / f"{kind}.md").read_text(encoding="utf-8")
    assert (
        part_class("compressor" if kind in PARTS["compressor"] else "compensator", kind).title.lower() in page.lower()
    )
    assert re.search(rf"\b{kind}\b", page)
    assert (ROOT / "tests" / "methods" / f"test_{kind}.py").is_file()


def imported(name):
    """Return the modules of the package that a module imports, inside functions too, but not for types alone."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {module for module in found if module in MODULES and module != name} - {"tocom"}


def test_imports_go_in_no_circle():
    imports = {name: imported(name) for name in MODULES}
    done, path = set(), []

    def visit(name):
        if name in path:
            pytest.fail(" -> ".join([*path[path.index(name) :], name]))
        if name not in done:
            path.append(name)
            for other in sorted(imports[name]):
                visit(other)
            done.add(path.pop())

    for name in sorted(imports):
        visit(name)


@pytest.mark.parametrize("name", tocom.__all__)
def test_what_the_package_offers_can_be_imported(name):
    assert getattr(tocom, name) is not None
