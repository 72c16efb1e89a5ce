"""Two LoRAs in one served batch, each equal to itself alone; LoRAs of other models are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreray.cluster.serve.command import serve_until_stopped
from scoreray.cluster.serve.options import ServeOptions
from scoreray.cluster.verbs.export import ExportOptions, export_model
from scoreray.data.errors import DataError, UserError
from scoreray.sampling.http.parse import parse
from scoreray.sampling.model.load import load
from scoreray.sampling.service.batcher import StepBatcher
from scoreray.sampling.service.body import make_request
from scoreray.sampling.service.config import Limits, Refused, ServeConfig
from scoreray.sampling.service.models import look_up
from scoreray.sampling.service.replica import Replica


def served(lora_urls: dict[str, str]) -> ServeConfig:
    options = ServeOptions(
        checkpoints=[lora_urls["base"]],
        lora=[f"ink={lora_urls['ink']}", f"style={lora_urls['style']}"],
        precision="fp32",
        compile="off",
    )
    return options.checked("127.0.0.1")[0]


def test_rows_of_two_loras_and_of_none_share_calls_and_are_what_each_is_alone(lora_urls: dict[str, str]) -> None:
    config = served(lora_urls)
    ((name, url),) = config.models
    model = look_up(name, url, config.ema, adapters=config.adapters)
    assert model.adapters == ("ink", "style")
    replica = Replica(config, "cpu")
    built = replica._build(url, model.info.ema)
    built.batcher.close()
    network: Any = built.batcher.denoiser.network  # type: ignore[attr-defined]
    batcher = StepBatcher(built.batcher.denoiser, config.max_batch, choose=network.choose)  # a call at a time
    bodies = [b'{"adapter": "style", "count": 3, "seed": 1, "steps": 3, "guidance": 2.0, "class_label": 1}',
              b'{"count": 2, "seed": 2, "steps": 4}',
              b'{"adapter": "ink", "count": 2, "seed": 1, "steps": 3}']  # fmt: skip
    requests = [make_request(body := parse(text), model, Limits(), "application/json", body.seed) for text in bodies]
    before = batcher.calls
    together = [batcher.submit(request) for request in requests]
    while batcher.step():
        pass
    num_calls, samples = batcher.calls - before, [ticket.result(0) for ticket in together]
    assert num_calls <= 2 * 4  # Heun's calls for the longest request: all share them
    for request, drawn in zip(requests, samples, strict=True):
        ticket = batcher.submit(request)
        while batcher.step():
            pass
        torch.testing.assert_close(drawn, ticket.result(0), rtol=1e-5, atol=1e-5)
    changed = batcher.submit(replace(requests[0], adapter="ink"))
    while batcher.step():
        pass
    assert not torch.allclose(changed.result(0), samples[0], atol=1e-3)


def test_an_adapted_network_gives_what_the_merged_one_gives(lora_urls: dict[str, str]) -> None:
    config = served(lora_urls)
    ((_, url),) = config.models
    model = Replica(config, "cpu")._build(url, "0.050")
    model.batcher.close()
    network: Any = model.denoiser.network
    x, sigma, label = torch.randn(5, 1, 8, 8), torch.tensor([0.1, 0.5, 1.0, 3.0, 9.0]), torch.tensor([0, 1, 2, -1, 0])
    network.choose(["", "ink", "ink", "style", "ink"])
    with torch.no_grad():
        mixed = model.denoiser(x, sigma, label)
        for name, rows in {"base": [0], "ink": [1, 2, 4], "style": [3]}.items():
            whole = load(lora_urls[name], device="cpu")
            torch.testing.assert_close(mixed[rows], whole(x, sigma, label)[rows], rtol=1e-5, atol=1e-5)


def test_a_damaged_lora_is_named_before_ray_starts(lora_urls: dict[str, str], tmp_path: Path) -> None:
    export_model(lora_urls["ink"], str(tmp_path / "ink"), (), ExportOptions("lora"))
    with (tmp_path / "ink" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    options = ServeOptions(checkpoints=[lora_urls["base"]], lora=[f"ink={tmp_path / 'ink'}"])
    with pytest.raises(DataError, match=r"ink/adapter_model.safetensors: "):
        serve_until_stopped(*options.checked("127.0.0.1"), lambda url: None)


def test_mistakes_are_a_line(lora_urls: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a LoRA of another model: of .*ink/checkpoints"):
        look_up("base", lora_urls["base"], None, (), [("other", lora_urls["other"])])
    with pytest.raises(UserError, match=r"--lora base=\S+: a whole model, no LoRA"):
        look_up("base", lora_urls["base"], None, (), [("base", lora_urls["base"])])
    model = look_up("base", lora_urls["base"], None, (), [("ink", lora_urls["ink"])])
    for body, line in (
        (b'{"adapter": "inc"}', "did you mean 'ink'"),
        (b'{"adapter": "ink", "ema": "none"}', "leave ema"),
    ):
        with pytest.raises(Refused, match=line):
            make_request(parse(body), model, Limits(), "application/json", 0)
