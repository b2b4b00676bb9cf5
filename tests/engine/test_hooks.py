import logging
import re
import time
from types import SimpleNamespace

import torch
from torch import nn

from fcos_d2.engine import hooks


def test_statistics_of_batch_norm_are_averaged_over_the_processes(monkeypatch):
    ours = nn.Sequential(nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.BatchNorm2d(2))
    theirs = nn.Sequential(nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.BatchNorm2d(2))
    expected = []
    for a, b in zip(ours, theirs, strict=True):
        for module in (a, b):
            if isinstance(module, nn.BatchNorm2d):
                module(torch.randn(4, module.num_features, 5, 5) * 3 + 7)
        if isinstance(a, nn.BatchNorm2d):
            expected += [(a.running_mean + b.running_mean) / 2, (a.running_var + b.running_var) / 2]
    other = torch.cat([x for m in (theirs[0], theirs[2]) for x in (m.running_mean, m.running_var)])
    monkeypatch.setattr(hooks.dist, "all_reduce", lambda values: values.add_(other))
    hook = hooks.AverageBatchNormStatistics()
    hook.trainer = SimpleNamespace(model=ours)
    before = ours[0].running_mean.clone()
    hook.before_train()
    hook.after_step()  # one process: nothing to agree on
    assert torch.equal(ours[0].running_mean, before)
    monkeypatch.setattr(hooks.comm, "get_world_size", lambda: 2)
    hook.after_step()
    found = [x for m in (ours[0], ours[2]) for x in (m.running_mean, m.running_var)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_process_that_waits_says_where(monkeypatch, caplog):
    monkeypatch.setattr(hooks.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(hooks, "_WAIT_LOGGED_AFTER", 0.05)
    hook = hooks.WaitingLog()
    hook.trainer = SimpleNamespace(iter=17)
    with caplog.at_level(logging.WARNING):
        hook.before_train()
        hook.before_step()
        end = time.monotonic() + 60
        while not re.search(r"has been in iteration 17 .*test_hooks\.py", caplog.text):
            assert time.monotonic() < end
            time.sleep(0.05)
        hook.after_step()
        count = caplog.text.count("has been in iteration 17")
        time.sleep(0.2)  # between steps, for example in an evaluation, it is silent
        assert caplog.text.count("has been in iteration") <= count + 1
        hook.after_train()
