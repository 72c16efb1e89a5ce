"""The site's pages of the Python API: the modules that README.md and docs/design.md name, from their docstrings."""

from __future__ import annotations

AREAS = {
    "processes": (
        "Processes and denoisers",
        "What turns data into noise, and the one callable that the rest of the code sees: "
        "`denoiser(x, sigma, condition)` is E[x_0 | x] for x = x_0 + sigma z.",
        ("scoreray.trainer.process", "scoreray.trainer.denoiser", "scoreray.trainer.diffusion.condition"),
    ),
    "sampling": (
        "Loading and sampling",
        "A checkpoint as a denoiser, noise levels, and the samplers that take both.",
        (
            "scoreray.sampling.load",
            "scoreray.sampling.sigmas",
            "scoreray.sampling.samplers.sample",
            "scoreray.sampling.samplers.options",
            "scoreray.sampling.samplers.noise",
            "scoreray.sampling.guidance.guidance",
            "scoreray.sampling.guidance.inverse",
            "scoreray.sampling.measures.likelihood",
        ),
    ),
    "data": (
        "Data",
        "Packing, reading, and the stream that a rank trains on.",
        (
            "scoreray.data.packing.pack",
            "scoreray.data.stream",
            "scoreray.data.reading.manifest",
            "scoreray.data.webdataset",
            "scoreray.data.storage.store",
            "scoreray.data.storage.local_s3:LocalS3",
            "scoreray.data.errors",
        ),
    ),
    "training": (
        "Networks, objectives, training",
        "What a config names, as Python: each is a frozen config whose `build` makes the module.",
        (
            "scoreray.trainer.config",
            "scoreray.trainer.networks.network",
            "scoreray.trainer.networks.base",
            "scoreray.trainer.objectives.objective",
            "scoreray.trainer.diffusion.weighting",
            "scoreray.trainer.diffusion.sigma_sampling",
            "scoreray.trainer.optim.ema",
        ),
    ),
    "evaluation": (
        "Evaluation",
        "What `scoreray evaluate` does: metrics with their errors, and a page of them.",
        (
            "scoreray.sampling.evaluation.evaluate:evaluate",
            "scoreray.sampling.evaluation.evaluate:Evaluation",
            "scoreray.sampling.metrics.plan:EvaluationSettings",
            "scoreray.sampling.metrics.record:EvaluationRecord",
            "scoreray.sampling.metrics.record:MetricValue",
        ),
    ),
    "serving": (
        "Serving",
        "The step batcher, and a client of the service.",
        ("scoreray.sampling.batcher", "scoreray.sampling.http.client"),
    ),
}
"""Page -> (title, what it has, modules or module:Name)."""
FOLDER = "reference/python/"


def pages() -> dict[str, str]:
    """Page -> text; mkdocstrings replaces each module's line by what its docstrings say."""
    return {
        f"{FOLDER}{name}.md": f"# {title}\n\n{what}\n\n" + "\n".join(f"::: {one.replace(':', '.')}\n" for one in named)
        for name, (title, what, named) in AREAS.items()
    }


def page_of(path: str) -> str | None:
    """The page that describes a module, `trainer/process.py`; None where none does."""
    module = "scoreray." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return next(
        (
            f"{FOLDER}{name}.md"
            for name, (*_, named) in AREAS.items()
            if module in (one.partition(":")[0] for one in named)
        ),
        None,
    )
