"""A run in one process or many: started by --num-gpus, torchrun, or Slurm."""

import argparse
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from detectron2 import engine as detectron2_engine
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import record
from torch.multiprocessing import ProcessExitedException

from .peers import PeerWatch, forget_host_group, host_group
from .stopping import Stopped, StopSignals, exit_code

_STOPPED_WITHIN = 60.0  # seconds, in which all processes of a run that stops are there

_watch: PeerWatch | None = None


def launch(main: Callable, args: argparse.Namespace) -> object:
    """Call ``main(args)`` in as many processes as asked for.

    If torchrun or Slurm's srun has started several processes, this is one of them. Else it starts
    ``args.num_gpus`` processes on each of ``args.num_machines``, passes stop signals on to them,
    and exits with the code of a stopped run if they stop. If one of several processes fails or is
    killed, the others end within seconds.

    Args:
        args: of :func:`argument_parser`.

    Returns:
        what ``main`` returns, unless it runs in new processes.
    """
    timeout = timedelta(minutes=args.timeout)
    place = _place_in_environment(args.num_gpus)
    if place is not None:
        _join(place, timeout)
        return record(_run)(main, args)  # torchrun's report shows the error, as the first one
    if args.num_gpus * args.num_machines == 1:
        return main(args)
    received = []

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        processes = multiprocessing.active_children()
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)
        if not processes:  # none has started yet
            sys.exit(exit_code(number))

    before = {number: signal.signal(number, pass_on) for number in StopSignals.numbers}
    try:
        detectron2_engine.launch(
            _run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, args),
            timeout=timeout,
        )
    except ProcessExitedException as error:
        # A single process may have got the signal: then it stops them all. Before and after the
        # training a signal kills it, which is the negative code.
        codes = {code: exit_code(n) for n in StopSignals.numbers for code in (exit_code(n), -n)}
        if not received and error.exit_code not in codes:
            raise
        sys.exit(exit_code(received[-1]) if received else codes[error.exit_code])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        sys.exit(exit_code(received[-1]))


def _run(main: Callable, args: argparse.Namespace) -> object:
    """``main(args)`` in one of several processes."""
    global _watch
    host_group(timedelta(minutes=args.timeout))
    _watch = PeerWatch()
    try:
        result = main(args)
    except Stopped:  # after the same step as the others
        leave_group(within=_STOPPED_WITHIN)
        raise
    except BaseException:
        tell_failure()
        raise
    leave_group()
    return result


def tell_failure() -> None:
    """Let the other processes of the group end, because this one fails."""
    if _watch is not None:
        _watch.fail()


def leave_group(within: float | None = None) -> None:
    """Leave the group of processes, when there is nothing left to do together.

    All processes must call it. Each is alone afterwards, and its ``comm.get_rank()`` is 0.

    Args:
        within: seconds to wait for the others; as long as it takes if not given.
    """
    global _watch
    if _watch is not None:
        _watch.leave(within)
        _watch = None
        forget_host_group()
        dist.destroy_process_group()


@dataclass(frozen=True)
class _Place:
    """This process among those that torchrun or Slurm has started."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    url: str
    variable: str  # the one that says how many processes there are


def _place_in_environment(num_gpus: int) -> _Place | None:
    """What torchrun's or Slurm's variables say of this process, or None if it is alone."""
    env = os.environ
    # A job's script sees SLURM_NTASKS too, but only srun sets the number of its own tasks.
    is_script_of_job = num_gpus > 1 and "SLURM_STEP_NUM_TASKS" not in env
    if "RANK" in env and "WORLD_SIZE" in env:
        place = _Place(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env.get("LOCAL_RANK", env["RANK"])),
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", 1)),
            url="env://",
            variable="WORLD_SIZE",
        )
    elif "SLURM_PROCID" in env and "SLURM_NTASKS" in env and not is_script_of_job:
        world_size = int(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"]))
        address = env.get("MASTER_ADDR") or _first_slurm_machine()
        # The same port for all tasks of a job, and another one for other jobs on the machine.
        port = env.get("MASTER_PORT") or 20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000
        place = _Place(
            rank=int(env["SLURM_PROCID"]),
            world_size=world_size,
            local_rank=int(env.get("SLURM_LOCALID", 0)),
            local_world_size=_slurm_tasks_per_node(world_size),
            url=f"tcp://{address}:{port}",
            variable="SLURM_NTASKS",
        )
    else:
        return None
    return place if place.world_size > 1 else None


def _first_slurm_machine() -> str:
    """The first of a list: gpu07 of "gpu[07-09,12],other"."""
    machines = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", machines or "")
    return match[1] + (match[2] or "") if match else "127.0.0.1"


def _slurm_tasks_per_node(world_size: int) -> int:
    """Number of tasks on each machine: 4 of "4(x2)".

    Raises:
        ValueError: if the machines have different numbers.
    """
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE")
    if text is None:
        return world_size
    counts = {int(part.partition("(")[0]) for part in text.split(",")}
    if len(counts) > 1:
        raise ValueError(
            f"Slurm has started different numbers of tasks on the machines ({text}). Ask for the "
            "same number on each, with --ntasks-per-node"
        )
    return counts.pop()


def _join(place: _Place, timeout: timedelta) -> None:
    """Join the process group, as Detectron2's launch does for the processes that it starts."""
    print(  # loggers are not set up yet: that needs the config
        f"Process {place.rank} waits for the others ({place.url}, at most "
        f"{timeout.total_seconds() / 60:g} minutes): {place.variable} is {place.world_size}",
        flush=True,
    )
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        # Slurm may show each task only its own GPU.
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    dist.init_process_group(
        backend="NCCL" if has_gpu else "GLOO",
        init_method=place.url,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
    )
    comm.create_local_process_group(place.local_world_size)
    comm.synchronize()


def distribute(model: torch.nn.Module, device: str) -> torch.nn.Module:
    """The model, which is on ``device``, under DDP if there are several processes."""
    on_cpu = torch.device(device).type == "cpu"
    # Without device_ids Detectron2 passes the local rank. DDP refuses it for CPU modules, and a
    # process that sees only its own GPU has no GPU of that number.
    device_ids = None if on_cpu else [torch.cuda.current_device()]
    return detectron2_engine.create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)
