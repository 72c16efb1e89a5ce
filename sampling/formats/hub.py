"""hf://OWNER/NAME as the target of an export: a folder that is uploaded as one commit to a repository of the Hub.

Tokens and endpoint are huggingface_hub's own: `hf auth login`, HF_TOKEN, HF_ENDPOINT.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from scoreray.data.errors import ScorerayError, StorageError, UserError, shortened
from scoreray.data.extras import check_installed
from scoreray.data.scratch import scratch_folder

SCHEME = "hf://"
REPLACED = ("*.safetensors", "*.onnx", "*.onnx.data", "*.pt2", "*.png")
"""Files of an earlier export: those that this one does not write are removed in the same commit."""


@contextlib.contextmanager
def export_target(out: str) -> Iterator[str]:
    """Where to write what is meant for `out`: itself, or for hf://OWNER/NAME a temporary folder, uploaded at the end.

    A repository that is not there is made, and private: what is published by mistake can't be taken back. Raises
    UserError (no such name, huggingface_hub not installed, no token that may write), StorageError (no answer).
    """
    if not out.startswith(SCHEME):
        yield out
        return
    name = out.removeprefix(SCHEME).rstrip("/")
    with _in_one_line(out):
        api = _checked_api(name)
    with scratch_folder() as folder:
        yield str(folder)
        with _in_one_line(out):
            api.create_repo(name, private=True, exist_ok=True)
            api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message="scoreray export",
                delete_patterns=list(REPLACED),
            )


def _checked_api(name: str) -> Any:
    """huggingface_hub's client, once it is known that somebody is logged in: an export may take an hour before."""
    check_installed("hub", f"{SCHEME}{name}", "huggingface_hub")
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    if name.count("/") != 1:
        raise UserError(f"{SCHEME}{name}: write {SCHEME}OWNER/NAME")
    validate_repo_id(name)
    api = HfApi(library_name="scoreray")
    api.whoami()
    return api


@contextlib.contextmanager
def _in_one_line(out: str) -> Iterator[None]:
    """What huggingface_hub raises (its own kinds, httpx's, OSError) as a line that names the target."""
    try:
        yield
    except ScorerayError:
        raise
    except Exception as error:  # its base class is that of requests, httpx or httpx2, by its version
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = shortened(" ".join(str(error).split()))
        if type(error).__name__ == "HFValidationError":
            raise UserError(f"{out}: {reason}") from None
        if status in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError":
            raise UserError(f"{out}: {reason}; `hf auth login` or HF_TOKEN gives a token that may write") from None
        raise StorageError(f"{out}: {reason}") from error
