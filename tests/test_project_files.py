"""CI, pre-commit, the Dockerfile and the Makefile say the same things: each names commands and files that exist."""

import re
import shlex
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined)]


def run_steps(text: str) -> list[list[str]]:
    """Every command of the RUN instructions, split into words."""
    runs = [rest for name, rest in instructions(text) if name == "RUN"]
    return [shlex.split(command) for run in runs for command in run.split("&&")]


def faults(dockerfile: str) -> list[str]:
    """Steps that name a make target, a file or an extra of setup.py that is not there."""
    found = []
    for program, *arguments in run_steps(dockerfile):
        if program == "make":
            found += [f"make {target}" for target in arguments if target not in make_targets()]
        if "--constraint" in arguments:
            file = arguments[arguments.index("--constraint") + 1]
            found += [file] if not (ROOT / file).is_file() else []
        extras = [argument for argument in arguments if argument.startswith(".[")]
        found += [extra for extra in extras if f'"{extra[2:-1]}": [' not in read("setup.py")]
    copied = [rest.split()[0] for name, rest in instructions(dockerfile) if name == "COPY"]
    return found + [name for name in copied if not (ROOT / name).exists()]


def test_the_image_takes_the_steps_of_the_readme():
    text = read("Dockerfile")
    assert not faults(text)
    steps, readme = [" ".join(step) for step in run_steps(text)], read("README.md")
    assert "make venv" in steps and "make venv" in readme
    assert "pip install wheel" in steps and "pip install wheel" in readme
    assert "pip install --no-build-isolation .[gpu]" in steps and "pip install --no-build-isolation '.[gpu]'" in readme
    # torch comes before `make venv`, which keeps it: a build sees no GPU, and would choose the CPU's
    assert steps.index("make venv") > next(i for i, step in enumerate(steps) if step.endswith("constraints.txt torch"))


def test_a_step_that_names_what_is_not_there_is_found():
    text = "FROM x\nCOPY nothing.txt ./\nRUN make environment \\\n  && pip install --constraint pins.txt '.[tpu]'\n"
    assert faults(text) == ["make environment", "pins.txt", ".[tpu]", "nothing.txt"]


def test_the_image_leaves_out_what_a_checkout_gathers():
    ignored = {line.strip("/") for line in read(".gitignore").splitlines()}
    left_out = {line.removeprefix("**/") for line in read(".dockerignore").splitlines()}
    assert {name for name in ignored if not name.startswith("*.pyc")} <= left_out


def test_hosted_ci_runs_the_script_that_anybody_runs():
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    (job,) = workflow["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    *before, script = commands
    assert script == ".ci/run" and (ROOT / ".ci/run").stat().st_mode & 0o111
    packages = re.search(r"--no-install-recommends (.*?) >", read(".ci/run"))[1]
    assert len(before) == 1 and before[0].endswith(f" {packages}")  # what the script would install as root
    (python,) = [step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {})]
    assert f"CI runs {python}" in read("README.md")
    assert {"push", "pull_request"} <= set(workflow[True])  # YAML 1.1 reads the key `on` as true


def test_pre_commit_and_ci_lint_as_make_does():
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    (hook,) = repository["hooks"]
    assert repository["repo"] == "local" and hook["language"] == "system" and hook["pass_filenames"] is False
    assert hook["entry"].split() == ["make", "--no-print-directory", "lint"]
    assert re.search(r'^make .*VENV="\$work/venv" lint ', read(".ci/run"), re.M)
    wanted = re.compile(hook["files"])
    assert all(wanted.search(name) for name in ("tests/test_config.py", "pyproject.toml", "constraints.txt"))
