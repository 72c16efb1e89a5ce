"""CONTRIBUTING.md is followed, on a copy: its code is put where it says, and what it says works then is run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE_S

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
FOLDERS = ("data", "trainer", "sampling", "tune", "cluster", "configs", "tests")
HABITS = dict(re.findall(r"^### (.*?)\n(.*?)(?=^### |\Z)", GUIDE.partition("## How to add")[2], re.M | re.S))
BLOCK = re.compile(
    r"^```python\n(?:# (\S+), (at the end|a new file|below|instead of)(?: \"([^\n]*)\")?\n)?(.*?)^```", re.M | re.S
)


def put(file: Path, where: str, anchor: str, code: str) -> None:
    """A block of code into a file: at its end, below the line that holds `anchor`, or instead of it."""
    if where == "a new file":
        assert not file.exists(), file
        file.write_text(code)
        return
    text = file.read_text()
    if where == "at the end":
        file.write_text(f"{text}\n\n{code}")
    else:
        assert text.count(anchor) == 1, f"{file}: {anchor!r} stands there {text.count(anchor)} times"
        before, _, after = text.partition(anchor)
        line, _, rest = after.partition("\n")
        file.write_text(
            f"{before}{anchor}{line}\n{code}{rest}" if where == "below" else f"{before}{code.rstrip(chr(10))}{after}"
        )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our folders with the code of every habit in its place, as a package beside them."""
    package = tmp_path_factory.mktemp("contributed") / "scoreray"
    ignored = shutil.ignore_patterns("__pycache__", "*.npz", "typing", ".*")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, package / folder, ignore=ignored)
    for habit, text in HABITS.items():
        blocks = BLOCK.findall(text)
        assert [where for _, where, _, _ in blocks][-1:] == [""], f"{habit}: ends without what works then"
        for name, where, anchor, code in blocks:
            if where:
                put(package / name, where, anchor, code)
    return package


def test_the_code_of_every_habit_works_where_the_guide_puts_it(copy: Path) -> None:
    script = copy.parent / "tried.py"
    tried = [
        f"# {habit}\n{code}"
        for habit, text in HABITS.items()
        for *_, where, _, code in BLOCK.findall(text)
        if not where
    ]
    assert len(tried) >= 6
    start = "import scoreray.data.presets\nfrom scoreray.data.presets import PRESETS\n"
    start += f"assert scoreray.data.presets.__file__.startswith({str(copy)!r}), scoreray.data.presets.__file__\n"
    script.write_text(start + "\n".join(tried))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=copy.parent, env={"PYTHONPATH": str(copy.parent), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_every_file_and_name_of_the_guide_exists() -> None:
    """`file` (`NAME`, `NAME`): the file defines or imports the names."""
    for name in set(re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", GUIDE)):
        assert (ROOT / name).exists(), name
    pairs = re.findall(r"`([\w/]+\.py)`\s+\(((?:`\w+`(?:,\s)?)+)\)", GUIDE)
    assert len(pairs) > 2
    for file, names in pairs:
        for name in re.findall(r"\w+", names):
            assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), f"{file} has no {name}"
