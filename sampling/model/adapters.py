"""Several LoRAs beside one network in memory: each row of a call has the adapters of one of them, or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from scoreray.data.errors import UserError
from scoreray.data.extras import check_installed
from scoreray.trainer.checkpoints.stored_model import StoredModel, check_base, find_model
from scoreray.trainer.diffusion.condition import AnyCondition, Condition, Conditions, encoded
from scoreray.trainer.networks.lora import PEFT_PREFIX, load_adapters

BASE = "__base__"  # peft's name for rows without adapters


def find_adapters(pairs: Iterable[tuple[str, str]], base: StoredModel) -> dict[str, StoredModel]:
    """The LoRAs at the URLs of (name, URL) pairs, without weights. Raises UserError unless each is one of `base`."""
    found = dict[str, StoredModel]()
    for name, url in pairs:
        model = found[name] = find_model(url)
        if model.config.lora is None:
            raise UserError(f"--lora {name}={url}: a whole model, no LoRA; serve it as a model of its own")
        check_base(url, model.page.lineage[0], base)
    return found


class AdaptedNetwork(nn.Module):
    """A network with LoRAs, called as the network is: peft groups the rows of a call by their adapters.

    `choose` says beforehand which rows have which. Reads conditions as the network does, as no LoRA changes that.
    Raises UserError where a LoRA is of another network.
    """

    def __init__(self, network: nn.Module, loras: Mapping[str, StoredModel]) -> None:
        check_installed("lora", "a LoRA", "peft")
        from peft import PeftModel, get_peft_model

        super().__init__()
        self.conditions: Conditions = getattr(network, "conditions", {})
        self._peft_names = {name: f"lora_{number}" for number, name in enumerate(loras)}  # no "." may be in them
        self._rows: list[str] = []
        configs = {name: lora.config.lora for name, lora in loras.items()}
        settings = {name: one.for_peft(one.layers(network)) for name, one in configs.items() if one is not None}
        model: PeftModel | None = None
        for name, lora in loras.items():
            peft_name = self._peft_names[name]
            if model is None:
                model = get_peft_model(network, settings[name], peft_name)
            else:
                model.add_adapter(peft_name, settings[name])
            adapters = {PEFT_PREFIX + key: value for key, value in lora.stored_weights().items()}
            load_adapters(model, adapters, peft_name)
        assert model is not None
        self.network = model

    def choose(self, names: Sequence[str]) -> None:
        """Of the rows of the calls to come, in their order, each row's LoRA, "" for none. Rows beyond them have the
        last one's: a call may be split, and filled up with its last row."""
        self._rows = [self._peft_names[name] if name else BASE for name in names]

    def forward(self, x: Tensor, c_noise: Tensor, condition: AnyCondition = None) -> Tensor:
        rows, self._rows = self._rows[: len(x)] or [BASE], self._rows[len(x) :]
        rows += rows[-1:] * (len(x) - len(rows))
        return self.network(x, c_noise, condition, adapter_names=rows)

    def encode(self, condition: Condition) -> Condition:
        return encoded(self.network.get_base_model(), condition)
