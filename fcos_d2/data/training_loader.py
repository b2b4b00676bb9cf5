"""Training batches that depend on the seed and the iteration alone.

Which images are in the batch of an iteration, and how they are augmented, is the same for every
number of data loading workers and of processes (with the same number of images over all of them),
and for a run that was stopped and resumed.

position   number of an image in the endless stream of all processes, from 0
"""

import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from torch.utils.data import Dataset

from .loading import load_training_sets
from .raw_data import garbage_collection_paused
from .workers import SteadyLoader

_SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler")
_MAX_SKIPPED_IN_A_ROW = 20
# The key of an element of a batch that lists what was skipped before it.
_SKIPPED = "skipped_images"


class TrainingLoader:
    """An endless iterable of this process's share of each batch, as lists of mapped records."""

    @garbage_collection_paused()
    def __init__(self, cfg: CfgNode, mapper: Callable[[dict], dict]):
        """
        Args:
            cfg: the data sets, the sampler, and the size of the batch over all processes.
            mapper: from a record to what the model takes.

        Raises:
            ValueError: for a batch that the processes cannot share equally, for a wrong value in
                DATALOADER, and for what :func:`load_training_sets` refuses.
        """
        _check(cfg)
        self.cfg = cfg
        self.seed, self.first_batch = max(cfg.SEED, 0), 0
        records = load_training_sets(cfg)
        self.sampler = cfg.DATALOADER.SAMPLER_TRAIN
        if self.sampler == "RandomSubsetTrainingSampler":
            ratio, number = cfg.DATALOADER.RANDOM_SUBSET_RATIO, len(records)
            if not 1 <= ratio * number <= number:
                raise ValueError(
                    f"DATALOADER.RANDOM_SUBSET_RATIO must leave at least one of the {number} "
                    f"images, and be at most 1, got {ratio}"
                )
        grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING
        self.wide = [grouped and r.get("width", 0) > r.get("height", 0) for r in records]
        self.dataset = _SeededImages(
            DatasetFromList(records), mapper, cfg.DATALOADER.ON_BAD_IMAGE == "skip"
        )
        self.num_skipped = 0

    def start(self, seed: int, first_batch: int) -> None:
        """Begin the next iteration after ``first_batch`` batches, whose images are not loaded.

        ``seed`` must be the same in all processes.
        """
        self.seed, self.first_batch = seed, first_batch

    def __iter__(self) -> Iterator[list[dict]]:
        loader = SteadyLoader(
            self.dataset,
            batch_sampler=self._share_of_batches(),
            num_workers=self.cfg.DATALOADER.NUM_WORKERS,
            collate_fn=trivial_batch_collator,
            # Without its own the loader draws from the generator that the model draws from.
            generator=torch.Generator(),
        )
        for batch in loader:
            self._count_skipped(batch)
            yield batch

    def first_elements(self, number: int) -> list[dict]:
        """What the first images of all processes become, in the order of the batches.

        They are those of :meth:`start`. A bad image is a ValueError, unless it is skipped.
        """
        keys = itertools.islice(itertools.chain.from_iterable(self._batches()), number)
        return [self.dataset[key] for key in keys]

    @property
    def images_per_epoch(self) -> float:
        """Number of images in an epoch. Those that a sampler repeats count as often, on average."""
        if self.sampler == "RandomSubsetTrainingSampler":
            return int(len(self.dataset) * self.cfg.DATALOADER.RANDOM_SUBSET_RATIO)
        factors = self._repeat_factors()
        return len(self.dataset) if factors is None else factors.sum().item()

    def _repeat_factors(self) -> torch.Tensor | None:
        if self.sampler != "RepeatFactorTrainingSampler":
            return None
        keys = self.cfg.DATALOADER
        return RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            self.dataset.records, keys.REPEAT_THRESHOLD, sqrt=keys.REPEAT_SQRT
        )

    def indices(self) -> Iterator[int]:
        """The records in an endless order, over all processes: shuffled epochs in turn.

        DATALOADER.SAMPLER_TRAIN decides what an epoch is. With the same seed this is the order of
        Detectron2's sampler of that name before it is shared out among the processes.
        """
        generator = torch.Generator().manual_seed(self.seed)
        records = torch.arange(len(self.dataset))
        if self.sampler == "RandomSubsetTrainingSampler":
            with _seeded(self.seed):
                shuffle_seed, subset_seed = np.random.randint(2**31, size=2).tolist()
            shuffled = torch.randperm(len(records), generator=generator.manual_seed(subset_seed))
            records = shuffled[: int(len(records) * self.cfg.DATALOADER.RANDOM_SUBSET_RATIO)]
            generator.manual_seed(shuffle_seed)
        factors = self._repeat_factors()
        while True:
            epoch = records
            if factors is not None:  # the fraction is the probability of one more time
                more = torch.rand(len(factors), generator=generator) < factors.frac()
                epoch = records.repeat_interleave(factors.long() + more)
            yield from epoch[torch.randperm(len(epoch), generator=generator)].tolist()

    def _share_of_batches(self) -> Iterator[list[tuple[int, int, int]]]:
        rank, world = comm.get_rank(), comm.get_world_size()
        return (batch[rank::world] for batch in self._batches())

    def _batches(self) -> Iterator[list[tuple[int, int, int]]]:
        """The batches of all processes, of one orientation each, as (seed, position, index)."""
        number = 0
        batches: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}
        for position, index in enumerate(self.indices()):
            batch = batches[self.wide[index]]
            batch.append((self.seed, position, index))
            if len(batch) == self.cfg.SOLVER.IMS_PER_BATCH:
                if number >= self.first_batch:
                    yield list(batch)
                number += 1
                batch.clear()

    def _count_skipped(self, batch: list[dict]) -> None:
        # In the process that trains: what workers log reaches no file.
        for reason in (r for element in batch for r in element.pop(_SKIPPED, ())):
            self.num_skipped += 1
            logging.getLogger(__name__).warning(
                f"Skipped image {self.num_skipped} of this process, and took another one: {reason}"
            )
        if self.num_skipped and has_event_storage():
            get_event_storage().put_scalar("skipped_images", self.num_skipped)


