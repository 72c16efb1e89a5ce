"""The sampling service for Ray Serve's config files (RayService): `import_path: scoreray.cluster.serve.app:build`."""

from __future__ import annotations

from typing import Any

from scoreray.cluster.serve.deployments import application
from scoreray.cluster.serve.options import ServeOptions


def build(args: ServeOptions) -> Any:
    """The application. Raises UserError: on a cluster others can reach the listener, so tokens are needed."""
    return application(*args.checked("0.0.0.0"))
