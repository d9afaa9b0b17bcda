"""README.md tells the truth: line counts, commands, files. (Its measured figures name their commands.)"""
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_line_counts():
    rows = re.findall(r"\| `(\w+\.py)` \| ?(\d*) ?\|", README)
    assert len(rows) == 10                                 # one row a file of the house
    for name, lines in rows:
        exists = (ROOT / name).exists()
        assert exists == bool(lines), f"{name}: README says {lines or 'not built yet'}"
        if exists:
            actual = len((ROOT / name).read_text(encoding="utf-8").splitlines())
            assert int(lines) == actual, f"README says {name} has {lines} lines; it has {actual}"


def test_links_and_figures_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), f"README points to {target}, which is not there"


def commands():
    """(script, arguments) of every `python X.py ...` in the README."""
    found = re.findall(r"python ((?:tests/)?\w+\.py)((?: +[^\s`#|,.;)][^\s`#|,;)]*)*)", README)
    return sorted({(script, arguments.strip()) for script, arguments in found})


@pytest.mark.parametrize("script, arguments", commands())
def test_commands_parse(script, arguments):
    """Every flag exists and every value is of its type; nothing runs."""
    assert (ROOT / script).exists(), f"README names {script}, which is not there"
    words = ["x" if w.isupper() else w for w in shlex.split(arguments)]   # FOLDER, DIR: any path
    if script.startswith("tests/"):
        return
    module = importlib.import_module(script.removesuffix(".py"))
    if script == "train.py":
        module.check(module.settings(words)[0])
    else:
        module.parse_args(words)
