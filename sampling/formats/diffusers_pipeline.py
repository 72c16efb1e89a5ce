"""A model of ours as diffusers loads it: its denoiser as a component, and a pipeline that draws by our samplers.

The two Python files of an exported folder name these two classes and hold nothing else, so what they do
is that of the scoreray that is installed. The one module that imports diffusers when it is imported; none of ours does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image

from scoreray.data.errors import UserError
from scoreray.data.fields.normalisation import to_uint8
from scoreray.data.own_code import check_stored
from scoreray.sampling.guidance.steering import Guidance
from scoreray.sampling.model.describe import info_of
from scoreray.sampling.model.load import LoadedDenoiser
from scoreray.sampling.offline.generate import Request, prepare
from scoreray.trainer.checkpoints.exported import AUTOENCODER, ModelManifest
from scoreray.trainer.config import load_config
from scoreray.trainer.config.condition_values import condition_of
from scoreray.trainer.diffusion.condition import Condition, class_name_of
from scoreray.trainer.networks.network import build_network

OUTPUT_TYPES = ("pil", "np", "pt")


class ScorerayDenoiser(ModelMixin, LoadedDenoiser, ConfigMixin):
    """denoiser(x [B, ...], sigma [B] or a number, condition or None) -> E[x_0 | x], as diffusers saves and loads it.

    Every function of ours takes it like one that `scoreray.sampling.load` gave. `model`: the fields of model.json,
    `ema`: the length of its weights; both are in config.json.
    """

    @register_to_config
    def __init__(self, model: dict[str, Any], ema: str) -> None:
        page = ModelManifest.from_fields(model)
        check_stored(page.config, page.own_code, page.checkpoint)
        config = load_config(page.config)
        info = info_of(page, page.checkpoint, ema, config)
        network = build_network(config.network, info.network_shape, info.network_conditions)
        LoadedDenoiser.__init__(self, network, config.denoiser.parameterization, config.denoiser.resolved_sigma_data)
        self.info = info


class ScorerayPipeline(DiffusionPipeline):
    """Draws samples as `scoreray sample` does: the same seed and conditions give the same samples."""

    denoiser: ScorerayDenoiser
    vae: Any
    model_cpu_offload_seq = "denoiser->vae"
    _optional_components = ["vae"]  # noqa: RUF012 (as diffusers declares it)

    def __init__(self, denoiser: ScorerayDenoiser, vae: Any = None) -> None:
        """vae: of a model of latents, the autoencoder that decodes its samples."""
        super().__init__()
        self.register_modules(denoiser=denoiser, vae=vae)  # type: ignore[attr-defined]

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        *,
        condition: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        class_labels: int | str | Sequence[int | str | None] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        guidance: Mapping[str, float] | None = None,
        sampler: str | None = None,
        grid: str | Sequence[float] | None = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """So many samples.

        condition: values by name in the data's own units (a text, a class, numbers, an array), for all samples or a
            mapping for each; class_labels: the same of the one class condition. What is left out is null.
        num_inference_steps, sampler, grid: as `scoreray sample` has them, by default what fits the model; `options` are
            the sampler's own. guidance_scale: classifier-free, 1 for none; `guidance`: of single conditions.
        seed: of the samples, which are those of `scoreray sample --seed`. generator: takes the seeds from it instead.
        latents: standard normal numbers [batch_size, *shape] to begin from, in place of the seeds' own.
        output_type: "pil" (pictures; their default), "np" (pictures [B, H, W, C] from 0 to 1, other data [B, ...] in
            their own units; the default of these) or "pt" (float32 [B, ...] in the model's range, pictures -1 to 1).
        Raises UserError.
        """
        info = self.denoiser.info
        output_type = output_type or ("pil" if info.is_picture else "np")
        if output_type not in OUTPUT_TYPES or (output_type == "pil" and not info.is_picture):
            raise UserError(
                f"output_type = {output_type!r}: {', '.join(OUTPUT_TYPES)} are known, pil for pictures only"
            )
        request = Request(
            count=batch_size,
            sampler=sampler,
            steps=num_inference_steps,
            seed=seed,
            guidance=Guidance(guidance_scale, weights=dict(guidance or {})),
            options=options,
            grid=grid,
        )
        seeds = request.sample_seeds(0, batch_size)
        if generator is not None:
            seeds = torch.randint(2**62, (batch_size,), generator=generator, device=generator.device).cpu()
        rows = self._conditions(condition, class_labels, batch_size)
        samples = prepare(self.denoiser, request)(seeds, rows, latents)
        images = self._images(samples, output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def _conditions(self, condition: Any, labels: Any, count: int) -> Condition | None:
        """Rows for all samples. Raises UserError where they are not as many, or do not fit the model."""
        known = self.denoiser.info.conditions
        each = [dict(condition or {})] * count if isinstance(condition, Mapping | None) else [*map(dict, condition)]
        of_each = [labels] * count if isinstance(labels, int | str | None) else list(labels)
        for what, given in (("conditions", each), ("class_labels", of_each)):
            if len(given) != count:
                raise UserError(f"{len(given)} {what} for batch_size = {count}: give one for all, or one a sample")
        if labels is not None:
            name = class_name_of(known)
            if name is None:
                takes = self.denoiser.info.takes
                raise UserError(f"class_labels: this model takes {takes}; give condition={{NAME: ...}}")
            each = [{**values, name: label} for values, label in zip(each, of_each, strict=True)]
        return Condition.cat([condition_of(values, known) for values in each], [1] * count)

    def _images(self, samples: torch.Tensor, output_type: str) -> Any:
        info = self.denoiser.info
        if output_type == "pt":
            return samples
        if info.encoding is None or self.vae is None:
            if info.encoding is not None and info.encoding.path == AUTOENCODER and info.target is not None:  # ours
                place = replace(info.encoding, path=f"{self.config['_name_or_path']}/{AUTOENCODER}")  # type: ignore[attr-defined]
                info = replace(info, target=replace(info.target, encoding=place))
            values = info.in_data_units(samples)
        else:
            values = self.vae.decode(info.unscaled(samples).to(self.vae.device, self.vae.dtype)).sample.float().cpu()
            values = to_uint8(values) if info.is_picture else values
        if not info.is_picture:
            return values.numpy()
        pictures = values.movedim(1, -1).numpy()
        if output_type == "np":
            return pictures.astype("float32") / 255
        return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in pictures]
