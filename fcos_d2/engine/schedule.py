"""A schedule that fits the length of the training."""

from collections.abc import Collection

from detectron2.config import CfgNode


def follow_max_iter(cfg: CfgNode, own_solver: CfgNode, given: Collection[str]) -> str:
    """Scale SOLVER.STEPS and WARMUP_ITERS with a MAX_ITER that the command line sets.

    Args:
        cfg: changed in place.
        own_solver: the section SOLVER of the config file alone.
        given: the keys that the command line sets. They stay as they are.

    Returns:
        what has changed, as a sentence; "" for nothing.
    """
    solver = cfg.SOLVER
    scale = solver.MAX_ITER / own_solver.MAX_ITER
    if "SOLVER.MAX_ITER" not in given or scale == 1:
        return ""
    # A short training may merge steps, or have them at 0.
    steps = {step * solver.MAX_ITER // own_solver.MAX_ITER for step in own_solver.STEPS} - {0}
    followers = {
        "STEPS": tuple(sorted(steps)),
        "WARMUP_ITERS": round(own_solver.WARMUP_ITERS * scale),
    }
    followers = {key: new for key, new in followers.items() if f"SOLVER.{key}" not in given}
    solver.update(followers)
    changes = ", ".join(f"{key} {own_solver[key]} -> {new}" for key, new in followers.items())
    return changes and (
        f"SOLVER.MAX_ITER {own_solver.MAX_ITER} -> {solver.MAX_ITER} scales SOLVER.{changes}"
    )


def check_steps(solver: CfgNode) -> None:
    """Raise a ValueError for SOLVER.STEPS that do not go up, or that lie beyond the end."""
    if solver.LR_SCHEDULER_NAME != "WarmupMultiStepLR":  # the others have no steps
        return
    steps, end = list(solver.STEPS), solver.MAX_ITER
    if steps != sorted(set(steps)) or any(not 0 < step < end for step in steps):
        raise ValueError(
            f"SOLVER.STEPS {tuple(steps)} must go up, and lie before the end of the training, "
            f"SOLVER.MAX_ITER {end}: at each of them the learning rate falls. For example, write "
            f'SOLVER.STEPS "({end * 2 // 3}, {end * 8 // 9})", or "()" for a rate that never falls'
        )
