"""Sweeps: many settings and seeds of one experiment, here or on a SLURM cluster.

    python sweep.py sweeps/<name>.yaml [--cluster debug|local|slurm] [key=value ...]
    python sweep.py --status FOLDER        what waits, runs, is done, has failed
    python sweep.py --resume FOLDER        run what is missing or has failed
    python sweep.py --collect FOLDER       tables and plots over the seeds

Exit codes: 0 all jobs are done (or submitted); 1 some have failed; 2 what you can fix; 128 + the
signal's number if stopped by one.
"""

import shutil
import sys
from pathlib import Path

from lab.sweeping import launch, manifests, plan, states
from lab.system.command import Parser, exit_code, folder_name, print_lines
from lab.system.errors import ConfigError

FOLDERS = ("status", "resume", "collect")
CLUSTERS = ("debug", "local", "slurm")


def main(argv: list[str] | None = None) -> int:
    """Run the command from its arguments; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    code = 0

    def command() -> None:
        nonlocal code
        code = _dispatch(_arguments(argv), ["sweep.py", *argv])

    return exit_code(command) or code


def _dispatch(given, command: list[str]) -> int:
    """Does what the arguments ask for; returns the exit code."""
    if given.status:
        folder = _folder(given.status)
        if manifests.read_manifest(folder)["optuna"]:
            from lab.sweeping import journal

            return journal.show_status(folder)
        return states.show_status(folder)
    if given.collect:
        from lab.sweeping import collect

        collect.collect(_folder(given.collect))
        return 0
    if given.resume:
        folder = _folder(given.resume)
        manifest = manifests.read_manifest(folder)
        cluster = _cluster(given.cluster or manifest["cluster"]["kind"])
        slurm = manifest["cluster"]["slurm"] | given.slurm
    else:
        sweep = plan.read(given.file, given.overrides)
        cluster, slurm = _cluster(given.cluster or "local"), sweep.slurm | given.slurm
        if sweep.optuna:
            from lab.sweeping import space

            if cluster != "local":
                raise ConfigError(
                    f"--cluster: given {cluster}, but the section optuna is worked on where it is "
                    "started; allowed: local, and --resume on any number of machines"
                )
            space.check(sweep.optuna, sweep.base, sweep.overrides, sweep.seeds)
        if cluster == "debug":
            _print_commands(sweep)
            return 0
        folder = manifests.create(sweep, command, {"kind": cluster, "slurm": slurm})
        manifest = manifests.read_manifest(folder)
    if manifest["optuna"]:
        from lab.sweeping import search

        return search.run(folder, manifest, given.jobs)
    return launch.run(folder, cluster, {"at_once": given.jobs, "slurm": slurm})


def _cluster(name: str) -> str:
    if name == "slurm" and not shutil.which("sbatch"):
        raise ConfigError("--cluster: given slurm, but no sbatch is on the PATH")
    return name


def _print_commands(sweep: plan.Plan) -> None:
    """The command of every job; nothing is written."""
    folder = Path(sweep.results_dir) / "sweeps" / f"{sweep.name}_<time>"
    manifest = {"base_overrides": sweep.overrides, "plugins": sweep.plugins}
    for job in sweep.jobs():
        arguments = manifests.arguments(sweep.base, manifest, job, folder)
        print_lines(manifests.shown(arguments), stream="stdout")


def _folder(text: str) -> Path:
    """The folder of a sweep. Raises `UserError` if it has no manifest."""
    manifests.read_manifest(text)
    return Path(text)


def _arguments(argv: list[str]):
    """Parsed arguments. Raises `ConfigError` for what does not go together."""
    parser = Parser(prog="python sweep.py", description="Many settings, many seeds.")
    parser.add_argument("file", nargs="?", metavar="FILE", help="the sweep, sweeps/<name>.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings for all jobs, over the base"
    )
    parser.add_argument(
        "--status", type=folder_name, metavar="FOLDER", help="show how far a sweep is"
    )
    parser.add_argument(
        "--resume", type=folder_name, metavar="FOLDER", help="run what is missing or has failed"
    )
    parser.add_argument(
        "--collect", type=folder_name, metavar="FOLDER", help="tables and plots of a sweep"
    )
    parser.add_argument("--cluster", choices=CLUSTERS, help="where jobs run (default: local)")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="local: jobs at once (default: by cores and memory)"
    )
    for name, (kind, allowed, _) in plan.SLURM.items():
        parser.add_argument(f"--{name}", type=kind, metavar="…", help=f"slurm: {allowed}")
    given = parser.parse_intermixed_args(argv)
    problems = []
    if given.file and "=" in given.file:
        raise ConfigError(f"{given.file}: settings are allowed with a sweep file only")
    if sum(bool(getattr(given, name)) for name in ("file", *FOLDERS)) != 1:
        problems.append(
            "command line: allowed: one of a sweep file, --status, --resume and --collect"
        )
    if given.jobs is not None and given.jobs < 1:
        problems.append(f"--jobs: given {given.jobs}; allowed: a whole number from 1")
    if not (given.file or given.resume):
        idle = [n for n in ("cluster", "jobs", *plan.SLURM) if getattr(given, n) is not None]
        problems += [f"--{n}: allowed: with a sweep file or --resume, which run jobs" for n in idle]
    given.slurm = {n: getattr(given, n) for n in plan.SLURM if getattr(given, n) is not None}
    plan.check_slurm(given.slurm, problems)
    if problems:
        raise ConfigError(*problems)
    return given


if __name__ == "__main__":
    sys.exit(main())
