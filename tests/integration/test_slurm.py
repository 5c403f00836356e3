"""Jobs on a real Slurm, submitted with scripts/submit.py, with the real trainer on a tiny model.

Slurm's times are changed in two places: a requeued job, which would wait two minutes, is released at once, and a job
that was warned may get more time for its next attempt.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from slurm_cluster import Cluster, cluster, wait_until, why_not

ROOT = Path(__file__).parents[2]
SECRET = "hf_this-must-not-be-seen"
HOPELESSLY_MANY = 1_000_000
WITHOUT_COMPILING = """
# DeepSpeed compiles collectives in shared memory at their first use, which takes a minute; gloo has its own.
import importlib.abc, importlib.machinery, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "deepspeed.comm.torch":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            module.build_shm_op = lambda: None
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as running:
        yield running


@pytest.fixture
def submit(
    slurm: Cluster,
    submit_script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Return a function that runs scripts/submit.py for one CPU process per node: the job's id."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(WITHOUT_COMPILING)
    settings = {
        "SLURM_CONF": slurm.environment["SLURM_CONF"],
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{tmp_path / 'python'}:{ROOT}",
        "HF_TOKEN": SECRET,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)

    def run(nodes: int, recipe: Path, *arguments: str) -> str:
        config = ROOT / "accelerate_configs" / ("cpu.yaml" if nodes == 1 else "zero3_multinode.yaml")
        (tmp_path / "launch.yaml").write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"use_cpu": True}))
        where = ["--nodes", str(nodes), "--gpus-per-node", "0", "--config", str(tmp_path / "launch.yaml")]
        code = submit_script.main(["--recipe", str(recipe), *where, *arguments])
        shown = capsys.readouterr()
        assert code == 0, shown.err
        match = re.match(r"job (\d+): ", shown.out)
        assert match, shown.out
        return match[1]

    return run


def steps_saved(run: Path) -> list[int]:
    """Return the steps of the complete checkpoints."""
    return sorted(json.loads(path.read_text())["step"] for path in run.glob("checkpoint-*/COMPLETE.json"))


