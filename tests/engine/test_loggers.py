"""SOLVER.LOGGERS: with a stand-in for Weights & Biases, and with the packages where they are."""

import json
import math
import os
import signal
import struct
import sys
import time
import types
from pathlib import Path

import pytest
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage

from fcos_d2.engine import Stopped, Trainer, log_results, loggers, resuming, run_logger


class Killed(HookBase):
    """Ends the process as a kill does, after a step that has written."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            for writer in self.trainer._writers:
                if isinstance(writer, loggers.WandbLogger):
                    # The service that belongs to this process lives on; it notices a real kill.
                    writer._run.finish(exit_code=1)
            self.trainer._writers.clear()
            raise KeyboardInterrupt


class Tell(HookBase):
    """Sends a stop signal to this process in the middle of a step."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            os.kill(os.getpid(), signal.SIGTERM)


class FakeRun:
    def __init__(self, settings):
        self.settings, self.id = settings, settings["id"] or "run_1"
        self.rows, self.artifacts, self.summary, self.exit_code = [], [], {}, None
        self.metrics = {}

    def define_metric(self, name, **settings):
        self.metrics[name] = settings

    def log(self, row):
        self.rows.append(row)

    def log_artifact(self, artifact):
        self.artifacts.append(artifact)

    def finish(self, exit_code):
        self.exit_code = exit_code


class FakeArtifact:
    def __init__(self, name, type):
        self.name, self.type, self.paths = name, type, []

    def add_dir(self, path):
        self.paths.append(path)

    def add_file(self, path, policy):
        self.paths.append(path)


@pytest.fixture
def wandb(monkeypatch):
    """A module in place of wandb, with the list of its runs."""
    module = types.ModuleType("wandb")
    module.runs = []

    def init(**settings):
        module.runs.append(FakeRun(settings))
        return module.runs[-1]

    module.init, module.Artifact, module.Image = init, FakeArtifact, str
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "10")
    return module


@pytest.fixture
def cfg(cfg, monkeypatch):
    """A run of 100 iterations without a model's work, with checkpoints and an evaluation."""

    def run_step(trainer):
        trainer.last_step = trainer.iter
        trainer.storage.put_scalar("total_loss", float(trainer.iter))

    monkeypatch.setattr(Trainer, "run_step", run_step)
    monkeypatch.setattr(
        Trainer, "test", classmethod(lambda cls, *args: {"bbox": {"AP": 10.0, "AP-a+b": math.nan}})
    )
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = 100, 30, 30
    cfg.SOLVER.LOGGERS = ("wandb",)
    return cfg


def run(cfg, resume=False, killed_before=None, hooks=()):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.register_hooks([*hooks, *([] if killed_before is None else [Killed(killed_before)])])
    if killed_before is None:
        trainer.train()
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    return trainer


def steps(rows, key):
    return [row["iteration"] for row in rows if key in row]


