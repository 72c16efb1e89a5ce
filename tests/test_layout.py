"""The package is what its layout promises: one-way imports, a wheel that holds everything, presets that are valid."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from scoreray.cluster.wheel import LEFT_OUT, build_wheel
from scoreray.data.extras import EXTRAS, install
from scoreray.trainer.config import load_config
from scoreray.trainer.objective import EDMObjective
from scoreray.trainer.optimizer import OptimizerConfig
from scoreray.trainer.presets import preset

ROOT = Path(__file__).parent.parent
ORDER = ("data", "trainer", "sampling", "tune", "cluster")
WITHOUT_RAY = (
    "process",
    "denoiser",
    "unet",
    "dit",
    "mlp",
    "network",
    "step",
    "loop",
    "objective",
    "optimizer",
    "engine",
)


def imported(tree: ast.AST, anywhere: bool = True) -> set[str]:
    nodes = ast.walk(tree) if anywhere else ast.iter_child_nodes(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("folder", ORDER)
def test_imports_go_one_way(folder: str) -> None:
    later = ORDER[ORDER.index(folder) + 1 :]
    for file in (ROOT / folder).glob("*.py"):
        names = imported(ast.parse(file.read_text()))
        for other in later:
            assert not any(name.startswith(f"scoreray.{other}") for name in names), f"{file} imports {other}"
        assert not any(name.split(".")[0] in ORDER for name in names), f"{file}: import scoreray.<folder> instead"


def test_the_mathematics_needs_neither_ray_nor_deepspeed() -> None:
    files = [ROOT / "trainer" / f"{name}.py" for name in WITHOUT_RAY] + list((ROOT / "sampling").glob("*.py"))
    code = "import sys\n" + "".join(
        f"import scoreray.{f.parent.name}.{f.stem}\n" for f in files if f.stem != "__init__"
    )
    code += "assert not {'ray', 'deepspeed'} & set(sys.modules), {'ray', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_folders_are_flat_and_listed() -> None:
    """A subpackage that is not listed would work editable and be missing from the wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted(f"scoreray.{folder}" for folder in (*ORDER, "configs"))
    assert settings["package-dir"] == {f"scoreray.{folder}": folder for folder in (*ORDER, "configs")}
    for folder in ORDER:
        assert not list((ROOT / folder).glob("*/*.py"))
        assert (ROOT / folder / "py.typed").exists()
        assert (ROOT / "tests" / "typing" / "scoreray" / folder).resolve() == ROOT / folder


def test_the_wheel_holds_everything_and_runs_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", f"file://{ROOT}", str(source)], check=True)
    for folder in (*ORDER, "configs", "pyproject.toml", "README.md"):  # what is not committed yet counts too
        subprocess.run(["cp", "-r", str(ROOT / folder), str(source)], check=True)
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"scoreray/{path.relative_to(ROOT)}"
        for folder in (*ORDER, "configs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert wanted <= names, sorted(wanted - names)
    submitted = set(zipfile.ZipFile(build_wheel(tmp_path)).namelist())
    assert {name for name in wanted if not name.endswith(LEFT_OUT)} <= submitted
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "-t", str(site), str(wheel)], check=True)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv[0] = 'scoreray'; " + (
        "from scoreray.cluster import cli; assert cli.__file__.startswith(sys.path[0]), cli.__file__; cli.main()"
    )
    # -S would drop dependencies too; -P and the prepended site make the wheel's copy win over the editable one
    words = ["train", "configs/cifar10.yaml", "--print-config"]  # as the README has it, where no such folder is
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert load_config(yaml.safe_load(result.stdout)) == load_config(ROOT / "configs" / "cifar10.yaml")


def test_a_presets_name_is_a_file_here_before_it_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("configs/demo.yaml", "./configs/tune/both.yaml"):
        assert preset(Path(name)) == ROOT / name
    for name in ("configs/nope.yaml", "configs", "demo.yaml", "configs/tune"):
        assert preset(Path(name)) == Path(name)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").touch()
    assert preset(Path("configs/demo.yaml")) == Path("configs/demo.yaml")


def test_every_config_that_the_docs_name_is_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
    named = {name for page in pages for name in re.findall(r"configs/[a-z0-9/-]+\.yaml", page.read_text())}
    assert len(named) > 7
    for name in named:
        assert preset(Path(name)).is_file(), name


def test_what_installs_an_extra_is_what_pyproject_lists_for_it() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name: tuple(listed[name]) for name in EXTRAS} == EXTRAS
    assert set(listed) == {*EXTRAS, "dev", "benchmarks"}
    for page in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md"):
        text = page.read_text()
        assert "pip install 'scoreray[" not in text, page
        for name in EXTRAS:
            assert f"'.[{name}]'" not in text or install(name) in text, page


@pytest.mark.parametrize("preset", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_presets_are_valid(preset: str) -> None:
    config = load_config(ROOT / "configs" / preset)
    assert config.duration.images >= config.data.global_batch_size


@pytest.mark.parametrize(
    ("preset", "batch", "rate", "images", "dropout", "flips"),
    [
        ("configs/cifar10.yaml", 512, 1e-3, 200_000_000, 0.13, 0.5),
        ("configs/imagenet64.yaml", 4096, 1e-4, 2_500_000_000, 0.1, 0.0),
        ("k8s/overlays/train/train.yaml", 4096, 1e-4, 2_500_000_000, 0.1, 0.0),
    ],
)
def test_presets_that_name_karras_2022_train_by_its_table_7(
    preset: str, batch: int, rate: float, images: int, dropout: float, flips: float
) -> None:
    config = load_config(ROOT / preset)
    assert config.objective == EDMObjective(label_dropout=0.1)
    assert config.optimizer == OptimizerConfig(learning_rate=rate, warmup_images=10_000_000)
    assert (config.data.global_batch_size, config.duration.images) == (batch, images)
    assert (config.network.dropout, config.augmentation.horizontal_flip) == (dropout, flips)


def test_the_shipped_images_are_small_and_licensed() -> None:
    assert (ROOT / "data" / "fashion-mnist.npz").stat().st_size < 6_000_000
    assert "MIT" in (ROOT / "data" / "fashion-mnist.LICENSE").read_text()


def test_the_readmes_tree_is_the_tree() -> None:
    """One line per module, from its docstring: `python docs/update_readme.py` writes it."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "docs" / "update_readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text()
    assert module.updated(readme) == readme, "run python docs/update_readme.py"


def test_the_config_page_names_every_key() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    config = load_config(ROOT / "configs" / "demo.yaml")
    for section, values in config.model_dump().items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{section}` |")]
        keys = [] if section in ("process", "network") else values
        assert all(f"`{key}`" in row for key in keys), (section, list(keys))
