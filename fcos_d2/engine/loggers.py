"""SOLVER.LOGGERS: the metrics and results of a run for services that compare runs."""

import importlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from detectron2.config import CfgNode
from detectron2.evaluation.testing import flatten_results_dict

from .early_stopping import EndedEarly
from .run_logger import RunLogger
from .stopping import Stopped


class WandbLogger(RunLogger):
    """Weights & Biases. Its environment variables, such as WANDB_PROJECT and WANDB_MODE, count."""

    name = "wandb"

    def _open(self, run_id: str | None) -> str:
        import wandb

        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "600")  # seconds; it would wait for ever
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fcos_d2"),
            name=None if run_id else os.environ.get("WANDB_NAME", self._folder.absolute().name),
            dir=os.environ.get("WANDB_DIR", str(self._folder)),
            config=yaml.safe_load(self._cfg.dump()),
            allow_val_change=True,  # of a resumed run
            id=run_id,
            resume=None if run_id is None else "allow",
            reinit="create_new",  # leaves a run of the calling program alone
        )
        # Its own steps count calls, and cannot go back to the iteration of a checkpoint.
        self._run.define_metric("iteration", hidden=True)
        self._run.define_metric("*", step_metric="iteration")
        return self._run.id

    def _send(self, metrics: dict[str, float], iteration: int) -> None:
        self._run.log({**metrics, "iteration": iteration})

    def _send_report(self, folder: Path, place: str) -> None:
        import wandb

        charts = {f"{place}/{x.stem}": wandb.Image(str(x)) for x in sorted(folder.glob("*.png"))}
        self._run.log(charts)
        name = re.sub(r"[^\w.-]", "-", f"{place}-{self._run.id}", flags=re.ASCII)
        report = wandb.Artifact(name, type="report")
        report.add_dir(str(folder))
        self._run.log_artifact(report)

    def _send_checkpoint(self, file: Path, is_small: bool) -> None:
        import wandb

        self._run.summary["best_checkpoint"] = str(file)
        if is_small:
            model = wandb.Artifact(f"model-{self._run.id}", type="model")
            model.add_file(str(file), policy="immutable")  # without another copy of it
            self._run.log_artifact(model)

    def _close(self, error: BaseException | None) -> None:
        self._run.finish(exit_code=0 if error is None or isinstance(error, EndedEarly) else 1)


class MLflowLogger(RunLogger):
    """MLflow. Its environment variables, such as MLFLOW_TRACKING_URI, count."""

    name = "mlflow"

    def _open(self, run_id: str | None) -> str:
        # Of its client alone, which leaves a run of the calling program alone. An unreachable
        # server would be tried for minutes, while the training waits.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient()
        if run_id is None:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fcos_d2")
            found = client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else client.create_experiment(experiment)
            name = os.environ.get("MLFLOW_RUN_NAME", self._folder.absolute().name)
            run_id = client.create_run(number, run_name=name).info.run_id
            # A run keeps the values that it starts with; the file has those of today.
            values = flatten_results_dict(yaml.safe_load(self._cfg.dump()))
            params = [
                Param(_mlflow_name(key.replace("/", ".")), str(value)[:6000])
                for key, value in values.items()
            ]
            for begin in range(0, len(params), 100):
                client.log_batch(run_id, params=params[begin : begin + 100])
        else:
            client.update_run(run_id, status="RUNNING")
        if (self._folder / "config.yaml").is_file():
            client.log_artifact(run_id, str(self._folder / "config.yaml"))
        self._run = client
        return run_id

    def _send(self, metrics: dict[str, float], iteration: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._run.log_batch(
            self._record["run"],
            metrics=[Metric(_mlflow_name(k), x, now, iteration) for k, x in metrics.items()],
        )

    def _send_report(self, folder: Path, place: str) -> None:
        self._run.log_artifacts(self._record["run"], str(folder), place)

    def _send_checkpoint(self, file: Path, is_small: bool) -> None:
        self._run.set_tag(self._record["run"], "best_checkpoint", str(file))
        if is_small:
            self._run.log_artifact(self._record["run"], str(file))

    def _close(self, error: BaseException | None) -> None:
        is_well = error is None or isinstance(error, EndedEarly)
        status = "KILLED" if isinstance(error, Stopped) else "FAILED"
        self._run.set_terminated(self._record["run"], "FINISHED" if is_well else status)


def _mlflow_name(name: str) -> str:
    """A name that MLflow takes: names of classes may have any characters."""
    return re.sub(r"[^\w.\- /]", lambda match: f"_{ord(match[0]):x}_", name)[:250]


_LOGGERS = {logger.name: logger for logger in (WandbLogger, MLflowLogger)}


def check_loggers(cfg: CfgNode) -> None:
    """Raise an error for names in SOLVER.LOGGERS that are unknown, or whose package is not there.

    Raises:
        ValueError, ImportError
    """
    for name in cfg.SOLVER.LOGGERS:
        if name not in _LOGGERS:
            raise ValueError(f"SOLVER.LOGGERS has {name!r}; known are {sorted(_LOGGERS)}")
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"SOLVER.LOGGERS {name!r} needs its package ({error}): pip install {name}, or pip "
                f"install -e '.[{name}]' in a clone of fcos_d2"
            ) from error


def build_loggers(cfg: CfgNode, resume: bool) -> list[RunLogger]:
    """Those of SOLVER.LOGGERS; see :class:`RunLogger`, and for errors :func:`check_loggers`."""
    check_loggers(cfg)
    return [_LOGGERS[name](cfg, resume) for name in cfg.SOLVER.LOGGERS]


def log_results(cfg: CfgNode, reports: Sequence[Path] = ()) -> None:
    """Send what a run has led to to its SOLVER.LOGGERS: reports and the best checkpoint.

    Call it after the training, in one process.

    Args:
        reports: the pages, of :func:`fcos_d2.report.write_report`.
    """
    for logger in build_loggers(cfg, resume=True):
        logger.send_results(reports)
        logger.close()
