"""Code of somebody else's: what may be imported, by whom, and how another process gets the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import PATIENCE_S

from scoreray.data.errors import UserError
from scoreray.data.own_code import (
    VARIABLE,
    bring,
    brought,
    code_hash,
    environment,
    gate,
    instance,
    is_own,
    load,
    name_in_command,
    py_modules,
    require,
    with_words,
)

MARK = "import os, pathlib\npathlib.Path(__file__).with_name('imported').touch()\nclass Net: pass\n"


@pytest.mark.parametrize(
    ("kind", "own"),
    [("mynet:Net", True), ("a.b_1.c:D", True), ("unet", False), ("s3://a", False), ("a:b.c", False), ("a:", False),
     (":a", False), ("a b:c", False), ("1a:b", False), ("a\n:b", False), ("a:b\n", False), (None, False), (3, False)],
)  # fmt: skip
def test_a_kind_with_a_colon_is_somebody_elses(kind: object, own: bool) -> None:
    assert is_own(kind) is own


def test_nothing_is_imported_that_was_not_brought(own_package: Callable[..., Path]) -> None:
    folder = own_package("beside", brought=False, net=MARK)
    sys.path.insert(0, str(folder.parent))
    try:
        for kind in ("os:system", "subprocess:run", "beside.net:Net", "beside:Net"):
            with pytest.raises(
                UserError, match=rf"^--scorer '{kind}' is code .*: --with {kind.split('.')[0].split(':')[0]}"
            ):
                load(kind, "--scorer")
            with pytest.raises(UserError, match=rf"^model\.json: '{kind}' is code"):
                require({"network": {"kind": kind}}, "model.json")
        assert not list(folder.glob("imported*"))
        assert "beside" not in sys.modules
        name_in_command({"network": [{"kind": "beside.net:Net"}]})
        require({"network": {"kind": "beside.net:Net"}}, "model.json")
        assert load("beside.net:Net", "kind").__name__ == "Net"
        assert (folder / "imported").exists()
    finally:
        sys.path.remove(str(folder.parent))


@pytest.mark.parametrize("kind", ["scoreray.data.own_code.gate:bring", "scoreray.data.own_code.gate:find_spec"])
def test_a_stored_name_reaches_no_function_of_ours(kind: str) -> None:
    """`bring` in a model's file would let a second file import anything."""
    name_in_command({"scorer": kind})  # not even where a command names it
    with pytest.raises(UserError, match=rf"^network.module '{kind}' is no part; accepted of scoreray's own: "):
        load(kind, "network.module")
    with pytest.raises(UserError, match=r"^--with scoreray: "):
        bring(["scoreray"])
    assert load("scoreray.data.shapes:MatchesCaption", "--scorer").__name__ == "MatchesCaption"


def test_what_brought_code_imports_is_none_of_its_parts(own_package: Callable[..., Path]) -> None:
    own_package(
        "importing", net="from subprocess import Popen\nfrom importing.inner import Net\n", inner="class Net: pass\n"
    )
    assert load("importing.net:Net", "kind").__module__ == "importing.inner"
    with pytest.raises(
        UserError, match=r"^kind 'importing.net:Popen': Popen is subprocess's, not defined in importing$"
    ):
        load("importing.net:Popen", "kind")


def test_code_that_ends_the_process_is_one_line(own_package: Callable[..., Path]) -> None:
    own_package("ending", net="import sys\nsys.exit(3)\n")
    with pytest.raises(UserError, match=r"^kind 'ending.net:Net': can't be imported on .*: SystemExit: 3"):
        load("ending.net:Net", "kind")


def test_a_path_brings_one_package_and_not_what_is_beside_it(own_package: Callable[..., Path]) -> None:
    folder = own_package("theirs_a", part="class One: pass")
    own_package("theirs_b", brought=False, part=MARK)
    assert load("theirs_a.part:One", "kind").__module__ == "theirs_a.part"
    with pytest.raises(ModuleNotFoundError):
        __import__("theirs_b")
    single = folder.parent / "theirs_c.py"
    single.write_text("class Three:\n    pass\n")
    bring([str(single)])
    assert isinstance(instance("theirs_c:Three", "--scorer"), load("theirs_c:Three", "kind"))
    assert {str(folder), str(single)} <= set(brought())
    bring([str(folder / "__init__.py")])  # the package that it is of
    assert "__init__" not in gate._paths
    assert with_words()[:2] == ["--with", str(folder)]
    assert set(py_modules()) == {str(folder), str(single)}