def test_an_unknown_name_is_an_error_that_lists_the_known_ones(cfg):
    cfg.SOLVER.LOGGERS = ("tensorbord",)
    with pytest.raises(ValueError, match=r"SOLVER.LOGGERS has 'tensorbord'.*'mlflow', 'wandb'"):
        Trainer(cfg)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_not_installed_is_an_error_at_the_start(cfg, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    cfg.SOLVER.LOGGERS = (name,)
    with pytest.raises(ImportError, match=rf"pip install {name}, or pip install -e '\.\[{name}\]'"):
        Trainer(cfg)


def test_metrics_and_config_arrive(cfg, wandb):
    run(cfg)
    (found,) = wandb.runs
    assert found.settings["config"]["SOLVER"]["MAX_ITER"] == 100
    assert found.settings["project"] == "fcos_d2"
    assert found.settings["name"] == Path(cfg.OUTPUT_DIR).name
    assert found.metrics["*"] == {"step_metric": "iteration"}
    assert steps(found.rows, "total_loss") == [19, 39, 59, 79, 99]
    # As in metrics.json: that at the end is one too high.
    assert steps(found.rows, "bbox/AP") == [29, 59, 89, 100]
    written = map(json.loads, Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines())
    written = [row for row in written if "total_loss" in row]
    assert [r["total_loss"] for r in found.rows if "total_loss" in r] == [
        r["total_loss"] for r in written
    ]
    assert found.exit_code == 0


def test_a_resumed_run_goes_on_in_the_same_run_and_says_nothing_twice(cfg, wandb):
    run(cfg, killed_before=85)  # the last checkpoint is of iteration 59
    assert steps(wandb.runs[0].rows, "total_loss") == [19, 39, 59, 79]
    assert steps(wandb.runs[0].rows, "bbox/AP") == [29, 59]
    cfg.SOLVER.BASE_LR = 0.5
    assert run(cfg, resume=True).start_iter == 60
    resumed = wandb.runs[1]
    assert (resumed.id, resumed.settings["resume"]) == (wandb.runs[0].id, "allow")
    assert resumed.settings["config"]["SOLVER"]["BASE_LR"] == 0.5
    assert steps(resumed.rows, "total_loss") == [99]
    assert steps(resumed.rows, "bbox/AP") == [89, 100]


def test_an_evaluation_that_a_stopped_run_owes_arrives(cfg, wandb, monkeypatch):
    def stopped(cls, *args):
        raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as context:
        context.setattr(Trainer, "test", classmethod(stopped))
        with pytest.raises(Stopped):
            run(cfg)  # in the first evaluation
    assert steps(wandb.runs[0].rows, "bbox/AP") == []
    assert wandb.runs[0].exit_code == 1
    assert run(cfg, resume=True).start_iter == 30
    assert steps(wandb.runs[1].rows, "bbox/AP") == [29, 59, 89, 100]


def test_a_checkpoint_does_not_wait_for_the_service(cfg, wandb, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        FakeRun, "finish", lambda *args, **_: seen.extend(x.name for x in tmp_path.glob("*40.pth"))
    )
    with pytest.raises(Stopped):
        run(cfg, hooks=[Tell(40)])
    assert seen == ["model_0000040.pth"]


def test_another_run_in_the_folder_is_another_run(cfg, wandb):
    cfg.SOLVER.MAX_ITER = 20
    run(cfg)
    wandb_run = Path(cfg.OUTPUT_DIR, "wandb_run.json")
    assert json.loads(wandb_run.read_text())["run"] == "run_1"
    run(cfg)  # not resumed
    assert wandb.runs[1].settings["id"] is None
    wandb_run.write_text("{cut sh")
    run(cfg, resume=True)
    assert wandb.runs[2].settings["id"] is None
    wandb_run.write_text("{}")
    run(cfg, resume=True)  # whatever it holds, the training goes on
    resuming.delete_earlier_run(cfg.OUTPUT_DIR)
    assert not wandb_run.exists()


def test_an_early_end_is_an_end(cfg, wandb):
    cfg.TEST.PATIENCE = 1
    assert run(cfg).last_step == 59
    assert wandb.runs[0].exit_code == 0


@pytest.mark.parametrize("where", ["init", "log", "finish", "log_artifact"])
def test_a_failure_is_one_warning(cfg, wandb, monkeypatch, caplog, where):
    calls = []

    def fail(*args, **settings):
        calls.append(args)
        raise ConnectionError("no network")

    if where == "init":
        wandb.init = fail
    else:
        monkeypatch.setattr(FakeRun, where, fail)
    trainer = run(cfg)
    log_results(cfg, [])
    assert trainer.last_step == 99
    assert len(json.loads(Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()[0])) > 3
    # log_results is a connection of its own.
    of_training = 0 if where == "log_artifact" else 1
    of_results = 0 if where == "log" else 1
    assert len(calls) == of_training + of_results
    text = "SOLVER.LOGGERS 'wandb' fails (ConnectionError: no network). The run goes on without it"
    assert caplog.text.count(text) == 1


def test_after_a_pause_it_is_tried_again(cfg, wandb, monkeypatch, caplog):
    now, fails = [0.0], [True]
    monkeypatch.setattr(run_logger.time, "monotonic", lambda: now[0])

    def log(self, row):
        if fails[0]:
            raise ConnectionError
        self.rows.append(row)

    monkeypatch.setattr(FakeRun, "log", log)
    (logger,) = loggers.build_loggers(cfg, resume=False)
    with EventStorage() as storage:
        for storage.iter, later, failing in (
            (0, 0, True), (1, 60, False), (2, 1800, True), (3, 3600, False),
        ):  # fmt: skip
            now[0], fails[0] = later, failing
            storage.put_scalar("x", 1.0, smoothing_hint=False)
            logger.write()
    assert steps(wandb.runs[0].rows, "x") == [3]
    assert caplog.text.count("fails (ConnectionError") == 1


@pytest.mark.parametrize("is_small", [True, False])
def test_report_and_best_checkpoint_arrive(cfg, wandb, tmp_path, monkeypatch, caplog, is_small):
    caplog.set_level("INFO")
    cfg.SOLVER.MAX_ITER = 2
    run(cfg)
    page = tmp_path / "report" / "index.html"
    page.parent.mkdir()
    (page.parent / "training.png").touch()
    if not is_small:
        monkeypatch.setattr(run_logger, "_LARGEST_ARTIFACT", 1000)
    log_results(cfg, [page])
    first, second = wandb.runs
    assert second.artifacts[0].name == "report-run_1"
    assert second.id == first.id
    best = str(tmp_path / "model_best.pth")
    assert second.summary == {"best_checkpoint": best}
    sent = {artifact.type: artifact.paths for artifact in second.artifacts}
    assert sent == {"report": [str(page.parent)]} | ({"model": [best]} if is_small else {})
    assert second.rows == [{"report/training": str(page.parent / "training.png")}]
    assert second.exit_code == 0
    assert ("the path of model_best.pth, but not the file" in caplog.text) != is_small


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bbox/AP-hot dog", "bbox/AP-hot dog"),
        ("bbox/AP-猫", "bbox/AP-猫"),
        ("bbox/AP-C++", "bbox/AP-C_2b__2b_"),
        ("bbox/AP-" + "x" * 300, "bbox/AP-" + "x" * 242),
    ],
)
def test_names_for_mlflow(name, expected):
    assert loggers._mlflow_name(name) == expected


