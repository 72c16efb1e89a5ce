"""Tokens: what was meant to hold some and holds none lets nobody in, it does not let everybody in."""

from __future__ import annotations

from pathlib import Path

import pytest

from scoreray.cluster.serve.options import make_config
from scoreray.data.errors import UserError
from scoreray.sampling.service.access import read_tokens

SECRET = "a-secret-of-thirty-characters!"


@pytest.mark.parametrize("text", ["", "# c\n", " \n\t\n", "\n# a:b\n\n#"])
def test_a_file_without_a_token_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(UserError, match=f"--token-file {file}: holds no token"):
        make_config(["a"], file, "127.0.0.1", False)


@pytest.mark.parametrize("text", [" ,", ",", " ", "\n", "# c"])
def test_a_variable_without_a_token_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SCORERAY_TOKENS", text)
    with pytest.raises(UserError, match="SCORERAY_TOKENS: holds no token"):
        make_config(["a"], None, "127.0.0.1", False)


def test_no_variable_and_an_empty_one_are_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORERAY_TOKENS", "")
    assert read_tokens(None) == ()
    monkeypatch.delenv("SCORERAY_TOKENS")
    assert read_tokens(None) == ()
    with pytest.raises(UserError, match="tokens are needed"):
        make_config(["a"], None, "0.0.0.0", False)


def test_no_auth_and_a_token_file_contradict_each_other(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"ana:{SECRET}\n")
    with pytest.raises(UserError, match="leave one of them out"):
        make_config(["a"], file, "127.0.0.1", True)
    assert len(make_config(["a"], file, "127.0.0.1", False).tokens) == 1
