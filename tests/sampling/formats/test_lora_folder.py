"""LoRAs as peft and diffusers store them: both load what we write, we read what they write, and all give the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from scoreray.cluster.cli.main import app
from scoreray.cluster.verbs.export import ExportOptions, export_model
from scoreray.data.errors import DataError, ScorerayError, UserError
from scoreray.sampling.formats.import_lora import import_lora
from scoreray.sampling.imports.import_diffusers import ImportOptions, import_diffusers
from scoreray.sampling.model.adapters import AdaptedNetwork, find_adapters
from scoreray.sampling.model.load import load
from scoreray.trainer.checkpoints.stored_model import find_model
from scoreray.trainer.config import load_config
from scoreray.trainer.diffusion.condition import Condition
from scoreray.trainer.loop import train

ADAPTERS, OF_DIFFUSERS = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
GENERATOR = torch.Generator().manual_seed(0)
X, SIGMA = torch.randn(3, 4, 8, 8, generator=GENERATOR), torch.tensor([0.1, 1.0, 9.0])
TOKENS = torch.randn(3, 3, 12, generator=GENERATOR)
PROMPT = Condition({"prompt": TOKENS}, {"prompt": torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()})


def assert_same(found: Tensor, expected: Tensor) -> None:
    """To 1e-6 of the largest value."""
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6


def drawn(url: str) -> Tensor:
    return load(url, device="cpu")(X[:, :1], SIGMA, torch.tensor([0, 1, -1]))


def test_peft_loads_an_export_and_it_is_a_model_of_ours(lora_urls: dict[str, str], tmp_path: Path) -> None:
    from peft import PeftModel

    out, expected = str(tmp_path / "style"), drawn(lora_urls["style"])
    text = export_model(lora_urls["style"], out, (), ExportOptions("lora")).text()
    assert "PeftModel.from_pretrained(denoiser.network" in text
    assert not (tmp_path / "style" / OF_DIFFUSERS).exists()
    theirs = load(lora_urls["base"], device="cpu")
    theirs.network = PeftModel.from_pretrained(theirs.network, out)
    assert_same(theirs(X[:, :1], SIGMA, torch.tensor([0, 1, -1])).detach(), expected)
    assert float((expected - drawn(lora_urls["base"])).abs().max()) > 0.01
    assert torch.equal(drawn(out), expected)
    export_model(lora_urls["base"], str(tmp_path / "copy"), ["0.05"])
    copy = find_model(str(tmp_path / "copy"))
    assert find_adapters([("style", out)], copy).keys() == {"style"}  # the same weights in another file
    import_lora(out, str(tmp_path / "again"), copy.url)
    assert torch.equal(drawn(str(tmp_path / "again")), expected)
    for place, message in ((copy.url, "is the model itself"), (out, "is the folder that it is imported from")):
        with pytest.raises(UserError, match=message):
            import_lora(out, place, copy.url)
    with pytest.raises(UserError, match=r"a LoRA of another model: of \S+base/checkpoints"):
        find_adapters([("style", out)], find_model(lora_urls["ink"]))
    with pytest.raises(UserError, match=r"holds one EMA length, not 0\.050, none; give one --ema"):
        export_model(lora_urls["style"], out, ["0.05", "none"], ExportOptions("lora"))
    with pytest.raises(UserError, match=r"base/checkpoints.* holds no adapters"):
        export_model(lora_urls["base"], out, (), ExportOptions("lora"))


def text_unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=12, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: unet/ of diffusers, `model` imported from it, `peft` a LoRA of it with ranks and scales by layer."""
    from diffusers import DDPMScheduler
    from peft import LoraConfig, get_peft_model

    place = tmp_path_factory.mktemp("foreign")
    network = text_unet()
    network.save_pretrained(place / "unet")
    DDPMScheduler(clip_sample=False).save_pretrained(place / "scheduler")
    import_diffusers(str(place / "unet"), str(place / "model"), ImportOptions(str(place / "scheduler"), length=3))
    config = LoraConfig(r=2, lora_alpha=3, target_modules=r".*\.(to_q|to_v|to_out\.0)|conv_in", use_rslora=True,
                        rank_pattern={"to_v": 3}, alpha_pattern={"conv_in": 5})  # fmt: skip
    adapted = get_peft_model(network, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3, generator=GENERATOR)
    adapted.save_pretrained(place / "peft")
    return place


def with_network(place: Path, change: Callable[[Any], Any]) -> Tensor:
    """What the imported model gives when diffusers' own network in it is changed."""
    model: Any = load(str(place / "model"), device="cpu")
    model.network.network = change(model.network.network) or model.network.network
    with torch.no_grad():
        return model(X, SIGMA, PROMPT)