def steps_logged(run: Path) -> list[int]:
    """Return the optimizer steps in metrics.jsonl, in order."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [json.loads(line)["step"] for line in lines if '"loss"' in line]


def resumes_from(recipe: Path, *overrides: str) -> int:
    """Return the step of the verified checkpoint that the next run resumes from; 0 if there is none."""
    from train.loop.checkpoint.resume import find_checkpoint
    from train.recipe import load_recipe

    checkpoint = find_checkpoint("auto", load_recipe(recipe, overrides))
    return checkpoint.step if checkpoint else 0


@needs_deepspeed
def test_two_nodes_are_warned_save_requeue_resume_and_finish(
    slurm: Cluster, submit: Callable[..., str], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    """The complete chain under ZeRO-3. The trainers pause until Slurm, which checks twice a minute, warns them."""
    steps = 60
    recipe = recipe_file(training={"num_train_epochs": ..., "max_steps": steps})
    run = tmp_path / "run"
    job = submit(2, recipe, "--time", "20", "--warn-before", "600")
    log = run / f"slurm-{job}.log"
    wait_until(lambda: len(steps_logged(run)) > 2, "steps")
    trainers = slurm.processes(job, "train/sft.py")
    assert [trainer.environ()["HF_TOKEN"] for trainer in trainers] == [SECRET] * 2
    for trainer in trainers:
        trainer.suspend()
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    wait_until(lambda: "SIGUSR1 before the time limit" in log.read_text(), "a warning")
    for trainer in trainers:
        trainer.resume()
    slurm.wait_for(job, "PENDING BeginTime")
    outcome = json.loads((run / "outcome.json").read_text())
    (stopped,) = steps_saved(run)
    assert outcome["outcome"] == "preempted"
    assert outcome["step"] == stopped == resumes_from(recipe) == steps_logged(run)[-1]
    assert 0 < stopped < steps
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    slurm.release(job)
    slurm.wait_for(job, "COMPLETED")
    assert json.loads((run / "outcome.json").read_text())["outcome"] == "finished"
    assert steps_logged(run) == [*range(1, steps + 1)]  # none is missing, none was made twice
    output = log.read_text()
    assert f"requeued: continues from step {stopped}" in output
    assert f"job {job}, restart 1 of at most 20" in output
    assert output.count("preflight of 127.0.0.[1-2]: commit ") == 2
    assert f"resuming from {run}/checkpoint-{stopped}" in output
    assert SECRET not in output
    assert (run / "model.safetensors").is_file()


@needs_deepspeed
def test_a_failing_node_and_scancel_leave_complete_checkpoints(
    slurm: Cluster, submit: Callable[..., str], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_file(
        training={"num_train_epochs": ..., "max_steps": HOPELESSLY_MANY, "save_strategy": "steps", "save_steps": 5}
    )
    run = tmp_path / "run"
    job = submit(2, recipe, "--time", "10")
    log = run / f"slurm-{job}.log"
    wait_until(lambda: steps_saved(run), "a checkpoint")
    slurm.kill_node(1)
    try:
        slurm.wait_for(job, "PENDING")  # Slurm's own requeue
        wait_until(lambda: "stopped: Slurm ends this job" in log.read_text(), "the end of the attempt")
        for process in slurm.processes(job):
            process.kill()  # of the node that failed: its slurmd is not there to do it
        saved = resumes_from(recipe)
        assert saved == max(steps_saved(run)) > 0
    finally:
        slurm.start_node(1)
    slurm.release(job)
    wait_until(lambda: max(steps_logged(run)) > saved, "steps after those of the checkpoint")
    slurm.run("scancel", job)
    slurm.wait_for(job, "CANCELLED")
    wait_until(lambda: not slurm.processes(job), "all processes gone")
    assert slurm.state(job).startswith("CANCELLED")
    # SIGTERM came first, SIGKILL would have come after KillWait (30 s here): time enough to save this model.
    assert resumes_from(recipe) == steps_logged(run)[-1] > saved
    output = log.read_text()
    assert f"resuming from {run}/checkpoint-{saved}" in output
    assert output.count("stopped: Slurm ends this job") == 2
    assert "requeued: continues" not in output


def test_a_crash_loop_stops_after_its_limit(
    slurm: Cluster, submit: Callable[..., str], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    """The trainer is killed in each attempt, after more steps than the attempt before."""
    recipe = recipe_file(
        training={"num_train_epochs": ..., "max_steps": HOPELESSLY_MANY, "save_strategy": "steps", "save_steps": 5}
    )
    run = tmp_path / "run"
    job = submit(1, recipe, "--time", "10", "--max-restarts", "1")
    for end in ("PENDING", "FAILED"):
        began = max(steps_saved(run), default=0)
        slurm.wait_for(job, "RUNNING")
        wait_until(lambda began=began: max(steps_saved(run), default=0) > began, "a newer checkpoint")
        (trainer,) = slurm.processes(job, "train/sft.py")
        trainer.kill()
        slurm.wait_for(job, end)
        if end == "PENDING":
            slurm.release(job)
    log = (run / f"slurm-{job}.log").read_text()
    assert log.count("training was killed or crashed") == 2
    assert log.count("requeued: continues from step") == 1
    assert log.splitlines()[-1].endswith("stopped: requeued 1 times, and --max-restarts is 1")


def test_no_attempt_follows_one_without_progress_or_a_stop_file(
    slurm: Cluster, submit: Callable[..., str], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    """An array of two: the first task's trainer is killed, and requeued from outside as if Slurm had done it."""
    recipe = recipe_file(training={"num_train_epochs": ..., "max_steps": HOPELESSLY_MANY})
    job = submit(1, recipe, "--time", "10", "--array", "1-2", f"output_dir={tmp_path}/run-%a", "seed=%a")
    runs = [tmp_path / "run-1", tmp_path / "run-2"]
    wait_until(lambda: all(steps_logged(run) for run in runs), "steps of both tasks")
    (trainer,) = slurm.processes(f"{job}_1", "train/sft.py")
    trainer.kill()
    (runs[1] / "stop").touch()
    slurm.wait_for(f"{job}_1", "FAILED")
    slurm.run("scontrol", "requeue", f"{job}_1")
    slurm.release(f"{job}_1")
    slurm.wait_for(f"{job}_1", "FAILED")
    slurm.wait_for(f"{job}_2", "COMPLETED")
    logs = [(run / f"slurm-{job}_{task}.log").read_text() for task, run in enumerate(runs, 1)]
    stopped = [line.partition("] ")[2] for line in logs[0].splitlines() if "] stopped: " in line]
    assert stopped == [
        "stopped: no progress: this attempt started at step 0 too. Fix the error and submit again",
        "stopped: no progress: the previous attempt started at step 0 too. Fix the error and submit again",
    ]
    assert f"job {job}_1, restart 1 of at most 20" in logs[0]
    assert f"not requeued, because of {runs[1]}/stop" in logs[1].splitlines()[-1]
    assert [json.loads((runs[1] / "outcome.json").read_text())["step"]] == steps_saved(runs[1])
    assert all(f"seed: {task}\n" in (run / "recipe.yaml").read_text() for task, run in enumerate(runs, 1))


def test_a_recipe_broken_in_the_queue_ends_the_job_before_training(
    slurm: Cluster, submit: Callable[..., str], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_file()
    job = submit(2, recipe, "--time", "10", "--sbatch=--hold")
    assert slurm.state(job).startswith("PENDING")
    recipe.write_text(recipe.read_text().replace("max_length", "max_lenght"))
    slurm.run("scontrol", "release", job)
    slurm.wait_for(job, "FAILED")
    log = (tmp_path / "run" / f"slurm-{job}.log").read_text()
    assert [line for line in log.splitlines() if line.startswith("error: ")] == [
        next(line for line in log.splitlines() if line.startswith("error: 127.0.0.1 can't load the recipe: "))
    ]
    assert "Did you mean `data.max_length`?" in log
    assert log.splitlines()[-1].endswith("stopped: the preflight failed, see above")
    assert not (tmp_path / "run" / "outcome.json").exists()
