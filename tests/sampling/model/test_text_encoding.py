"""Texts for a run on encoded captions: read by the encoder that it records, once each, in every way out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from waiting import PATIENCE_S

from scoreray.cluster.cli import main as cli
from scoreray.data.errors import DataError
from scoreray.data.fields.encoding import Encoding
from scoreray.data.fields.field import Field
from scoreray.data.fields.normalisation import Normaliser
from scoreray.sampling.model import text_encoding
from scoreray.sampling.model.describe import describe
from scoreray.sampling.model.prompts import prompt_conditions, prompted
from scoreray.sampling.model.row_queue import RowQueue
from scoreray.sampling.model.text_encoding import read_all, read_texts
from scoreray.sampling.service.body import SampleBody, make_request
from scoreray.sampling.service.config import Limits, ServeConfig
from scoreray.sampling.service.models import look_up
from scoreray.sampling.service.replica import Replica
from scoreray.sampling.service.request import Completed, Failed
from scoreray.trainer.checkpoints.marker import Marker
from scoreray.trainer.config.condition_values import condition_of, described
from scoreray.trainer.diffusion.condition import Condition, ConditionSpec
from scoreray.trainer.encoders.base import MASK, VALUES, Encoder
from scoreray.trainer.encoders.load import ENCODERS

WIDTH = 4
CAPTION = Field("caption", "text", [40], "uint8", "txt")


class Letters(Encoder):
    """A token a letter, drawn by its number; a pooled one is their mean. Counts the texts of each pass."""

    kind, path, sha256 = "letters", "", "a" * 64
    passes: list[list[str]] = []  # noqa: RUF012

    def __init__(self, path: str) -> None:
        self.path, self.module = path, torch.nn.Embedding(256, WIDTH)
        with torch.no_grad():
            self.module.weight.copy_(torch.arange(256 * WIDTH).view(256, WIDTH).sin())

    def output(self, field: Field) -> Field:
        kind, shape = ("vector", [WIDTH]) if self.path == "pooled" else ("sequence", [8, WIDTH])
        return Field(field.name, kind, shape, "float16", "", encoding=self.encoding(field))  # type: ignore[arg-type]

    @torch.no_grad()
    def encode(self, batch: Any) -> dict[str, torch.Tensor]:
        self.passes.append(list(batch))
        rows = [self.module(torch.tensor(list(text.encode()))) for text in batch]
        if self.path == "pooled":
            return {VALUES: torch.stack([row.mean(0) for row in rows])}
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True).bool()
        return {VALUES: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), MASK: mask}


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    monkeypatch.setitem(ENCODERS, "letters", Letters)
    text_encoding._kept.clear()
    Letters.passes.clear()
    return Letters.passes


def recorded(path: str, sha256: str = "a" * 64) -> Encoding:
    return Encoding("letters", path, sha256, "caption", "text", [40])


SPECS = {
    "tokens": ConditionSpec("sequence", (8, WIDTH), encoding=recorded("tokens")),
    "pooled": ConditionSpec(
        "vector",
        (WIDTH,),
        normaliser=Normaliser("channel", (0.5,) * WIDTH, (2.0,) * WIDTH),
        encoding=recorded("pooled"),
    ),
}


@pytest.fixture(scope="module")
def run_url(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "encoded"
    return new_run(str(folder), conditions=SPECS, classes=0, sections={"objective": {"label_dropout": 0.1}})


def by_hand(text: str) -> dict[str, np.ndarray]:
    """The values of a text, in the data's own units, as `data encode` would have stored them."""
    made = {name: Letters(name).encode([text])[VALUES][0].numpy() for name in SPECS}
    Letters.passes.clear()
    return made


def test_a_text_is_what_the_encoder_makes_of_it_cut_and_normalised(letters: list[list[str]]) -> None:
    text = "a red square"  # longer than the 8 tokens that the network takes
    wanted = condition_of({"tokens": by_hand(text)["tokens"][:8], "pooled": by_hand(text)["pooled"]}, SPECS)
    given = condition_of(dict.fromkeys(SPECS, text), SPECS)
    assert given is not None
    assert wanted is not None
    assert given.is_unread(SPECS)
    read = read_texts(given.expand(3), SPECS)
    assert not read.is_unread(SPECS)
    for name in SPECS:
        assert torch.equal(read.values[name], wanted.expand(3).values[name])
    assert read.mask("tokens").all()
    assert described(SPECS["tokens"]) == "a text, or numbers of shape [up to 8, 4]"
    nothing = condition_of({"tokens": ""}, SPECS)
    assert nothing is not None
    assert not read_texts(nothing, SPECS).mask("tokens").any()
    assert letters == [[text], [text]], "once for each encoder; an empty text is the null, and is not read"


