"""A run on the machines of a Ray cluster: Ray Data hands out blocks to workers that keep the model.

All of them have the run's folder at the same path. What a worker leaves undone is another one's, and a block's bytes do
not depend on who draws it.
"""

import os
from collections.abc import Callable
from typing import Any

from ldm.errors import UserError
from pipelines.batch.run import Begun, Engine
from pipelines.batch.setup import Setup
from pipelines.batch.work import Work, draw_open

_SHARES = 4096  # that Ray is given at most


class _Worker:
    """Draws the blocks that Ray gives it; kept by Ray, one a device."""

    def __init__(self, setup: Setup):
        self._work = Work.joined(setup)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for block in batch["block"]:
            with self._work.ledger.claim(int(block)) as mine:
                if mine:
                    self._work.draw(int(block))
        return batch


def on_ray(workers: int | None) -> Engine:
    """Return what draws a run by `workers` workers; None is as many as the cluster has devices for.

    It takes the cluster that RAY_ADDRESS names, or one that runs on this machine, or else starts one here. Raises
    UserError where Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError('--engine ray needs Ray: pip install "ldm-text-to-image[ray]"') from error

    def engine(each: Begun, tell: Callable[[], None]) -> None:
        own = not ray.is_initialized()
        if own:
            _connect(ray)
        try:
            _draw(ray, each, workers, tell)
        finally:
            if own:
                ray.shutdown()
        # What a worker that died has left: nobody else has it now.
        draw_open(Work(each.setup, each.pipe, each.ledger, each.progress.add), each.ledger, tell)

    return engine


def _connect(ray: Any) -> None:
    how: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    # Workers of this machine find this package where this process did.
    paths = os.pathsep.join([*dict.fromkeys([_root(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])])
    how["runtime_env"] = {"env_vars": {"PYTHONPATH": paths.rstrip(os.pathsep)}}
    try:
        ray.init(address="auto", **how)
    except ConnectionError:
        ray.init(include_dashboard=False, **how)


def _draw(ray: Any, each: Begun, workers: int | None, tell: Callable[[], None]) -> None:
    setup, ledger = each.setup, each.ledger
    blocks = ledger.open_blocks()
    has, threads = ray.cluster_resources(), ledger.asked["threads"]
    gpus = int(has.get("GPU", 0)) if setup.device in (None, "cuda") else 0
    fit = gpus or max(1, int(has.get("CPU", 1)) // threads)
    count = max(1, min(fit if workers is None else workers, len(blocks)))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    needs = {"num_gpus": 1} if gpus else {"num_cpus": min(threads, int(has.get("CPU", 1)))}
    shares = ray.data.from_items(
        [{"block": block} for block in blocks], override_num_blocks=min(len(blocks), _SHARES)
    )
    drawn = shares.map_batches(
        _Worker, fn_constructor_args=(setup,), batch_size=1, concurrency=count, max_restarts=-1, **needs
    )
    try:
        for _ in drawn.iter_batches(batch_size=1, prefetch_batches=0):
            tell()
    except ray.exceptions.RayError as error:
        cause = _cause(error)
        if cause is None:
            raise
        raise cause from error


def _cause(error: BaseException | None) -> UserError | None:
    """The message for the user that a worker's error came from."""
    while error is not None:
        for each in (error, getattr(error, "cause", None)):
            if isinstance(each, UserError):
                return UserError(str(each))
        error = error.__cause__
    return None


def _root() -> str:
    """The folder that holds this package."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
