"""What the environment says about processes; tests/test_train_net.py starts them."""

import pytest

from fcos_d2.engine import processes

SLURM = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "30007",
         "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
         "SLURM_STEP_NODELIST": "gpu[07-08]"}  # fmt: skip


@pytest.fixture
def place(monkeypatch):
    """What is found in an environment."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *SLURM):
        monkeypatch.delenv(name, raising=False)

    def find(num_gpus=1, **env):
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            return processes._place_in_environment(num_gpus)

    return find


def test_alone(place):
    assert place() is None
    assert place(RANK="0", WORLD_SIZE="1") is None
    assert place(SLURM_PROCID="0", SLURM_NTASKS="1") is None
    assert place(SLURM_NTASKS="8") is None  # an interactive allocation


def test_torchrun(place):
    found = place(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", **SLURM)
    assert (found.rank, found.world_size, found.url) == (5, 8, "env://")
    assert (found.local_rank, found.local_world_size) == (1, 4)


def test_slurm(place):
    found = place(num_gpus=8, **SLURM)
    assert (found.rank, found.world_size) == (9, 16)
    assert (found.local_rank, found.local_world_size) == (1, 8)
    assert found.url == "tcp://gpu07:30007"  # 20000 + 30007 modulo 20000
    assert place(**SLURM, MASTER_ADDR="10.0.0.1", MASTER_PORT="5").url == "tcp://10.0.0.1:5"
    assert place(**SLURM | {"SLURM_STEP_NODELIST": "a-b3,c[1-2]"}).url.startswith("tcp://a-b3:")


def test_the_script_of_a_slurm_job_starts_its_own_processes(place):
    """It has the variables of a task, but those of the step."""
    script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert place(num_gpus=8, **script) is None
    assert place(num_gpus=1, **script).world_size == 8


def test_unequal_machines_are_refused(place):
    with pytest.raises(ValueError, match=r"different numbers of tasks .*4\(x2\),3"):
        place(**SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3"})
