"""``--ray``: the records of a command in shards, which the machines of a Ray cluster process.

Ray Data hands the shards to a pool of actors. Each opens the source and the model by their names, which have to be
valid on every machine (a shared file system, or names of the hub), and writes its shards to the output directory, which
has to be the same on every machine. What Ray transports is names, numbers and errors. Ray starts an actor that was
killed again, and the shard that it had.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import importlib.util
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dph.cli import common, described, results, shards
from dph.errors import UserError, one_line

LOCAL = "local"
SHARDS = 128
STORE_BYTES = 80 << 20  # the least that Ray takes; results are files
CONNECT_SECONDS = 10
NOT_PASSED = ("parser", "resume", "worker_device")  # of the options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a cluster."""
    group = parser.add_argument_group(
        "cluster", "machines that share a file system, through Ray Data (pip install 'dph[ray]')"
    )
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help=f"address of a Ray cluster (auto: of this machine's), or {LOCAL} to start Ray on this machine; --output "
        "is then a directory of JSONL files, part-00000-of-00128.jsonl and so on, with the lines of one process",
    )
    group.add_argument(
        "--workers",
        type=common.COUNT,
        metavar="K",
        help="processes that open the model (default: one for each GPU, or for each machine without --device cuda)",
    )
    group.add_argument(
        "--shards",
        type=common.COUNT,
        metavar="N",
        help=f"files of the output; what --resume continues with are whole files (default: {SHARDS}, or one for each "
        "batch if there are fewer)",
    )


