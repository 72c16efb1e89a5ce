"""Networks of the diffusers library: its own classes, built from the configs of saved models, called as ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from scoreray.data import checks
from scoreray.data.errors import UserError, shortened
from scoreray.data.extras import check_installed
from scoreray.trainer.diffusion.condition import (
    AnyCondition,
    ConditionKind,
    Conditions,
    as_condition,
    conditions_of,
)
from scoreray.trainer.diffusion.denoiser import like
from scoreray.trainer.diffusion.layers import check_call, require
from scoreray.trainer.diffusion.process import DDPM, EDM, VE, FlowMatching
from scoreray.trainer.networks.base import BaseNetworkConfig
from scoreray.trainer.networks.conditioning import values_of
from scoreray.trainer.networks.pretrained_folder import quiet

NEAR_A_STEP = 1e-3  # steps: c_noise is float32, in which a step's own sigma comes back up to 1e-4 of a step beside it


@dataclass(frozen=True)
class Call:
    """How a class of diffusers is called, and what conditions it.

    sample: the argument that takes the samples.  sizes: by kind of condition, the key of the class's config that holds
    the number of classes, or the width of tokens or of the pooled vector.  masked: it takes encoder_attention_mask.
    length: tokens that its pipeline gives by default.  has_null_class: class number `num_classes` is the null.
    takes_time: it takes t from 0 to 1; others take t times the number of steps.  flow: all of its class are trained by
    flow matching.
    """

    sample: str
    sizes: dict[ConditionKind, str]
    masked: bool = False
    length: int = 0
    has_null_class: bool = False
    takes_time: bool = False
    flow: bool = False


CALLS = {
    "UNet2DModel": Call("sample", {"class": "num_class_embeds"}),
    "UNet2DConditionModel": Call(
        "sample", {"sequence": "cross_attention_dim", "class": "num_class_embeds"}, masked=True, length=77
    ),
    "DiTTransformer2DModel": Call("hidden_states", {"class": "num_embeds_ada_norm"}, has_null_class=True),
    "PixArtTransformer2DModel": Call("hidden_states", {"sequence": "caption_channels"}, masked=True, length=300),
    "SanaTransformer2DModel": Call(
        "hidden_states", {"sequence": "caption_channels"}, masked=True, length=300, flow=True
    ),
    "SD3Transformer2DModel": Call(
        "hidden_states", {"sequence": "joint_attention_dim", "vector": "pooled_projection_dim"}, length=333, flow=True
    ),
    "AuraFlowTransformer2DModel": Call(
        "hidden_states", {"sequence": "joint_attention_dim"}, length=256, takes_time=True, flow=True
    ),
}
"""Classes by name. A class whose forward differs from these in names only is added here."""

ARGUMENTS: dict[ConditionKind, str] = {
    "class": "class_labels",
    "sequence": "encoder_hidden_states",
    "vector": "pooled_projections",
}


UNSUPPORTED = ("class_embed_type", "time_cond_proj_dim", "guidance_embeds")
"""Keys of configs of further inputs."""
TEXT_TIME = "text_time"  # the addition_embed_type of SDXL: a pooled vector, and TIME_IDS numbers of sizes and crop
TIME_IDS = 6


@dataclass(frozen=True)
class DiffusersNetworkConfig(BaseNetworkConfig):
    """A network of diffusers, with its weights from torch's generator (`scoreray import` makes models with theirs).

    class_name, config: as its config.json has them.
    schedule: the process by whose times it knows noise levels: DDPM's steps 0 to num_steps - 1, flow matching's t times
    timestep_scale, EDM's c_noise, or VE's sigma (of pictures from 0 to 1: half of ours, whose pictures are from -1 to
    1; Song 2021's NCSN++).
    timestep_scale: of flow matching's t; 1 where a class takes t itself.
    activation_checkpointing: as diffusers' gradient checkpointing; a third more work, far less memory.
    timesteps: between two steps of a DDPM it is given the number between ("interpolate") or the nearer step ("round").
    null_class: the class number that means none.  null_length: of the null sequence, the tokens that are attended to.
    resolution: height and width in pixels, which PixArt and SDXL take beside the latents.
    """

    class_name: str
    config: dict[str, Any]
    schedule: Annotated[DDPM | FlowMatching | EDM | VE, Field(discriminator="kind")] = field(default=DDPM())
    timesteps: Literal["interpolate", "round"] = "interpolate"
    timestep_scale: float = 1000.0
    null_class: int | None = None
    null_length: int | None = None
    resolution: tuple[int, int] | None = None
    activation_checkpointing: bool = False
    kind: Literal["diffusers"] = field(default="diffusers", kw_only=True)
    wrapped_prefix: ClassVar[str] = "network."

    def __post_init__(self) -> None:
        checks.choose("network.class_name", self.class_name, CALLS)
        checks.positive("network", timestep_scale=self.timestep_scale)

    @property
    def required_sigma_data(self) -> float | None:
        """1 for what was trained on alpha x_0 + sigma z: c_in x is that (of a DDPM) at this sigma_data only."""
        return None if self.schedule.kind == "edm" else 1.0

    @property
    def sizes(self) -> dict[ConditionKind, int]:
        """By kind of condition that the network takes: the number of its classes without the null, or its width."""
        found = dict[ConditionKind, int]()
        for kind, key in CALLS[self.class_name].sizes.items():
            size = self.config.get(key)
            if key == "cross_attention_dim":  # of tokens as they come, where the network projects them first
                size = self.config.get("encoder_hid_dim") or size
            if size is None:
                continue
            require(isinstance(size, int), f"config.{key}", size, "one number for all blocks is supported")
            found[kind] = size - 1 if kind == "class" and self.null_class == size - 1 else size
        if self.takes_sizes:
            found["vector"] = (
                self.config["projection_class_embeddings_input_dim"] - TIME_IDS * self.config["addition_time_embed_dim"]
            )
        return found

    @property
    def takes_sizes(self) -> bool:
        """Whether it is a U-Net that is given a pooled vector, and the sizes and crop of the picture, as SDXL's is."""
        return self.config.get("addition_embed_type") == TEXT_TIME

    def build(self, image_shape: Sequence[int], conditions: Conditions | int = 0) -> DiffusersNetwork:
        """Raises UserError where diffusers is not installed, or config, shape and conditions do not fit."""
        return DiffusersNetwork(self, tuple(image_shape), conditions_of(conditions))


class DiffusersNetwork(nn.Module):
    """network(x [B, C, H, W], c_noise [B], condition or None) -> x's shape and dtype.

    A condition enters by its kind, whatever its name: classes as class_labels, a sequence as encoder_hidden_states, a
    vector as pooled_projections. Rows without one have the null class, or `null_sequence` and `null_vector`: zeros
    unless the import was given others. Rows without a class, of a network that knows no null class, are NaN.
    """

    null_sequence: nn.Parameter
    null_vector: nn.Parameter

    def __init__(self, config: DiffusersNetworkConfig, shape: tuple[int, ...], conditions: Conditions):
        super().__init__()
        self.settings, self.shape, self.conditions = config, shape, conditions
        self.call = CALLS[config.class_name]
        channels = config.config.get("in_channels", shape[0])
        if len(shape) != 3 or shape[0] != channels:
            raise UserError(
                f"samples of shape {list(shape)}: this {config.class_name} takes [{channels}, height, width]"
            )
        _check_conditions(config, conditions)
        self.network = _built(config)
        modules: list[Any] = list(self.network.modules())
        for module in modules:
            if hasattr(module, "dropout_prob"):  # of LabelEmbedding: `objective.label_dropout` drops labels, once
                module.dropout_prob = 0.0
        for spec in conditions.values():
            if spec.kind in ("sequence", "vector"):
                self.register_parameter(f"null_{spec.kind}", nn.Parameter(torch.zeros(spec.shape)))

    def forward(self, x: Tensor, c_noise: Tensor, condition: AnyCondition = None) -> Tensor:
        check_call(x, c_noise, tuple(x.shape[1:]) == self.shape, str(self.shape))
        arguments = self._conditions(c_noise, condition, x.dtype)
        labels = arguments.get("class_labels")
        if labels is not None:
            arguments["class_labels"] = self._class_numbers(labels)
        if self.settings.takes_sizes:
            pooled = arguments.pop(ARGUMENTS["vector"])
            arguments["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": self._time_ids(x)}
        if self.settings.class_name == "PixArtTransformer2DModel":
            arguments["added_cond_kwargs"] = self._size_in_pixels(x)
        arguments[self.call.sample] = self._input(x, c_noise)
        output = self.network(timestep=self.timestep(c_noise), **arguments, return_dict=False)[0]
        output = output[:, : x.shape[1]]  # further channels are the variance that it learned
        if self.settings.schedule.kind == "ve":
            output = output * like(self.timestep(c_noise), output)  # from the score
        if labels is not None and self.settings.null_class is None:
            output = output.masked_fill(like(labels < 0, output), torch.nan)
        return output.to(x.dtype)

    def timestep(self, c_noise: Tensor) -> Tensor:
        """[B], what the network takes for c_noise = ln(sigma) / 4 [B]: float32, int64 where steps are rounded to."""
        settings, schedule = self.settings, self.settings.schedule
        if schedule.kind == "edm":
            return c_noise
        if schedule.kind == "ve":
            return (4 * c_noise).exp() / 2
        time = schedule.time((4 * c_noise.double()).exp())
        if schedule.kind == "flow_matching":
            return (time * settings.timestep_scale).float()
        place = (time * schedule.num_steps - 1).clamp(0, schedule.num_steps - 1)
        nearest = place.round()
        if settings.timesteps == "round":
            return nearest.long()
        return torch.where((place - nearest).abs() < NEAR_A_STEP, nearest, place).float()

    def _input(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """alpha x_0 + sigma z of the schedule, from c_in x = x / sqrt(1 + sigma^2), which a DDPM's is already."""
        if self.settings.schedule.kind not in ("flow_matching", "ve"):
            return x
        sigma = (4 * c_noise.double()).exp()
        if self.settings.schedule.kind == "ve":
            return (x * like((1 + sigma**2).sqrt().to(x.dtype), x) + 1) / 2
        return x * like(((1 + sigma**2).sqrt() / (1 + sigma)).to(x.dtype), x)

    def _conditions(self, c_noise: Tensor, condition: AnyCondition, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the class's forward; class_labels are -1 where there is none."""
        given = as_condition(condition, self.conditions)
        arguments = dict[str, Any]()
        for name, spec in self.conditions.items():
            value, mask = values_of(name, spec, given, c_noise)
            if spec.kind == "vector":
                value = torch.where(mask[:, None], value.to(dtype), self.null_vector)
            elif spec.kind == "sequence":
                has = mask.any(1)
                value = torch.where(has[:, None, None], value.to(dtype), self.null_sequence)
                if self.call.masked:
                    places = torch.arange(mask.shape[1], device=mask.device)
                    null_mask = places < (self.settings.null_length or mask.shape[1])
                    # Not `where`, which onnxruntime lacks for bool.
                    arguments["encoder_attention_mask"] = (mask & has[:, None]) | (null_mask & ~has[:, None])
            arguments[ARGUMENTS[spec.kind]] = value
        return arguments

    def _class_numbers(self, labels: Tensor) -> Tensor:
        """The null class in the place of -1. Raises UserError where there is none, as far as looking costs no wait."""
        null = self.settings.null_class
        if null is not None:
            return labels.masked_fill(labels < 0, null)
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and bool((labels < 0).any()):
            raise UserError(
                f"a sample without a class: this {self.settings.class_name} has no null class; give each sample one, "
                "without guidance, or set network.null_class where one of its classes means none"
            )
        return labels.clamp(min=0)

    def _size_in_pixels(self, x: Tensor) -> dict[str, Tensor | None]:
        """PixArt's embeddings of the picture's height and width, of those models that have them."""
        if not getattr(self.network, "use_additional_conditions", False):
            return {"resolution": None, "aspect_ratio": None}
        height, width = self.settings.resolution or self.shape[1:]
        size = torch.tensor([[height, width]], dtype=x.dtype, device=x.device).expand(x.shape[0], 2)
        return {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}

    def _time_ids(self, x: Tensor) -> Tensor:
        """SDXL's: the picture's size, where it was cropped, and the size that is wanted; as its pipeline gives them."""
        height, width = self.settings.resolution or self.shape[1:]
        ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=x.dtype, device=x.device)
        return ids.expand(x.shape[0], TIME_IDS)


def _built(config: DiffusersNetworkConfig) -> nn.Module:
    """diffusers' own module. Raises UserError where it is not installed, refuses the config, or is not one of ours."""
    check_installed("diffusers", "network.kind diffusers", "diffusers")
    import diffusers

    values = config.config
    for key in UNSUPPORTED:
        require(not values.get(key), f"config.{key}", values.get(key), "models that have it are not supported")
    added = values.get("addition_embed_type")
    require(added in (None, TEXT_TIME), "config.addition_embed_type", added, f"{TEXT_TIME} alone is supported")
    time = values.get("time_embedding_type", "positional")
    require((time == "fourier") == (config.schedule.kind == "ve"), "config.time_embedding_type", time,
            "networks that take sigma itself (fourier) and ScoreSdeVeScheduler's noise go together")  # fmt: skip
    require(time != "learned" or config.timesteps == "round", "timesteps", config.timesteps,
            "a learned vector a step has none between: choose round")  # fmt: skip
    channels, out = values.get("in_channels"), values.get("out_channels")
    require(not channels or not out or out in (channels, 2 * channels), "config.out_channels", out,
            f"for in_channels {channels} it is {channels}, or {channels} and as many variances")  # fmt: skip
    try:
        with quiet("diffusers"):
            network = getattr(diffusers, config.class_name).from_config(dict(values))
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        reason = shortened(" ".join(str(error).split()), 300)
        raise UserError(f"network.config: {config.class_name} of diffusers refuses it: {reason}") from None
    if config.activation_checkpointing:
        network.enable_gradient_checkpointing()
    return network


def _check_conditions(config: DiffusersNetworkConfig, conditions: Conditions) -> None:
    """Raises UserError unless there is one condition for each input of the class, of its size."""
    sizes, found = config.sizes, dict[str, str]()
    for name, spec in conditions.items():
        if spec.kind not in sizes or spec.kind in found:
            takes = ", ".join(f"one {kind} ({size})" for kind, size in sizes.items()) or "no conditions"
            raise UserError(f"data.conditions.{name}: {config.class_name} takes {takes}, and this is a {spec.kind}")
        size = spec.num_classes if spec.kind == "class" else spec.shape[-1]
        if size > sizes[spec.kind] or (size < sizes[spec.kind] and spec.kind != "class"):
            what = "classes" if spec.kind == "class" else "numbers wide"
            raise UserError(f"data.conditions.{name}: {size} {what}; this {config.class_name} knows {sizes[spec.kind]}")
        found[spec.kind] = name
    if missing := [kind for kind in sizes if kind not in found]:
        raise UserError(f"data.conditions: this {config.class_name} also takes a {missing[0]} ({sizes[missing[0]]}); "
                        "name a field for it")  # fmt: skip
