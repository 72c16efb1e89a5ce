"""HTML pages: whatever a name holds, it is shown as it is and never becomes markup."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError

from scoreray.cluster.verbs.demo_page import Copies, Expected, Fid, NextStep
from scoreray.data.pages import render
from scoreray.sampling.http.docs_page import docs_page
from scoreray.sampling.metrics.record import EvaluationRecord
from scoreray.tune.report import Chart, ReportRow, ReportTable

PNG = b"\x89PNG"
HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'onload='x", "</style><b>", "&lt;i&gt;",
           "{{ 7 * 7 }}", "{% raw %}", "<!--", "]]>", "\u2028", "plain", "a`b`c")  # fmt: skip
NAMES = st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=4).map("".join)


class Page(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def evaluation(name: str) -> str:
    sampling = {"sampler": name, "steps": 3, "grid": name, "sigma_range": [0.1, 1.0], "seed": 0, "guidance": 1.0,
                "options": {name: name}}  # fmt: skip
    checkpoint = {"url": name, "sha256": "0" * 64, "images_seen": 5, "ema": name}
    record = EvaluationRecord.model_validate(
        {"subject": {"checkpoint": checkpoint, "sampling": sampling}, "protocol": {"version": 1},
         "numerics": {"device": "cpu", "threads": 1, "batch_size": 1}, "versions": {"torch": name},
         "metrics": {"fid": {"value": 1.0, "std_error": None}}, "warnings": [name]}
    )  # fmt: skip
    row = {"title": name, "value": name, "interval": name, "beside": name}
    return render("scoreray.sampling.evaluation/report.html", title=name, record=record, how=name, rows=[row],
                  figures=[(name, PNG)], text=record.to_json().decode())  # fmt: skip


def study(name: str) -> str:
    table = ReportTable([(name, name)], [ReportRow([name], name)])
    charts = [Chart(name, PNG, 3.0), Chart(name)]
    return render("scoreray.tune/report.html", name=name, summary=name, best_table=table, next=[name], charts=charts,
                  sheets=charts, table=table)  # fmt: skip


def summary(name: str) -> str:
    return render(
        "scoreray.cluster.verbs/summary.html", rows={name: name}, config=name, num_samples=4, num_frames=3, images=5,
        minutes=1.0, fid=Fid(1.0, None, None, 5), expected=[(Expected(1, name, name), True)], too_few=True, moving=PNG,
        still=PNG,
        copies=Copies(0.0, 0.0, 1.0, 1.0, np.zeros(0)), pairs=PNG, loss=PNG, by_level=PNG,
        steps=[NextStep(name, name)],
    )  # fmt: skip


def http(name: str) -> str:
    schema = {"properties": {name: {"type": "string", "description": name, "default": name}}}
    body = {"content": {"application/json": {"schema": schema}}}
    operation = {"description": name, "requestBody": body}
    openapi: dict[str, Any] = {"paths": {"/v1/samples": {"post": operation}, name: {"get": {"description": name}}}}
    return docs_page(openapi, f"http://{name}", True)


@pytest.mark.parametrize("page", [evaluation, study, summary, http], ids=lambda page: page.__name__)
@given(name=NAMES)
@settings(max_examples=60, deadline=None)
def test_a_name_is_never_markup(page: Any, name: str) -> None:
    hostile, plain = Page(page(name)), Page(page("plain"))
    # what a description has in backticks is code on the HTTP page, and nothing else makes an element
    assert [tag for tag in hostile.tags if tag != "code"] == [tag for tag in plain.tags if tag != "code"]
    assert [one for one, _ in hostile.attributes] == [one for one, _ in plain.attributes]
    assert not [value for one, value in hostile.attributes if one in ("src", "href") and value not in
                {value for _, value in plain.attributes}]  # fmt: skip
    assert name in "".join(hostile.text).replace("\\u2028", "\u2028") or page is http


def test_a_value_that_is_missing_leaves_no_gap() -> None:
    with pytest.raises(UndefinedError, match="'charts' is undefined"):
        render("scoreray.tune/report.html", name="a", summary="b", best_table=ReportTable([], []), next=[])
