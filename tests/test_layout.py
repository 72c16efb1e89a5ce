"""The package is what its layout promises: one-way imports, a wheel that holds everything, presets that are valid."""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import update_index
import yaml
from packaging.requirements import Requirement
from waiting import PATIENCE_S

from scoreray.cluster.wheel import LEFT_OUT, build_wheel
from scoreray.data.extras import EXTRAS, install
from scoreray.data.presets import bundled_images, preset
from scoreray.trainer.config import load_config
from scoreray.trainer.objectives.denoising import EDMObjective
from scoreray.trainer.optim.optimizer import OptimizerConfig

ROOT = Path(__file__).parent.parent
FOLDERS = ("data", "trainer", "sampling", "tune", "cluster")
ROOMS = (
    "data", "data.own_code", "data.storage", "data.fields", "data.reading", "data.buckets", "data.sources",
    "data.tables", "data.packing", "data.unpacked", "data.webdataset",
    "trainer.flows", "trainer.energies", "trainer.diffusion", "trainer.objectives", "trainer.networks",
    "trainer.monitoring", "trainer.optim", "trainer.engine", "trainer.config", "trainer.checkpoints",
    "trainer.encoders", "trainer",
    "trainer.tracking", "trainer.on_ray",
    "sampling.samplers", "sampling.grids", "sampling.model", "sampling.imports", "sampling.guidance",
    "sampling.measures", "sampling.offline", "sampling.representations", "sampling.encoding",
    "sampling.metrics", "sampling.evaluation", "sampling.formats", "sampling.service", "sampling.http", "sampling",
    "tune",
    "cluster", "cluster.connect", "cluster.serve", "cluster.verbs", "cluster.doctor", "cluster.submit", "cluster.cli",
)  # fmt: skip
"""Every package, in the order of imports: a module imports from its own room and from those before it, no others."""
PACKAGE = (
    "cluster/package"  # what `import scoreray` finds; a folder of that name in the repository would hide the others
)
SHORT_PATHS = {
    "data.stream": "data.reading.stream",
    "trainer.process": "trainer.diffusion.process",
    "trainer.denoiser": "trainer.diffusion.denoiser",
    "sampling.sigmas": "sampling.samplers.sigmas",
    "sampling.load": "sampling.model.load",
    "sampling.batcher": "sampling.service.batcher",
}
"""Names that others call -> where they are. Nothing of ours imports the short ones."""
WITHOUT_RAY = ("trainer", "sampling")
NEEDS_AN_EXTRA = {"sampling.formats.diffusers_pipeline"}  # imported by diffusers, and by nothing of ours
PRIVATE_NAMES = {
    "cluster.hooks": {
        "ray._private.node.wait_for_persisted_port", "ray._private.services.get_node",
        "ray._private.worker.print_to_stdstream", "ray._raylet.GcsClient",
        "ray.experimental.internal_kv._internal_kv_get", "ray.serve.context._get_global_client",
    },
    "cluster.connect.local_ray": {"_node_ip_address", "_temp_dir"},  # of ray.init, whose docstring describes them
    "data.storage.s3": {"_raw_stream"},  # botocore's StreamingBody has no deadline of its own
    "trainer.on_ray.hooks": {
        "_create_default_callbacks", "_initialize_and_run_controller", "_maybe_send_resource_request",
        "ray._private.grpc_utils", "ray._private.grpc_utils.init_grpc_channel", "ray._private.utils",
        "ray._private.utils.get_runtime_env_info", "ray.train.v2._internal", "ray.train.v2._internal.constants",
        "ray.train.v2._internal.execution.worker_group.worker",
    },
    "trainer.diffusion.buffers": {"_apply"},  # what every torch.nn.Module is cast and moved by
}  # fmt: skip
"""Module -> private names of other packages that it uses. A new one needs a guard, and a line that says what is weaker
where a version does not have it (`cluster/hooks.py`)."""


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name without `scoreray.` -> file, of every module on the disk, at any depth."""
    found = {}
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            if file.is_relative_to(ROOT / PACKAGE):
                continue
            found[".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = file
    return found


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imported(tree: ast.AST) -> set[str]:
    """Every name that is imported anywhere in a module, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports; the short paths, which only re-export, left out."""
    known, graph = modules(), {}
    for module in set(known) - set(SHORT_PATHS):
        names = imported(parsed(known[module]))
        assert not any(name.split(".")[0] in FOLDERS for name in names), f"{module}: import scoreray.<folder> instead"
        ours = {name.removeprefix("scoreray.") for name in names if name.startswith("scoreray.")} & set(known)
        packages = {name for name in ours if known[name].name == "__init__.py"}
        parents = {package for package in packages if any(name.startswith(f"{package}.") for name in ours)}
        graph[module] = ours - parents - {module}
    return graph


def room(module: str) -> str:
    return ".".join(modules()[module].relative_to(ROOT).parts[:-1])


def test_imports_go_one_way_at_any_depth() -> None:
    known = {module: ROOMS.index(room(module)) for module in modules()}
    wrong = [f"{a} imports {b}" for a, names in imports().items() for b in names if known[b] > known[a]]
    assert not wrong
    assert {ROOMS[number] for number in known.values()} == set(ROOMS)


def private_names(tree: ast.AST) -> set[str]:
    """Names with a leading underscore that a module uses and does not define: of imports, attributes, keyword arguments
    and strings that name one; those of `self` and `cls` are its own."""
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    found = {name for name in imported(tree) if name.split(".")[0] not in {"scoreray", *sys.stdlib_module_names}}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "os")
            found |= set() if own or (node.attr in defined and "super()" not in ast.unparse(node)) else {node.attr}
        elif isinstance(node, ast.keyword) and node.arg not in defined:
            found.add(node.arg or "")
        elif isinstance(node, ast.Constant) and re.fullmatch(
            r"(ray|deepspeed|torch|typer|click)(\.\w+)+", str(node.value)
        ):
            found.add(str(node.value))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            found |= {ast.literal_eval(one) for one in node.args[1:2] if isinstance(one, ast.Constant)}
    return {name for name in found if re.search(r"(^|\.)_[A-Za-z]", name)}


def test_private_names_of_other_packages_are_in_guarded_modules() -> None:
    found = {module: private_names(parsed(file)) for module, file in modules().items()}
    assert {module: names for module, names in found.items() if names} == PRIVATE_NAMES


def test_no_two_modules_import_each_other() -> None:
    graph = imports()
    reached: dict[str, set[str]] = {}
    for module in graph:
        seen, open_ = set(), [*graph[module]]
        while open_:
            if (name := open_.pop()) not in seen:
                seen.add(name)
                open_ += graph.get(name, ())
        reached[module] = seen
    circles = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    assert not circles


def test_short_paths_are_the_same_names_and_nothing_of_ours_uses_them() -> None:
    for short, module in SHORT_PATHS.items():
        facade, home = (importlib.import_module(f"scoreray.{name}") for name in (short, module))
        assert facade.__all__
        assert all(getattr(facade, name) is getattr(home, name) for name in facade.__all__)
    assert not [f"{a} imports {b}" for a, names in imports().items() for b in names if b in SHORT_PATHS]
    tree = ast.parse((ROOT / "tests" / "test_layout.py").read_text())
    assert "importlib" in imported(tree)  # the reader reads


def test_a_room_has_about_fifteen_files_at_most() -> None:
    counts = Counter(room(module) for module in modules())
    assert not {name: count for name, count in counts.items() if count > 16 + 1}


def test_the_mathematics_needs_neither_ray_nor_deepspeed() -> None:
    names = [name for name in modules() if name.split(".")[0] in WITHOUT_RAY and not name.startswith("trainer.on_ray")]
    assert not {name for imported in imports().values() for name in imported} & NEEDS_AN_EXTRA
    names = sorted({*names} - NEEDS_AN_EXTRA)
    code = "import sys\n" + "".join(f"import scoreray.{name}\n" for name in names)
    code += "assert not {'ray', 'deepspeed'} & set(sys.modules), {'ray', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)


def test_the_command_line_is_read_without_torch_and_ray() -> None:
    """They take seconds to import: a mistake in a word, --help, and what packs data don't wait for them."""
    code = "import sys\nimport scoreray.cluster.cli.main\nimport scoreray.cluster.verbs.pack\n"
    code += "heavy = {'torch', 'ray', 'scipy', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)


