"""Running what is missing or has failed in a sweep, through submitit, here or on a cluster."""

import shlex
from pathlib import Path

from lab.sweeping import attempts, local, manifests, slurm, states
from lab.system.command import print_lines


def run(folder: Path, cluster: str, options: dict) -> int:
    """Runs what is missing or failed in a sweep folder; returns the exit code.

    options: at_once (jobs at once on this machine, None = by cores and memory), slurm (parameters).
    """
    manifest = manifests.read_manifest(folder)
    before = states.states(folder, manifest)
    todo = [job for job, state in zip(manifest["jobs"], before) if state.state in states.STATES[3:]]
    busy = sum(state.state in states.STATES[:2] for state in before)
    if busy:
        print_lines(f"{busy} job(s) are waiting or running already: left alone")
    if not todo:
        print_lines(f"{folder}: nothing to do", stream="stdout")
    elif cluster == "debug":
        for job in todo:
            print_lines(shlex.join(attempts.Attempt(folder, job).command()), stream="stdout")
        return 0
    else:
        {"local": local.run, "slurm": slurm.run}[cluster](folder, manifest, todo, options)
        if cluster == "slurm":
            print_lines(
                f"{len(todo)} job(s) submitted; python sweep.py --status {shlex.quote(str(folder))}"
            )
    after = states.states(folder, manifest)
    print_lines(states.counts(after), f"Results: {folder}", stream="stdout")
    return states.exit_code(after)
