"""What each process of the tests in test_distributed.py runs."""

import torch
from detectron2.modeling import build_model
from detectron2.utils import comm
from helpers import make_input, tiny_cfg

from fcos_d2.engine import distribute


def training_step(cases, fcos_keys, model_file, out):
    """Losses and gradients of each case, of this process's share of its images."""
    cfg = tiny_cfg(**fcos_keys)
    cfg.MODEL.RESNETS.NORM = "FrozenBN"  # batch statistics would differ with the share
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False
    model = build_model(cfg)
    model.load_state_dict(torch.load(model_file, map_location="cpu"))
    world, rank = comm.get_world_size(), comm.get_rank()
    ddp = distribute(model, cfg.MODEL.DEVICE)
    results = []
    for case in cases:
        images = [make_input(*objects, seed=i) for i, objects in enumerate(case)]
        model.zero_grad()
        losses = ddp(images[rank::world])
        compiled = model.backbone._compiled_call_impl is not None
        assert compiled == cfg.MODEL.FCOS.COMPILE
        sum(losses.values()).backward()
        losses = comm.reduce_dict({k: v.detach() for k, v in losses.items()})
        if rank == 0:
            gradients = {
                n: p.grad.clone().cpu() for n, p in model.named_parameters() if p.requires_grad
            }
            results.append(({k: float(v) for k, v in losses.items()}, gradients))
    if rank == 0:
        state = {k: x.cpu() for k, x in model.loss.state_dict().items()}
        torch.save((results, state), out)
