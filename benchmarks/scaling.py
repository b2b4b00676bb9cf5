"""R-50 FCOS on several processes, and with larger batches.

1, 2, 4, ... processes train with as many images each, as `train_net.py --num-gpus N` does: over
NCCL on GPUs, over GLOO on CPU, where the processes share the cores. "All-reduce" is what a step
takes longer than one whose gradients stay in their process. Then training and inference of one
process with growing batches.

    python benchmarks/scaling.py [--processes 1 2] [--batch 1 2 4] [--size 400 608]
"""

import argparse
import tempfile
from pathlib import Path

import torch
from common import default_device, in_turns, machine, make_images
from detectron2.engine import launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from fcos_d2 import model_zoo
from fcos_d2.engine import distribute

CONFIG = "COCO-Detection/fcos_R_50_FPN_1x.yaml"


def build(device: str, opts: list[str]) -> nn.Module:
    cfg = model_zoo.get_config(CONFIG)
    cfg.MODEL.DEVICE = device
    cfg.merge_from_list(opts)
    return build_model(cfg).train()


def train_in_process(args: argparse.Namespace, out: str) -> None:
    """Times of one process of several; the first one writes them."""
    device, world = args.device, comm.get_world_size()
    if device == "cpu":
        torch.set_num_threads(max(1, args.cores // world))
    torch.manual_seed(comm.get_rank())
    model = build(device, args.opts)
    ddp = distribute(model, device)
    batch = make_images(args.images, tuple(args.size))

    def step() -> None:
        model.zero_grad()
        sum(ddp(batch).values()).backward()

    functions = {"step": step}
    if world > 1:

        def step_alone() -> None:
            with ddp.no_sync():
                step()

        functions["step alone"] = step_alone
    with EventStorage(1):
        times = in_turns(functions, args.repeats, device)
    if comm.get_rank() == 0:
        gradients = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
        torch.save((times, sum(gradients)), out)


def measure_processes(args: argparse.Namespace) -> None:
    rows, first = [], None
    for world in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / "times")
            launch(train_in_process, world, dist_url="auto", args=(args, out))
            times, num_bytes = torch.load(out)
        step, images = times["step"], world * args.images
        all_reduce = step - times.get("step alone", step)
        per_second = images / step * 1e3
        first = first or per_second / world
        rows.append([world, images, step, all_reduce, per_second, per_second / (first * world)])
    print(f"\n{num_bytes / 2**20:.0f} MB of gradients a step and process")
    headers = ["processes", "images", "step ms", "all-reduce ms", "images/s", "efficiency"]
    print(tabulate(rows, headers, floatfmt=(".0f", ".0f", ".0f", ".0f", ".2f", ".2f")))


def measure_batches(args: argparse.Namespace) -> None:
    model = build(args.device, args.opts)
    rows = []
    for count in args.batch:
        batch = make_images(count, tuple(args.size))

        def step(batch=batch) -> None:
            model.train().zero_grad()
            sum(model(batch).values()).backward()

        @torch.no_grad()
        def detect(batch=batch) -> None:
            model.eval()(batch)

        with EventStorage(1):
            times = in_turns({"step": step, "detect": detect}, args.repeats, args.device)
        rows.append([count, *(x for t in times.values() for x in (t, count / t * 1e3))])
    headers = ["batch", "training ms", "images/s", "inference ms", "images/s"]
    print("\none process")
    print(tabulate(rows, headers, floatfmt=(".0f", ".0f", ".2f", ".0f", ".2f")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = default_device()
    gpus = torch.cuda.device_count()
    processes = [n for n in (1, 2, 4, 8) if n <= gpus] if gpus else [1, 2]
    parser.add_argument("--processes", type=int, nargs="+", default=processes)
    parser.add_argument("--images", type=int, default=2, help="of each process")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--size", type=int, nargs=2, default=(800, 1216) if device == "cuda" else (400, 608)
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("opts", nargs="*", default=[], help="config keys and values")
    args = parser.parse_args()
    args.device, args.cores = device, torch.get_num_threads()
    print(f"{machine(device)}; {args.size[0]}x{args.size[1]}, {args.images} images a process")
    measure_processes(args)
    measure_batches(args)


if __name__ == "__main__":
    main()
