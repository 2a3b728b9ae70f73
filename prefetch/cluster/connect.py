"""Opens a Dask cluster: local processes, an address, or jobs of Slurm. The only file that imports Dask.

It knows no shard but by its name.
"""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING, Any

from prefetch.cluster.worker import n_threads
from prefetch.errors import ConfigError, PrefetchError
from prefetch.optional import require

if TYPE_CHECKING:
    from distributed import Client

    from prefetch.cluster.mapping import Dask

PATIENCE_S = (
    10,
    30,
    90,
)  # until a process that should start again has done so; a busy machine takes its time


class ClusterError(PrefetchError):
    """Workers that die or fail, and a scheduler that is not there."""


def connected(settings: Dask) -> Client:
    distributed = require("distributed", "Client", "LocalCluster", asked_by="cluster=dask")
    for name in logging.root.manager.loggerDict:
        if name.partition(".")[0] == "distributed":  # deaths are told in our words
            logging.getLogger(name).setLevel(logging.CRITICAL)
    if settings.address is not None:
        return _at_address(distributed, settings)
    cluster = slurm(settings) if settings.slurm is not None else _local(distributed, settings)
    client: Client = distributed.Client(cluster, set_as_default=False)
    return client


def explained(error: BaseException, name: str) -> PrefetchError:
    """What went wrong with a shard, by its name; errors of ours keep their kind."""
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):
        deaths = error.allowed_failures + 1
        return ClusterError(
            f"{name}: gave up, {deaths} workers died while they ran it (cluster.retries={deaths - 1}), the last at "
            f"{error.last_worker.address}; memory is the usual reason: fewer workers per machine, or more of "
            "cluster.shards_per_worker"
        )
    if isinstance(error, PrefetchError):
        return type(error)(f"{error} ({name})")
    if isinstance(error, ModuleNotFoundError):
        return ConfigError(
            f"{name}: a worker cannot import {error.name}; give the workers the same environment"
        )
    return ClusterError(f"{name}: failed on a worker; {type(error).__name__}: {error}")


def _at_address(distributed: Any, settings: Dask) -> Client:
    try:
        client: Client = distributed.Client(
            settings.address, timeout=settings.timeout_s, set_as_default=False
        )
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"cluster.address={settings.address}: no Dask scheduler answers there within {settings.timeout_s:g} s; "
            "`dask scheduler` starts one, `dask worker ADDRESS --nthreads 1` a worker"
        ) from error
    try:
        wait_for_workers(client, settings, "has no workers")
    except BaseException:
        client.close()
        raise
    return client


def wait_for_workers(client: Client, settings: Dask, what: str) -> None:
    try:
        client.wait_for_workers(1, timeout=settings.timeout_s)
    except TimeoutError as error:
        raise ClusterError(
            f"cluster.address={settings.address}: the scheduler {what}, and none came within {settings.timeout_s:g} s; "
            "`dask worker ADDRESS --nthreads 1` starts one"
        ) from error


def revive(client: Client) -> None:
    """Local processes that are gone: Dask's nanny starts no new worker for one that dies while it starts."""
    n_workers = max(1, len(client.cluster.workers))
    for patience_s in PATIENCE_S:
        try:
            client.wait_for_workers(1, timeout=patience_s)
            return
        except TimeoutError:
            client.cluster.scale(0)
            client.cluster.scale(n_workers)
    raise ClusterError(
        "cluster: workers of this machine die before they begin; cluster=none runs without them"
    )


def _local(distributed: Any, settings: Dask) -> Any:
    """One shard at a time per process; memory is bounded by what a shard is, not by killing workers."""
    return distributed.LocalCluster(
        n_workers=settings.workers or max(1, n_threads() // settings.threads),
        threads_per_worker=1,
        memory_limit=None,
        dashboard_address=None,
        silence_logs=logging.CRITICAL,
        scheduler_kwargs=_of_scheduler(settings),
    )


def _of_scheduler(settings: Dask) -> dict[str, Any]:
    """Any port, because several may run on a machine."""
    return {"dashboard": False, "dashboard_address": ":0", "allowed_failures": settings.retries}


def slurm(settings: Dask) -> Any:
    """Jobs of `workers_per_job` processes each, as many as there must be workers."""
    jobs = require("dask_jobqueue", "SLURMCluster", asked_by="cluster=slurm")
    told = dict(settings.slurm or {})
    per_job = told.pop("workers_per_job", 1)
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "cluster=slurm: Slurm is not on this machine (no sbatch); try cluster=dask"
        )
    if type(per_job) is not int or per_job < 1:
        raise ConfigError(f"cluster.slurm.workers_per_job={per_job}: must be at least 1")
    try:
        cluster = jobs.SLURMCluster(
            cores=per_job,  # a shard at a time per process; the machine's cores are asked for by job_cpu
            processes=per_job,
            job_cpu=per_job * settings.threads,
            scheduler_options=_of_scheduler(settings),
            **{name: value for name, value in told.items() if value is not None},
        )
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise ConfigError(
            f"cluster.slurm={told}: dask_jobqueue cannot use it ({type(error).__name__}: {error})"
        ) from error
    cluster.scale(jobs=-(-(settings.workers or 1) // per_job))
    return cluster
