"""Models of latents: what they draw is decoded on every way out, by the autoencoder that their data set names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from waiting import PATIENCE_S

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.normalisation import to_uint8
from scoreray.data.storage.store import open_store
from scoreray.sampling.evaluation.evaluate import evaluate
from scoreray.sampling.evaluation.follow import check_evaluation, draw_sheet
from scoreray.sampling.formats.diffusers_folder import write_diffusers_folder
from scoreray.sampling.guidance.steering import Measurement
from scoreray.sampling.imports.import_diffusers import import_diffusers
from scoreray.sampling.metrics.plan import EvaluationSettings
from scoreray.sampling.model.describe import describe
from scoreray.sampling.model.export import export, model_to_export, write_model
from scoreray.sampling.model.load import load
from scoreray.sampling.model.row_queue import decode_queue
from scoreray.sampling.offline.generate import Request, generate
from scoreray.sampling.offline.job import begin, carry_out_job, in_this_process
from scoreray.sampling.offline.place import place_of
from scoreray.sampling.offline.plan import SamplePlan
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.checkpoints.stored_model import find_model
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.encoders.base import Autoencoder
from scoreray.trainer.encoders.load import (
    VARIABLE,
    _loaded,
    environment,
    load_autoencoder,
    load_encoder,
    name_autoencoders,
)
from scoreray.trainer.loop import train
from scoreray.trainer.prepare import prepare_run
from scoreray.trainer.run_data import open_run_data
from scoreray.trainer.run_folder import run_store

REQUEST = Request(count=3, steps=3, sampler="euler", batch_size=2)


@pytest.fixture(scope="module")
def run(latent_set: str, small_run: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of `latent_set`'s latents that has barely begun."""
    settings = small_run("latents", tmp_path_factory.mktemp("runs"), 32)
    settings["data"] = {"url": latent_set, "target": "latent", "global_batch_size": 16}
    config = prepare_run(load_config(settings, ["evaluation.sheet=4"])).config
    assert train(config) == 32
    return config


@pytest.fixture(scope="module")
def url(run: Config) -> str:
    return run_store(run).url()


def latents(url: str) -> torch.Tensor:
    """In the autoencoder's own units."""
    model = load(url, device="cpu")
    return model.info.unscaled(torch.cat([x for x, _ in generate(model, REQUEST)]))


def pictures(url: str, tiny_vae: str) -> np.ndarray:
    """uint8 [n, H, W, C], decoded by diffusers' own call."""
    from diffusers import AutoencoderKL

    with torch.no_grad():
        decoded = AutoencoderKL.from_pretrained(tiny_vae).decode(latents(url)).sample  # type: ignore[attr-defined]
    return to_uint8(decoded).permute(0, 2, 3, 1).numpy()


def drawn(url: str, out: Path, request: Request = REQUEST, **options: Any) -> np.ndarray:
    place = place_of(str(out))
    job, model, _ = begin(place, url, None, request, **options)
    carry_out_job(place, SamplePlan(job, place.shards.url(), model), in_this_process())
    return np.load(out)["images"]


def test_the_shape_of_the_network_and_that_of_what_is_drawn_have_a_name_each(url: str) -> None:
    info = describe(url).info
    assert (info.image_shape, info.sample_shape) == ((2, 4, 4), (1, 8, 8))
    assert (info.is_picture, info.sample_dtype) == (True, "uint8")
    raw = info.as_latents()
    assert (raw.sample_shape, raw.is_picture, raw.sample_dtype) == ((2, 4, 4), False, "float32")


def test_samples_are_decoded_and_raw_ones_are_the_latents(url: str, tiny_vae: str, tmp_path: Path) -> None:
    found = drawn(url, tmp_path / "a.npz").astype(int)
    assert found.shape == (3, 8, 8, 1)
    assert np.abs(found - pictures(url, tiny_vae)).max() <= 1
    np.testing.assert_allclose(drawn(url, tmp_path / "raw.npz", raw=True), latents(url), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="samples of another request are there"):
        drawn(url, tmp_path / "a.npz", raw=True)


def test_a_samples_pixels_do_not_depend_on_which_others_are_decoded_with_it(url: str) -> None:
    info = describe(url).info
    z = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([info.decoded(one[None]) for one in z])
    assert torch.equal(info.decoded(z), alone)


