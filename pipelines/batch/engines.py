"""The ways to share out the blocks of a run, by name."""

from pipelines.batch.run import Engine


def engine_named(name: str, workers: int | None) -> Engine | None:
    """Return what `run` takes as engine: None for "local", or "ray"'s. Raises UserError where it isn't installed."""
    if name == "local":
        return None
    from pipelines.batch.on_ray import on_ray

    return on_ray(workers)