def test_loras_of_peft_and_of_diffusers_are_read_and_both_read_ours(foreign: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    expected = with_network(foreign, lambda network: PeftModel.from_pretrained(network, str(foreign / "peft")))
    before, out = with_network(foreign, lambda network: None), tmp_path / "out"
    assert float((expected - before).abs().max()) > 0.01
    import_lora(str(foreign / "peft"), str(out), str(foreign / "model"))
    assert_same(load(str(out), device="cpu")(X, SIGMA, PROMPT), expected)
    assert_same(with_network(foreign, lambda network: PeftModel.from_pretrained(network, str(out))), expected)
    options = {"prefix": "unet", "use_safetensors": True}
    assert_same(with_network(foreign, lambda network: network.load_lora_adapter(str(out), **options)), expected)
    (tmp_path / "file").mkdir()
    state = load_file(out / OF_DIFFUSERS) | {"text_encoder.q.lora_A.weight": torch.zeros(1)}
    save_file(state, tmp_path / "file" / "style.safetensors")
    command = ["import", "lora", str(tmp_path / "file"), str(tmp_path / "again"), "--base", str(foreign / "model")]
    done = CliRunner().invoke(app, command)
    assert "left out: text_encoder.q.lora_A.weight\n" in done.output, done.exception
    assert_same(load(str(tmp_path / "again"), device="cpu")(X, SIGMA, PROMPT), expected)
    served, base = load(str(foreign / "model"), device="cpu"), find_model(str(foreign / "model"))
    network: Any = AdaptedNetwork(served.network, find_adapters([("style", str(out))], base)).eval()  # type: ignore[arg-type]
    served.network = network
    network.choose(["style", "", "style"])
    with torch.no_grad():
        mixed = served(X, SIGMA, PROMPT)
    assert_same(mixed[[0, 2]], expected[[0, 2]])
    assert torch.equal(mixed[1], before[1])


def test_a_lora_of_a_network_of_diffusers_trains(
    small_run: Callable[..., dict[str, Any]], small_set: str, tmp_path: Path
) -> None:
    """Its export has diffusers' names, and is what a run can begin from."""
    from diffusers import DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ["AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D"], "norm_num_groups": 4}
    net = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, num_class_embeds=3, block_out_channels=[8],
                      layers_per_block=1, attention_head_dim=4, **blocks)  # fmt: skip
    net.save_pretrained(tmp_path / "unet")
    DDPMScheduler(clip_sample=False).save_pretrained(tmp_path)
    import_diffusers(str(tmp_path / "unet"), str(tmp_path / "base"), ImportOptions(str(tmp_path)))
    known = find_model(str(tmp_path / "base")).config.model_dump(mode="json")
    sections = {key: known[key] for key in ("process", "network", "denoiser")}
    settings = small_run("style", tmp_path, 16, **sections, optimizer={"learning_rate": 0.1}, lora={"rank": 2},
                         init={"checkpoint": str(tmp_path / "base")})  # fmt: skip
    train(load_config(settings))
    assert train(load_config(settings, ["duration.images=32"])) == 32  # resumes
    export_model(str(tmp_path / "style"), str(tmp_path / "out"), (), ExportOptions("lora"))
    names = load_file(tmp_path / "out" / ADAPTERS)
    assert "base_model.model.mid_block.attentions.0.to_q.lora_A.weight" in names
    assert not (tmp_path / "out" / OF_DIFFUSERS).exists()
    label = torch.tensor([0, 1, 2])
    first, second = (load(str(tmp_path / name), device="cpu")(X[:, :1], SIGMA, label) for name in ("style", "out"))
    assert torch.equal(first, second)
    tuned = load_config(settings, ["run.name=whole", "lora=null", f"init.checkpoint={tmp_path}/out"])
    assert train(tuned) == 16


def changed(folder: Path, config: dict[str, Any] | None = None, **tensors: Tensor | None) -> None:
    """tensors: by the end of a name, in place of what is there; None removes it."""
    file = folder / ADAPTERS
    state = load_file(file)
    for end, tensor in tensors.items():
        name = next((one for one in state if one.endswith(end)), end)
        state = {key: value for key, value in state.items() if key != name} | ({} if tensor is None else {name: tensor})
    save_file(state, file)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))


CONV = "conv_in.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: changed(folder, **{CONV: None}), f"a LoRA of another network: missing: {CONV}$"),
        (lambda folder: changed(folder, **{"base_model.model.more.lora_A.weight": torch.ones(2, 2)}),
         "not of this network: more.lora_A.weight"),
        (lambda folder: changed(folder, **{CONV: torch.ones(2, 5, 3, 3)}),
         r"of other shapes: conv_in.lora_A.weight \[2, 5, 3, 3\] instead of \[2, 4, 3, 3\]"),
        (lambda folder: changed(folder, **{"conv_in.lora_magnitude_vector": torch.ones(8)}),
         "holds more than the halves"),
        (lambda folder: changed(folder, **{CONV: torch.full((2, 4, 3, 3), torch.nan)}), "numbers that are not finite"),
        (lambda folder: changed(folder, {"use_dora": True}), "use_dora True: plain LoRA alone"),
        (lambda folder: changed(folder, {"peft_type": "LOHA"}), "peft_type LOHA: plain LoRA alone"),
        (lambda folder: changed(folder, {"init_lora_weights": "pissa"}), "init_lora_weights pissa: plain LoRA alone"),
        (lambda folder: changed(folder, {"target_modules": ["nothing"]}), "can't be loaded into the base's network"),
        (lambda folder: (folder / ADAPTERS).write_bytes(b"x" * 99), "can't be read as safetensors"),
        (lambda folder: (folder / ADAPTERS).rename(folder / "adapter_model.bin"), "is a pickle"),
        (lambda folder: (folder / ADAPTERS).unlink(), "no such file, which adapter_config.json is about"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "can't be read as JSON"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "holds no tensors of a unet: base_model.model"),
        (shutil.rmtree, "no such folder"),
    ],
)  # fmt: skip
def test_what_is_no_lora_of_this_network_is_one_line(
    foreign: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    folder = tmp_path / "peft"
    shutil.copytree(foreign / "peft", folder)
    damage(folder)
    with pytest.raises(ScorerayError, match=message) as caught:
        import_lora(str(folder), str(tmp_path / "out"), str(foreign / "model"))
    assert isinstance(caught.value, UserError | DataError)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
