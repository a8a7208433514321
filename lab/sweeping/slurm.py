"""Running the jobs of a sweep on a SLURM cluster."""

import json
import os
import subprocess
from pathlib import Path

from lab.sweeping import attempts, locks, manifests, plan, resources
from lab.system import files
from lab.system.command import whole_step
from lab.system.errors import UserError

SLURM_MINUTES = 60  # of a job without `time`
LARGEST_ARRAY = 1000  # jobs; SLURM's own default for the largest index is 1000


def run(folder: Path, manifest: dict, jobs: list[dict], options: dict) -> None:
    """Submits jobs as arrays, and returns. Raises `UserError` if SLURM refuses them."""
    import submitit

    given = options["slurm"]
    parameters = {plan.SLURM[name][2]: value for name, value in given.items()}
    cpus = given.get("cpus", 1)
    # Since SLURM 22.05 srun does not take this over from the batch job.
    parameters |= {"slurm_srun_args": [f"--cpus-per-task={cpus}"], "cpus_per_task": cpus}
    parameters.setdefault("timeout_min", SLURM_MINUTES)
    with locks.locked(folder), attempts.findable():
        executor = submitit.AutoExecutor(
            manifests.submitit_folder(folder),
            cluster="slurm",
            slurm_max_num_timeout=attempts.MANY_TIMEOUTS,
        )
        executor.update_parameters(name=manifest["name"], **parameters)
        for start in range(0, len(jobs), LARGEST_ARRAY):
            part = jobs[start : start + LARGEST_ARRAY]
            for job in part:
                attempts.mark_submitted(folder / job["folder"])
            try:
                with whole_step(), executor.batch():
                    submitted = [
                        executor.submit(
                            attempts.Attempt(folder, job, resources.thread_variables(cpus))
                        )
                        for job in part
                    ]
            except submitit.core.utils.FailedJobError as failure:
                error = UserError(*str(failure).splitlines())
                manifests.add_advice(error, folder)
                raise error from None
            ids = submitted_ids(folder)
            ids |= {str(job["job"]): one.job_id for job, one in zip(part, submitted)}
            files.write_text(folder / "slurm.json", json.dumps(ids) + "\n")


def submitted_ids(folder: Path) -> dict[str, str]:
    """SLURM's name of the newest submission of each job, {} where there is none."""
    try:
        return json.loads((folder / "slurm.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def squeue() -> dict[str, str]:
    """{SLURM's name of a job: state} of the user's jobs that wait or run. Raises `UserError`."""
    command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise UserError(f"squeue: no list of running jobs, {error}") from None
    if done.returncode:
        raise UserError(f"squeue: no list of running jobs, {done.stderr.strip()}")
    return dict(line.split() for line in done.stdout.splitlines())