def records_of_wandb(file):
    """The records of an offline run: a log in LevelDB's format, with a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, begin, parts = file.read_bytes(), 7, b""
    while begin + 7 <= len(data):
        left = 32768 - begin % 32768
        if left < 7:  # the end of a block is empty
            begin += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, begin)
        parts += data[begin + 7 : begin + 7 + length]
        begin += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def finished_records(file):
    """The service may still be writing when a run that is opened anew has ended."""
    for _ in range(100):
        records = list(records_of_wandb(file))
        if records and records[-1].HasField("exit"):
            break
        time.sleep(0.1)
    return records


def test_wandb_offline(cfg, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    run(cfg, killed_before=85)
    run(cfg, resume=True)
    page = tmp_path / "report" / "index.html"
    page.parent.mkdir()
    page.touch()
    log_results(cfg, [page])
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime)
    assert len(files) == 3
    assert len({file.stem for file in files}) == 1  # run-ID
    rows, config, artifacts, summary = [], {}, [], {}
    for record in (record for file in files for record in finished_records(file)):
        if record.HasField("history"):
            rows.append({
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            })  # fmt: skip
        if record.HasField("run"):
            config |= {x.key: json.loads(x.value_json) for x in record.run.config.update}
        if record.HasField("artifact"):
            artifacts.append(record.artifact.type)
        if record.HasField("summary"):
            summary |= {x.key: json.loads(x.value_json) for x in record.summary.update}
    assert steps(rows, "total_loss") == [19, 39, 59, 79, 99]
    assert steps(rows, "bbox/AP") == [29, 59, 89, 100]
    assert config["SOLVER"]["MAX_ITER"] == 100
    assert sorted(artifacts) == ["model", "report"]
    assert summary["best_checkpoint"] == str(tmp_path / "model_best.pth")


def test_mlflow_in_a_file(cfg, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="needs mlflow: pip install mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of a test")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.chdir(tmp_path)
    cfg.SOLVER.LOGGERS = ("mlflow",)
    run(cfg, killed_before=85)
    run_id = json.loads((tmp_path / "mlflow_run.json").read_text())["run"]
    client = MlflowClient()
    assert client.get_run(run_id).info.status == "RUNNING"
    cfg.SOLVER.BASE_LR = 0.5
    run(cfg, resume=True)
    page = tmp_path / "report" / "index.html"
    page.parent.mkdir()
    page.touch()
    log_results(cfg, [page])
    (experiment,) = (e for e in client.search_experiments() if e.name == "of a test")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.status) == (run_id, "FINISHED")
    assert found.data.params["SOLVER.MAX_ITER"] == "100"

    def steps_of(key):
        return [metric.step for metric in client.get_metric_history(run_id, key)]

    assert steps_of("total_loss") == [19, 39, 59, 79, 99]
    assert steps_of("bbox/AP") == steps_of("bbox/AP-a_2b_b") == [29, 59, 89, 100]
    assert client.get_metric_history(run_id, "total_loss")[-1].value == 89.5  # of 80 to 99
    names = {file.path for file in client.list_artifacts(run_id)}
    assert names == {"config.yaml", "model_best.pth", "report"}
    config = client.download_artifacts(run_id, "config.yaml", str(tmp_path))
    assert "BASE_LR: 0.5" in Path(config).read_text()
    assert found.data.tags["best_checkpoint"] == str(tmp_path / "model_best.pth")
