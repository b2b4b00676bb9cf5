"""Processes that load images."""

import multiprocessing
import sys

import pytest
from torch.utils.data import Dataset

from fcos_d2.data.workers import SteadyLoader

imported_and_set = []


class Seen(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return len(imported_and_set)


def load(results):
    imported_and_set.append(1)
    results.put(next(iter(SteadyLoader(Seen(), num_workers=1))).item())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely")
def test_workers_of_a_spawned_process_import_nothing_anew():
    """As under --num-gpus. A spawned worker would import this file, and see an empty list."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=load, args=(results,))
    process.start()
    assert results.get(timeout=100) == 1
    process.join()
