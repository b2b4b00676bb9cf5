"""What each process of the tests in engine/test_accumulation.py runs."""

import torch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from helpers import LIGHT, make_input, tiny_cfg

from fcos_d2.engine import distribute
from fcos_d2.engine.averaging import WeightAverage
from fcos_d2.engine.step_trainer import StepTrainer

ONE = (((10.0, 8.0, 50.0, 40.0),), (1,))
TWO = (((2.0, 4.0, 30.0, 60.0), (40.0, 10.0, 90.0, 50.0)), (0, 2))
NONE = ((), ())
# Boxes and classes of the images of each step.
CASES = [(ONE, TWO, NONE, ONE), (NONE, NONE, TWO, TWO), (NONE, NONE, NONE, NONE)]


def step(fcos_keys, accumulate, out):
    """Losses, gradients and moving averages after each step on all images."""
    cfg = tiny_cfg(**fcos_keys)
    cfg.merge_from_list(LIGHT)
    cfg.MODEL.RESNETS.NORM = "FrozenBN"  # batch statistics would differ with the part
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    model = build_model(cfg).train()
    world, rank = comm.get_world_size(), comm.get_rank()
    ddp = distribute(model, cfg.MODEL.DEVICE)
    average = WeightAverage(model, decay=0.9)
    reductions = []
    if world > 1:
        ddp.register_comm_hook(reductions, count_and_reduce)
    batches = [[make_input(*objects, seed=i) for i, objects in enumerate(case)] for case in CASES]
    share = iter([batch[rank::world] for batch in batches])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = StepTrainer(ddp, share, optimizer, cfg.MODEL.DEVICE, None, accumulate)
    results = []
    with EventStorage(0) as storage:
        for trainer.iter in range(len(CASES)):
            storage.iter = trainer.iter
            reductions.clear()
            trainer.run_step()
            trainer.gather_metrics()
            gradients = {n: p.grad.clone().cpu() for n, p in model.named_parameters()}
            losses = {k: x for k, (x, _) in storage.latest().items() if "loss" in k}
            losses = {k: x for k, x in losses.items() if not k.startswith("fcos/")}
            average.update_parameters(model)
            state = {k: x.clone().cpu() for k, x in average.module.state_dict().items()}
            num_positives = model.loss.state_dict().get("ema_num_positives", torch.tensor(0.0))
            results.append(
                {"losses": losses, "gradients": gradients, "averaged weights": state}
                | {"average of positives": num_positives.item(), "reductions": len(reductions)}
            )
    if rank == 0:
        torch.save(results, out)


def count_and_reduce(reductions, bucket):
    """As without a hook of ours, noted in ``reductions``."""
    reductions.append(bucket.index())
    mean = bucket.buffer().div_(comm.get_world_size())
    return (
        torch.distributed.all_reduce(mean, async_op=True)
        .get_future()
        .then(lambda reduced: reduced.value()[0])
    )