def _check(cfg: CfgNode) -> None:
    """Raise a ValueError for settings that are wrong without regard to the data sets."""
    sampler, on_bad_image = cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.ON_BAD_IMAGE
    if sampler not in _SAMPLERS:
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN must be one of {list(_SAMPLERS)}, got {sampler!r}. For "
            "another one override Trainer.build_train_loader; such a run does not resume exactly"
        )
    if on_bad_image not in ("raise", "skip"):
        raise ValueError(
            f"DATALOADER.ON_BAD_IMAGE must be one of ['raise', 'skip'], got {on_bad_image!r}"
        )
    batch, world = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if batch < 1 or batch % world:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH, {batch} images over all processes, must be a multiple of the "
            f"{world} processes"
        )


class _SeededImages(Dataset):
    """Mapped records by (seed, position, index), each augmented by its seed and position."""

    def __init__(self, records: Sequence[dict], mapper: Callable, skip: bool):
        self.records, self.mapper, self.skip = records, mapper, skip

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        seed, position, index = key
        skipped = []
        with _seeded(seed, position):
            for _ in range(_MAX_SKIPPED_IN_A_ROW):
                try:
                    element = self.mapper(self.records[index])
                    # A mapper says by None that it cannot use an image.
                    reason = f"the mapper refused {self.records[index]['file_name']}"
                except ValueError as error:
                    if not self.skip:
                        raise
                    element, reason = None, str(error)
                if element is not None:
                    return {**element, _SKIPPED: skipped} if skipped else element
                skipped.append(reason)
                index = int(np.random.randint(len(self.records)))
        raise ValueError(f"{len(skipped)} images in a row cannot be used, the last one: {reason}")


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Random numbers in the block depend on ``numbers`` alone; those outside of it go on."""
    states = np.random.get_state(), random.getstate(), torch.get_rng_state()
    seed_all(*numbers, cuda=False)
    try:
        yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])
        torch.set_rng_state(states[2])


def seed_all(*numbers: int, cuda: bool = True) -> None:
    """Seed the generators of NumPy, Python and PyTorch by whole numbers >= 0."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    np.random.seed(seed)
    random.seed(seed)
    if cuda:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