def test_the_sheet_beside_a_run_is_of_decoded_samples(run: Config) -> None:
    check_evaluation(run, open_run_data(run))
    checkpoint = latest(run_store(run))
    assert checkpoint is not None
    assert draw_sheet(run, checkpoint)["sheet"].endswith(".png")


def test_an_evaluation_compares_decoded_samples_with_pictures_and_loss_is_of_latents(
    url: str, latent_set: str, tmp_path: Path
) -> None:
    settings = EvaluationSettings(
        url, latent_set, ("fid", "sw", "loss"), out=str(tmp_path), count=16, reference_count=64, loss_count=16, steps=2,
        sampler="euler", extractor="identity",
    )  # fmt: skip
    record = evaluate(settings).record
    assert set(record.metrics) == {"fid", "sw", "loss"}
    assert record.protocol["loss"]["of"]["latents"] == "latent"


def test_what_pictures_alone_have_is_refused_of_latents(url: str, latent_set: str, small_set: str) -> None:
    for reference, metric, message in (
        (latent_set, "bpd", "a density of latents, not of pictures"),
        (latent_set, "psnr", "the model is of latents"),
        (small_set, "nats", "the reference has no field 'latent'"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(EvaluationSettings(url, reference, (metric,), count=16, reference_count=16))


def test_an_autoencoder_that_is_gone_or_has_changed_is_one_line_before_anything_is_drawn(
    url: str, tiny_vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scoreray.sampling.model import describe as describing

    original = describing.info_of

    def moved(path: str) -> None:
        def info_of(*arguments: Any) -> Any:
            info = original(*arguments)
            return replace(info, target=replace(info.target, encoding=replace(info.target.encoding, path=path)))

        monkeypatch.setattr(describing, "info_of", info_of)

    moved(str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"gone: no such folder.*; --raw draws the latents as they are"):
        drawn(url, tmp_path / "a.npz")
    other = shutil.copytree(tiny_vae, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text().replace('"silu"', '"relu"'))
    moved(str(other))
    with pytest.raises(DataError, match="has changed since it encoded the data"):
        drawn(url, tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists()


def test_raw_of_a_model_of_pictures_and_other_channels_are_one_line(
    url: str, small_run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    config = prepare_run(load_config(small_run("pictures", tmp_path, 16))).config
    train(config)
    with pytest.raises(UserError, match=r"--raw: .* models no latents"):
        describe(run_store(config).url()).info.as_latents()
    info = describe(url).info
    with pytest.raises(UserError, match=r"decodes latents of 2 channels, .* these are \[3, 4, 4\]"):
        replace(info, image_shape=(3, 4, 4)).check_decodes()


def test_an_exported_model_has_its_autoencoder_with_it_also_where_diffusers_loads_it(
    url: str, tiny_vae: str, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    out = tmp_path / "out"
    export(url, str(out))
    encoding, original = describe(str(out)).info.encoding, describe(url).info.encoding
    assert encoding is not None
    assert original is not None
    assert encoding == replace(original, path=str(out / "vae"))
    assert np.abs(drawn(str(out), tmp_path / "a.npz").astype(int) - pictures(url, tiny_vae)).max() <= 1
    again, folder = tmp_path / "again", tmp_path / "pipeline"
    export(str(out), str(again))
    assert describe(str(again)).info.encoding == replace(original, path=str(again / "vae"))

    write_diffusers_folder(model_to_export(find_model(url)), open_store(str(folder)))
    pipeline: Any = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    found = pipeline(batch_size=3, sampler="euler", num_inference_steps=3, output_type="np", class_labels=[0, 1, 0])
    assert np.abs(found.images * 255 - pictures(url, tiny_vae)).max() <= 1
    assert drawn(str(folder), tmp_path / "b.npz").shape == (3, 8, 8, 1)


def test_a_moved_autoencoder_is_named_by_an_option_and_its_hash_is_checked(
    url: str, tiny_vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = describe(url).info.encoding
    assert recorded is not None
    gone = replace(recorded, path=str(tmp_path / "gone"))
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(UserError, match=r"gone: no such folder.* name that place: --autoencoder diffusers=PATH"):
        load_autoencoder(gone, "cpu")
    moved, other = shutil.copytree(tiny_vae, tmp_path / "moved"), shutil.copytree(tiny_vae, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text().replace('"silu"', '"relu"'))
    name_autoencoders([f"diffusers={other}"])
    with pytest.raises(UserError, match=rf"--autoencoder diffusers={other}: is not the one that encoded the data"):
        load_autoencoder(gone, "cpu")
    assert load_autoencoder(recorded, "cpu").path == recorded.path  # one that another model's option names hides none
    name_autoencoders([f"diffusers={other}", f"diffusers={moved}"])
    assert load_autoencoder(gone, "cpu").path == str(moved)
    assert environment() == {VARIABLE: f"diffusers={other}\ndiffusers={moved}"}
    for wrong, message in (("vae", "write KIND=PATH"), ("difusers=vae", "did you mean|diffusers")):
        with pytest.raises(UserError, match=message):
            name_autoencoders([wrong])


def test_an_exported_model_has_an_autoencoder_of_ours_with_it_and_outlives_its_run(
    url: str, small_run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    tiny = {
        "kind": "autoencoder",
        "model_channels": 8,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "latent_channels": 2,
        "attention": False,
    }
    trained = load_config(small_run("ours", tmp_path, 16, network=tiny, objective={"kind": "autoencoding"}))
    train(trained)
    ours, z = load_encoder(f"scoreray={run_store(trained).url()}", "cpu"), torch.randn(1, 2, 4, 4)
    assert isinstance(ours, Autoencoder)
    decoded = ours.decode(z)
    model = model_to_export(find_model(url))
    assert model.page.target is not None
    assert model.page.target.encoding is not None
    encoding = replace(model.page.target.encoding, kind="scoreray", path=ours.path, sha256=ours.sha256)
    page = replace(model.page, target=replace(model.page.target, encoding=encoding))
    for write, name in ((write_model, "plain"), (write_diffusers_folder, "pipeline")):
        write(replace(model, page=page), open_store(str(tmp_path / name)))
    shutil.rmtree(ours.path)
    _loaded.clear()
    for name in ("plain", "pipeline"):
        found = describe(str(tmp_path / name)).info.encoding
        assert found == replace(encoding, path=str(tmp_path / name / "vae"))
        torch.testing.assert_close(load_autoencoder(found, "cpu").decode(z), decoded, rtol=0, atol=0)
    pipeline: Any = DiffusionPipeline.from_pretrained(str(tmp_path / "pipeline"), trust_remote_code=True)
    found = pipeline(batch_size=3, sampler="euler", num_inference_steps=3, output_type="np", class_labels=[0, 1, 0])
    shown = drawn(str(tmp_path / "plain"), tmp_path / "a.npz")
    assert np.abs(found.images * 255 - shown).max() <= 1


def test_inpainting_knows_latents_of_known_pixels_and_puts_these_back(url: str, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    known = np.zeros((8, 8), bool)
    known[:, :5] = True  # of the latents' grid of 2 x 2 pixels two columns are whole, and one is cut
    np.save(tmp_path / "known.npy", known)
    drawn_of = []
    for name, array in (("one", picture), ("other", np.where(known, picture, 255 - picture))):
        np.save(tmp_path / f"{name}.npy", array)
        measured = Measurement("inpaint", str(tmp_path / f"{name}.npy"), str(tmp_path / "known.npy"))
        drawn_of.append(drawn(url, tmp_path / f"{name}.npz", replace(REQUEST, measurement=measured))[..., 0])
    one, other = drawn_of
    assert np.array_equal(one, other)  # whatever is where the mask knows nothing
    assert (one[:, known] == picture[known]).all()
    assert (one[0] != one[1])[~known].any()

    model = load(url, device="cpu")
    assert model.info.encoding is not None
    pixels = torch.where(torch.from_numpy(known), torch.from_numpy(picture) / 127.5 - 1, 0.0)[None, None]
    mean = load_autoencoder(model.info.encoding, "cpu").moments(pixels)[0]
    (x, _), *_ = generate(model, replace(REQUEST, measurement=measured))
    found = model.info.unscaled(x)
    torch.testing.assert_close(found[:, :, :, :2], mean.expand(2, -1, -1, -1)[:, :, :, :2], rtol=0, atol=1e-4)
    assert ((found - mean).abs()[:, :, :, 2] > 1e-2).any()


def test_other_measurements_of_latents_are_refused_in_a_line(url: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((8, 8), np.uint8))
    known = np.zeros((8, 8), bool)
    known[1:3, 1:3] = True  # parts of four cells
    np.save(tmp_path / "known.npy", known)
    x, mask = str(tmp_path / "x.npy"), str(tmp_path / "known.npy")
    for measured, message in (
        (Measurement("superresolution=2", x), "--inverse superresolution=2: .* models latents, .* --inpaint is taken"),
        (Measurement("inpaint", x, mask, noise_std=0.1), "--noise-std 0.1: .* models latents"),
        (Measurement("inpaint", x, mask), "--mask: marks no 2 x 2 pixels of the latents' grid as known together"),
    ):
        with pytest.raises(UserError, match=message):
            drawn(url, tmp_path / "a.npz", replace(REQUEST, measurement=measured))


def test_an_imported_pipeline_draws_pictures_by_its_vae(tiny_vae: str, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel

    folder = tmp_path / "pipeline"
    sizes = {"block_out_channels": (8,), "norm_num_groups": 2, "attention_head_dim": 4}
    UNet2DModel(
        4, 2, 2, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1, **sizes
    ).save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    shutil.copytree(tiny_vae, folder / "vae")
    (folder / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
    import_diffusers(str(folder), str(tmp_path / "model"))
    shutil.rmtree(folder)
    model = load(str(tmp_path / "model"), device="cpu")
    assert (model.info.image_shape, model.info.sample_shape, model.info.is_picture) == ((2, 4, 4), (1, 8, 8), True)
    z = torch.randn(2, 2, 4, 4)
    theirs: Any = AutoencoderKL.from_pretrained(tiny_vae)
    with torch.no_grad():
        wanted = theirs.decode(z / theirs.config.scaling_factor).sample
    torch.testing.assert_close(model.info.decoded(z), wanted, rtol=1e-4, atol=1e-5)


def test_previews_are_the_recorded_linear_map_without_the_autoencoder(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = describe(url).info
    monkeypatch.setattr(Autoencoder, "decode", None)
    x = torch.randn(2, 2, 4, 4)
    shown, are_pictures = info.previewed(x)
    assert (tuple(shown.shape), are_pictures) == ((2, 1, 8, 8), True), "of what is drawn, not of latents"
    assert info.encoding is not None
    weights = torch.tensor(info.encoding.preview)
    wanted = (info.unscaled(x) * weights[0, :2].view(1, 2, 1, 1)).sum(1, keepdim=True) + weights[0, 2]
    scaled = torch.nn.functional.interpolate(wanted.clamp(-1, 1), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(shown, scaled)
    bare = replace(info, target=replace(info.target, encoding=replace(info.encoding, preview=[])))  # type: ignore[type-var]
    assert bare.previewed(x)[1] is False


def test_decodes_that_wait_are_done_together_and_an_error_is_its_requests_own() -> None:
    import threading

    begun, go, sizes = threading.Event(), threading.Event(), list[int]()

    def decode(z: torch.Tensor) -> torch.Tensor:
        begun.set()
        go.wait(PATIENCE_S)
        sizes.append(len(z))
        if z.isnan().any():
            raise UserError("not finite")
        return 2 * z

    waiting = decode_queue(decode)
    first = waiting.submit(torch.zeros(1, 2))
    assert begun.wait(PATIENCE_S)
    others = [waiting.submit(torch.full((n, 2), float(n))) for n in (2, 3)]
    go.set()
    assert [tuple(one.result(PATIENCE_S).shape) for one in (first, *others)] == [(1, 2), (2, 2), (3, 2)]
    assert torch.equal(others[1].result(), torch.full((3, 2), 6.0))
    assert sizes == [1, 5]
    begun.clear()
    go.clear()
    first = waiting.submit(torch.zeros(1, 2))
    assert begun.wait(PATIENCE_S)
    bad, good = waiting.submit(torch.full((1, 2), torch.nan)), waiting.submit(torch.ones(1, 2))
    go.set()
    with pytest.raises(UserError, match="not finite"):
        bad.result(PATIENCE_S)
    assert torch.equal(good.result(PATIENCE_S), torch.full((1, 2), 2.0)), "though they were in one call"
    assert sizes[2:] == [1, 2, 1, 1]
    waiting.close()