def test_what_can_not_be_brought_is_one_line(own_package: Callable[..., Path], tmp_path: Path) -> None:
    folder = own_package("theirs_d", part="")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").touch()
    (tmp_path / "yaml.py").touch()
    (tmp_path / "diffusers.py").touch()  # installed, and not imported yet
    (tmp_path / "my-net.py").touch()
    (tmp_path / "other" / "theirs_d").mkdir(parents=True)
    (tmp_path / "other" / "theirs_d" / "__init__.py").touch()
    for entry, message in (
        (tmp_path / "absent", "there is no such folder or file"),
        (folder.parent, r"it holds theirs_d: --with .*/theirs_d"),
        (tmp_path / "json", "would hide the module json"),
        (tmp_path / "yaml.py", "would hide another yaml, of "),
        (tmp_path / "diffusers.py", "would hide another diffusers, of "),
        (tmp_path / "my-net.py", "'my-net' is no name of a module"),
        (tmp_path / "other" / "theirs_d", "theirs_d is brought already, from"),
        ("", "is empty; give"),
        ("not_installed_here", "no package of this name is installed on"),
        ("no name", "no package of this name is installed on"),
    ):
        with pytest.raises(UserError, match=rf"^--with {entry}: .*{message}") as refused:
            bring([str(entry)])
        assert "\n" not in str(refused.value)


def test_what_is_wrong_with_the_code_is_one_line_with_the_machine_and_where_it_looked(
    own_package: Callable[..., Path],
) -> None:
    folder = own_package("theirs_e", fails="raise RuntimeError('first\\nsecond')", needs="import not_there_at_all",
                         part="def known(): pass\nclass Odd:\n    def __init__(self, x): pass")  # fmt: skip
    host = os.uname().nodename
    for kind, message in (
        ("theirs_e.fails:A", f"can't be imported on {host}: RuntimeError: first second"),
        (
            "theirs_e.needs:A",
            f"ModuleNotFoundError: No module named 'not_there_at_all' \\(theirs_e/needs.py:1\\); looked in {folder}",
        ),
        ("theirs_e.absent:A", "No module named 'theirs_e.absent'"),
        ("theirs_e.part:knwon", "theirs_e.part has no 'knwon'; did you mean 'known'"),
        ("theirs_e.part:Odd", r"Odd\(\) failed: TypeError"),
        ("no_colon", "write package.module:Name"),
    ):
        with pytest.raises(UserError, match=f"^--scorer '{kind}': .*{message}") as refused:
            instance(kind, "--scorer")
        assert "\n" not in str(refused.value)


def test_another_process_has_the_same_by_a_variable_or_an_entry_point(
    own_package: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own_package("theirs_f", part="class One: pass")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    installed = tmp_path / "installed"
    (installed / "theirs_g-1.dist-info").mkdir(parents=True)
    (installed / "theirs_g-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs_g\nVersion: 1\n")
    (installed / "theirs_g-1.dist-info" / "entry_points.txt").write_text("[scoreray]\nany = theirs_g\n")
    (installed / "theirs_g.py").write_text("class Two: pass")
    code = (
        "from scoreray.data.own_code import load\nimport sys\nassert 'pydantic' not in sys.modules\n"
        "print(load('theirs_f.part:One', 'kind').__name__, load('theirs_g:Two', 'kind').__name__)"
    )
    variables = {**os.environ, **environment(), "PYTHONPATH": str(installed)}
    assert variables[VARIABLE].split(":")[0] == str(folder)
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.stdout == "One Two\n", done.stderr
    assert environment(on_cluster=True)[VARIABLE].split(":")[0] == "theirs_f"  # Ray has copied the folder there


def test_the_hash_is_of_the_package_s_sources_alone(own_package: Callable[..., Path]) -> None:
    folder = own_package("theirs_h", a="x = 1", b="y = 2")
    before = code_hash("theirs_h.a:x")
    code_hash.cache_clear()
    (folder / "notes.txt").write_text("no code")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"1")
    os.utime(folder / "a.py", (1, 1))
    assert code_hash("theirs_h.b:y") == before
    code_hash.cache_clear()
    (folder / "b.py").rename(folder / "c.py")
    assert code_hash("theirs_h.a:x") != before