def prepared(args: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments with which this process opens its job: with ``--ray`` on the CPU, in the workers' dtype.

    Raises UserError for options that do not fit together, and without Ray.
    """
    if args.ray is None:
        for name in ("workers", "shards"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name}: expected --ray with it, got none")
        return args
    if args.json:
        raise UserError("--ray: expected no --json with it, as the lines are written to --output, got one")
    if args.output is None:
        raise UserError("--ray: expected --output DIR with it, got none")
    if "seed" in args and args.seed is None:
        raise UserError("--ray: expected --seed with it, on which the answers of all workers depend, got none")
    if args.device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"--device: expected auto, cpu or cuda with --ray, which chooses GPUs itself, got {args.device}"
        )
    if importlib.util.find_spec("ray") is None:
        raise UserError("--ray: needs the ray package: pip install -e '.[ray]' or pip install 'ray[data]'")
    from dph import devices

    device = devices.choose("auto") if args.device == "auto" else args.device
    own = {"device": "cpu", "dtype": devices.inference_dtype(args.dtype, device), "worker_device": device}
    return argparse.Namespace(**{**vars(args), **own})


def check_output(args: argparse.Namespace, source: str) -> None:
    """Raise UserError if the output would mix with the source or the model; OSError if it cannot be written."""
    inputs = (source, args.model, os.path.join(args.model, "model"))
    if args.ray is None:
        common.check_output(args.output, *inputs)
        return
    own = Path(os.path.realpath(args.output))
    if own.exists() and not own.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), args.output)
    if not own.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), args.output)
    for name in inputs:
        if os.path.isdir(name) and own.is_relative_to(os.path.realpath(name)):
            raise UserError(f"--output: expected a directory outside of {name}, got {args.output}")


@contextlib.contextmanager
def written(job: results.Job, args: argparse.Namespace, quiet: bool = False) -> Iterator[Iterator[dict[str, Any]]]:
    """Iterator over the lines of a job, which this process computes, or with ``--ray`` a cluster.

    See :func:`dph.cli.results.written`. The lines of a cluster are yielded when all of them have been written.
    """
    if args.ray is None:
        with results.written(job, args.output, args.resume, quiet) as lines:
            yield lines
        return
    about = {**job.about, "device": args.worker_device}
    parts = shards.split(job.sizes(), args.shards or SHARDS)
    with (
        shards.Shards(args.output, about, parts, args.resume) as output,
        results.Progress(job.name, job.total, quiet) as progress,
    ):
        missing = output.missing()
        progress.begin(job.total - sum(shard.stop - shard.start for shard in missing))
        if missing:
            with contextlib.closing(_processed(missing, args, about)) as counts:
                for count in counts:
                    progress.advance(count)
        if lost := output.missing():
            raise UserError(
                f"--output: expected a directory that all machines share, got {args.output}, where {lost[0].name} is "
                "missing, which a worker has written"
            )
        yield output.lines()


class Worker:
    """One engine of the cluster: an actor that opens a command's job at its first shard.

    Args:
        options: of the command, by name.
        about: on what the results depend, which has to be the same on every machine.
        folder: working directory, for relative paths.
    """

    def __init__(self, options: Mapping[str, Any], about: Mapping[str, Any], folder: str) -> None:
        self._options, self._about, self._folder = options, about, folder

    @cached_property
    def _job(self) -> results.Job:
        """The job. Raises UserError if it is not that of the command."""
        os.chdir(self._folder)
        job = importlib.import_module(f"dph.cli.{self._options['command']}").open_job(
            argparse.Namespace(**self._options)
        )
        if keys := described.differing(self._about, job.about):
            raise UserError(
                f"worker on {os.uname().nodename}: expected the same {', '.join(keys)} as in the process that started "
                "it, got another"
            )
        return job

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Write a shard, a batch of one row; return its number of records, or an error's text, kind and traceback.

        An error that was raised here would be tried again, and printed with Ray's own traceback.
        """
        from dph.cli import main

        (name,), (start,), (stop,) = (batch[field].tolist() for field in shards.Shard._fields)
        error, is_input, trace = "", False, ""
        try:
            shards.write(lambda: self._job, Path(self._options["output"]) / name, start, stop)
        except Exception as failure:
            error, is_input, trace = (
                main.explain(failure),
                isinstance(failure, main.INPUT_ERRORS),
                traceback.format_exc(),
            )
        return {"records": [stop - start], "error": [error], "is_input": [is_input], "trace": [trace]}


def _processed(
    missing: Sequence[shards.Shard], args: argparse.Namespace, about: Mapping[str, Any]
) -> Generator[int, None, None]:
    """Have workers write shards; yield the number of records of each one when it is complete."""
    options = {name: value for name, value in vars(args).items() if name not in NOT_PASSED}
    options["device"] = args.worker_device
    with contextlib.closing(_mapped(missing, (options, about, os.getcwd()), args)) as rows:
        for row in rows:
            if row["error"]:
                kind = UserError if row["is_input"] else RuntimeError
                raise kind(row["error"]) from RuntimeError(row["trace"])
            yield row["records"]


def _mapped(
    missing: Sequence[shards.Shard], arguments: tuple[Any, ...], args: argparse.Namespace
) -> Generator[Mapping[str, Any], None, None]:
    """Yield what :class:`Worker`, made with these arguments, returns for each shard, in the order of completion."""
    with _connected(args.ray) as ray:
        resources = _resources([node["Resources"] for node in ray.nodes() if node["Alive"]], args)
        pool = ray.data.ActorPoolStrategy(size=resources.pop("workers"), max_tasks_in_flight_per_actor=1)
        rows = ray.data.from_items([shard._asdict() for shard in missing], override_num_blocks=len(missing))
        done = rows.map_batches(Worker, fn_constructor_args=arguments, batch_size=1, compute=pool, **resources)
        try:
            yield from done.iter_rows()
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"--ray: {one_line(error)}") from error


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Context with a connection to a cluster; that of LOCAL ends with it. It has the module ``ray``."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of what Ray Data itself does
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(f"--ray: needs the ray package: pip install 'ray[data]': {one_line(error)}") from error

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        options |= {
            "num_cpus": len(os.sched_getaffinity(0)),
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
        }
    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints there that a worker was killed
        try:
            _check_reachable(address)
            ray.init(address, **options)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--ray: expected the address of a running cluster, or {LOCAL}, got {address}: {one_line(error)}"
            ) from error
        finally:
            signal.signal(signal.SIGTERM, handler)  # Ray sets one of its own
        try:
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = context.print_on_execution_start = False
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            yield ray
        finally:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing answers at HOST:PORT, which Ray tries for ten minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def _resources(nodes: Sequence[Mapping[str, float]], args: argparse.Namespace) -> dict[str, int]:
    """Return the number of workers, and the cores and GPUs of each: as many cores as fit on the machines.

    Raises UserError if the machines have too few.
    """
    gpus = int(args.worker_device == "cuda")
    most = sum(int(node.get("GPU" if gpus else "CPU", 0)) for node in nodes)
    workers = args.workers or (most if gpus else len(nodes))
    if not 1 <= workers <= most:
        raise UserError(
            f"--workers: expected at most {most}, the number of {'GPUs' if gpus else 'cores'} of the cluster, got "
            f"{workers}"
        )

    def fitting(cores: int) -> int:
        fit = 0
        for node in nodes:
            own = int(node.get("CPU", 0)) // cores
            fit += min(own, int(node.get("GPU", 0))) if gpus else own
        return fit

    cores = 1
    while fitting(cores + 1) >= workers:
        cores += 1
    return {"workers": workers, "num_cpus": cores, "num_gpus": gpus}