def test_packages_are_listed() -> None:
    """A sub-package that is not listed would work editable and be missing from the wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted(["scoreray", *(f"scoreray.{name}" for name in (*ROOMS, "configs"))])
    assert settings["package-dir"] == {
        "scoreray": PACKAGE,
        **{f"scoreray.{folder}": folder for folder in (*FOLDERS, "configs")},
    }
    for name in ROOMS:
        assert (ROOT / name.replace(".", "/") / "__init__.py").exists()
    for folder in FOLDERS:
        assert (ROOT / folder / "py.typed").exists()
        assert (ROOT / "tests" / "typing" / "scoreray" / folder).resolve() == ROOT / folder


def test_the_wheel_holds_everything_and_runs_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", f"file://{ROOT}", str(source)], check=True)
    for folder in (*FOLDERS, "configs", "pyproject.toml", "README.md"):  # what is not committed yet counts too
        subprocess.run(["cp", "-r", str(ROOT / folder), str(source)], check=True)
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True, timeout=PATIENCE_S)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"scoreray/{path.relative_to(ROOT)}".replace(f"{PACKAGE}/", "")
        for folder in (*FOLDERS, "configs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert wanted <= names, sorted(wanted - names)
    submitted = set(zipfile.ZipFile(build_wheel(tmp_path)).namelist())
    assert {name for name in wanted if not name.endswith(LEFT_OUT)} <= submitted
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)  # all that installing a wheel of pure Python is, but for its script
    code = f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv[0] = 'scoreray'; " + (
        "from scoreray.cluster.cli import main as cli; assert cli.__file__.startswith(sys.path[0]), cli.__file__; "
        "cli.main()"
    )
    # -S would drop dependencies too; -P and the prepended site make the wheel's copy win over the editable one
    words = ["train", "configs/cifar10.yaml", "--print-config"]  # as the README has it, where no such folder is
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert result.returncode == 0, result.stderr
    assert load_config(yaml.safe_load(result.stdout)) == load_config(ROOT / "configs" / "cifar10.yaml")
    environment = {**os.environ, "PYTHONPATH": str(site)}
    for words in (
        ["-m", "scoreray", "--version"],
        ["-c", "import scoreray; print(scoreray.__version__, scoreray.__file__)"],
    ):
        result = subprocess.run(
            [sys.executable, "-P", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env=environment,
        )
        assert result.stdout.split()[0] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert str(site) in result.stdout


def test_a_local_file_comes_before_the_preset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("configs/demo.yaml", "configs/few-step/consistency.yaml", "./configs/tune/both.yaml"):
        assert preset(Path(name)) == ROOT / name
    for name in ("configs/nope.yaml", "configs", "demo.yaml", "configs/tune"):
        assert preset(Path(name)) == Path(name)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").touch()
    assert preset(Path("configs/demo.yaml")) == Path("configs/demo.yaml")
    assert bundled_images("fashion-mnist.npz") == str(ROOT / "data" / "fashion-mnist.npz")
    assert bundled_images("other.npz") == "other.npz"
    (tmp_path / "fashion-mnist.npz").touch()
    assert bundled_images("fashion-mnist.npz") == "fashion-mnist.npz"


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
    unions = {"metrics": {"evaluate"}, "serve": {"otel", "redis"}, "latents": {"diffusers"},
              "science": {"arrays", "flows"}, "all": set(EXTRAS)}  # fmt: skip
    for name, wanted in unions.items():
        (union,) = map(Requirement, listed[name])
        assert (union.name, union.extras) == ("scoreray", wanted)
    assert set(listed) == {*EXTRAS, *unions, "dev", "benchmarks", "docs"}
    assert "scoreray[all]" in listed["dev"]
    for page in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md"):
        text = page.read_text()
        assert "pip install 'scoreray[" not in text, page
        for name in EXTRAS:
            assert f"'.[{name}]'" not in text or install(name).partition(" (")[0] in text, page
    rows = (ROOT / "docs" / "install.md").read_text()
    assert all(install(name).partition(" (")[0] in rows for name in EXTRAS)
    assert all(f"`{name}`" in rows for name in unions)


def test_the_readme_is_for_a_first_look() -> None:
    """Who wants more has the pages that it names."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


PRESETS = (path for folder in ("configs", "configs/few-step") for path in (ROOT / folder).glob("*.yaml"))


@pytest.mark.parametrize("preset", sorted(str(path.relative_to(ROOT)) for path in PRESETS))
def test_presets_are_valid(preset: str) -> None:
    config = load_config(ROOT / preset)
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


def test_the_readmes_tree_and_the_index_are_of_these_modules() -> None:
    """From docstrings: `python docs/tools/update_index.py` writes them."""
    for name, text in update_index.files().items():
        assert (ROOT / name).read_text() == text, f"{name} is old: python docs/tools/update_index.py"


def test_the_config_page_names_every_key() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    config = load_config(ROOT / "configs" / "demo.yaml", ["init.checkpoint=a", "lora.rank=1", "autoencoder.path=a"])
    for section, values in config.model_dump().items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{section}` |")]
        keys = [] if section in ("process", "network") else values
        assert all(f"`{key}`" in row for key in keys), (section, list(keys))