def test_texts_that_wait_are_read_together_and_kept(letters: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    specs = {"tokens": SPECS["tokens"]}
    given = [condition_of({"tokens": text}, specs) for text in ("a", "bb", "a", "ccc")]
    found = read_all([one for one in given if one is not None], specs)
    assert letters == [["a", "bb", "ccc"]]
    assert [int(one.mask("tokens").sum()) for one in found] == [1, 2, 1, 3]
    rows = Condition.cat(given, [1] * 4)
    assert rows is not None
    mixed = read_texts(rows, specs)
    assert mixed.mask("tokens").sum(1).tolist() == [1, 2, 1, 3]
    assert len(letters) == 1, "all of them are kept"
    monkeypatch.setattr(text_encoding, "MOST_KEPT", 2)
    read_texts(rows[:1], specs)
    assert len(text_encoding._kept) == 2

    begun, go_on = threading.Event(), threading.Event()
    encode = Letters.encode

    def slow(self: Letters, batch: Any) -> dict[str, torch.Tensor]:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return encode(self, batch)

    letters.clear()
    monkeypatch.setattr(Letters, "encode", slow)
    queue = RowQueue[Condition, Condition](lambda given: read_all(given, specs), "texts")
    texts = [condition_of({"tokens": text}, specs) for text in ("x", "yy", "zzz", "yy")]
    first = queue.submit(texts[0])  # type: ignore[arg-type]
    assert begun.wait(PATIENCE_S)
    others = [queue.submit(one) for one in texts[1:]]  # type: ignore[arg-type]
    others[1].cancel()
    go_on.set()
    assert int(first.result(PATIENCE_S).mask("tokens").sum()) == 1
    assert [int(others[i].result(PATIENCE_S).mask("tokens").sum()) for i in (0, 2)] == [2, 2]
    assert letters == [["x"], ["yy"]], "those that came meanwhile in one pass, what nobody waits for in none"
    queue.close()


def test_a_prompt_draws_what_stored_tokens_draw_by_the_command_line_and_by_a_service(
    run_url: str, tmp_path: Path, letters: list[list[str]]
) -> None:
    info = describe(run_url).info
    assert prompt_conditions(info) == ("tokens", "pooled"), "both of the caption"
    assert prompted("red", info) == {"tokens": "red", "pooled": "red"}
    how = {"count": 2, "steps": 3, "seed": 5, "guidance": 3.0}
    served = look_up("encoded", run_url)

    async def drawn(**fields: Any) -> bytes:
        request = make_request(SampleBody(**how, **fields), served, Limits(), "application/json", 5)
        events = [event async for event in replica.draw(request)]
        assert isinstance(events[-1], Completed), events[-1]
        return events[-1].body

    async def main() -> None:
        stored = {name: value.tolist() for name, value in by_hand("red").items()}
        wanted = await drawn(condition=stored)
        letters.clear()
        assert await drawn(prompt="red") == wanted
        assert letters == [["red"], ["red"]]
        assert await drawn(prompt="red", negative_prompt="blue") != wanted
        assert letters[2:] == [["blue"], ["blue"]], "red is kept"
        await replica.close()

    replica = Replica(ServeConfig((("encoded", run_url),), precision="fp32", compile="off"), "cpu")
    asyncio.run(main())
    words = ["sample", run_url, "--count=2", "--steps=3", "--seed=5", "--guidance=3", "--compile=off"]
    out = [str(tmp_path / name) for name in ("a.npz", "b.npz")]
    np.save(tmp_path / "tokens.npy", by_hand("red")["tokens"])
    pooled = ",".join(map(str, by_hand("red")["pooled"].tolist()))
    cli.app([*words, f"--out={out[0]}", "--prompt=red", "--negative-prompt=blue"], standalone_mode=False)
    stored = [f"--condition=tokens={tmp_path / 'tokens.npy'}", f"--condition=pooled=[{pooled}]"]
    cli.app([*words, f"--out={out[1]}", *stored, "--negative-prompt=blue"], standalone_mode=False)
    first, second = (np.load(name) for name in out)
    assert np.array_equal(first[first.files[0]], second[second.files[0]])


def test_an_encoder_that_changed_is_one_line_and_a_service_without_it_still_draws(
    new_run: Callable[..., str], tmp_path: Path
) -> None:
    spec = ConditionSpec("sequence", (8, WIDTH), encoding=recorded("tokens", "b" * 64))
    given = condition_of({"tokens": "red"}, {"tokens": spec})
    assert given is not None
    with pytest.raises(DataError, match="letters=tokens: has changed since it encoded the data: SHA-256 aaaaaaaaaaaa"):
        read_texts(given, {"tokens": spec})
    url = new_run(str(tmp_path / "changed"), conditions={"tokens": spec}, classes=0)
    served = look_up("changed", url)

    async def main() -> None:
        replica = Replica(ServeConfig((("changed", url),), precision="fp32", compile="off"), "cpu")
        for fields, kind in (({"prompt": "red"}, Failed), ({}, Completed)):
            request = make_request(SampleBody(steps=2, **fields), served, Limits(), "application/json", 5)
            events = [event async for event in replica.draw(request)]
            assert isinstance(events[-1], kind)
            if isinstance(events[-1], Failed):
                assert events[-1].code == "storage"
                assert "has changed" in events[-1].message
        await replica.close()

    asyncio.run(main())


def test_the_record_is_in_the_marker_only_where_there_is_one(run_url: str) -> None:
    conditions = {"tokens": SPECS["tokens"], "hour": ConditionSpec("vector", (1,))}
    marker = Marker(
        0, 0, config={}, shapes={}, state_keys=[], files={}, world_size=1, image_shape=[1, 8, 8], conditions=conditions
    )
    stored = marker.to_json()
    assert stored.count(b'"encoding"') == 1
    assert Marker.from_json(stored, "run/checkpoints/1/COMMITTED.json").conditions == conditions
    moved = ConditionSpec("sequence", (8, WIDTH), encoding=recorded("elsewhere"))
    assert SPECS["tokens"].same_values(moved)
    other = ConditionSpec("sequence", (8, WIDTH), encoding=recorded("tokens", "b" * 64))
    assert not SPECS["tokens"].same_values(other)
