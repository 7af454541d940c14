"""The commands that the examples' pages print run as printed, in a folder that sees the checkout through links.

Last run by hand (`pytest -m manual tests/test_examples.py`): 2026-11-28, 2 passed in 46 s; the
study 2026-11-29, passed in 7 min 40 s on two cores with a load of 8.
"""

import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_taipan.evaluation.__main__ import TASKS
from megatron_taipan.evaluation.report import WITHOUT_RESULTS
from tests.forked_study import load_study
from tests.hf.test_libraries import install

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def commands(page: Path) -> list[str]:
    """The blocks marked `sh`."""
    return re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def run(script: str, place: Path, *more: Path) -> str:
    """What these commands print and log, run in `place`; they find this interpreter and the packages in `more`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "HF_MODULES_CACHE": str(place / "modules")}
    env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(map(str, [ROOT, *more]))}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(["bash", "-ec", script], cwd=place, env=env, text=True, **streams)
    assert not done.returncode, done.stdout[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder with links to what the commands read, since a checkout may be read-only."""
    place = tmp_path_factory.mktemp("examples")
    for name in ("megatron_taipan", "data_prep", "checkpoints", "launch", "examples", "docs", "constraints.txt"):
        (place / name).symlink_to(ROOT / name)
    return place


@pytest.fixture(scope="module")
def trained(checkout) -> str:
    """What the corpus example prints."""
    return run("".join(commands(EXAMPLES / "own_corpus" / "README.md")), checkout)


@pytest.mark.manual
def test_a_corpus_of_ones_own_becomes_an_export_that_writes(trained, checkout):
    losses = [float(found) for found in re.findall(r"validation loss ([\d.]+)", trained)]
    assert losses[-1] < losses[0] - 1
    assert (checkout / "runs/own_corpus/hf/model.safetensors").is_file()
    assert re.search(r"^def forward\(self.+", trained, re.M)


@pytest.mark.manual
def test_an_export_is_fine_tuned_by_transformers_and_exported_again(trained, checkout, tmp_path):
    site = install(tmp_path / "site", ["accelerate"])
    _, tuning, export = commands(EXAMPLES / "finetune" / "README.md")  # the first installs accelerate
    printed = run(tuning + export, checkout, site)
    losses = [float(found) for found in re.findall(r"'loss': '?([\d.]+)", printed)]
    assert losses[-1] < losses[0]
    tuned, before = (checkout / f"runs/own_corpus/{name}/model.safetensors" for name in ("tuned_hf", "hf"))
    assert tuned.read_bytes() != before.read_bytes()


class Page(HTMLParser):
    """The cells and the number of pictures under each heading of a page of results."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.sections: dict[str, tuple[list[str], list[str]]] = {}  # heading: cells, pictures' names
        self.within = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        told = dict(attributes)
        if tag == "img" and (told["src"] or "").startswith("data:image/svg+xml;base64,"):
            self.here[1].append(told["alt"] or "")
        self.within = tag

    def handle_data(self, text: str) -> None:
        if self.within == "h2":
            self.here = self.sections.setdefault(text, ([], []))
        elif self.within in ("td", "code"):
            self.here[0].append(text)

    def handle_endtag(self, tag: str) -> None:
        self.within = ""


def check_study(folder: Path, families: list[str]) -> None:
    """The page has every task that leaves results, with all families and the pictures of those that draw."""
    sections = Page(folder / "results/report.html").sections
    runs = [str(folder / family) for family in families]
    assert set(runs) | (set(TASKS) - set(WITHOUT_RESULTS)) == (set(sections) | {"zero-shot"}) - {"Not run"}
    drawings = {"perplexity": 2, "latency": 3, "retrieval": 7, "curves": 2, "qa": 0, "recall_tokens": 0}
    for task, drawn in drawings.items():
        cells, pictures = sections[task]
        assert set(runs) <= set(cells), task
        assert len(pictures) == len(set(pictures)) >= drawn, task
    assert "bigram seen before" in sections["selection"][0]
    [command] = sections["Not run"][0]
    assert command.startswith("python -m megatron_taipan.evaluation zero-shot")


def test_a_study_of_five_families_ends_in_a_page_of_every_task(checkout, monkeypatch):
    study, printed = load_study(), run("python -m tests.forked_study", checkout)
    monkeypatch.chdir(checkout)
    check_study(study.TINY.folder, list(study.PATTERNS))
    commands = re.findall(r"^\$ (.+)", printed, re.M)
    assert len(commands) == 16

    started = []
    study.study(study.TINY, lambda command, log: started.append(command) or 0, jobs=1)  # all but the page is there
    assert [shlex.join(command) for command in started] == commands[-1:]


def test_a_step_that_fails_ends_the_study_and_is_done_again(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    study = load_study()
    size, started = study.TINY._replace(folder=Path("runs/study_failing")), []

    def run(command: list[str], log: Path) -> int:
        started.append(command)
        return 3 if "tokenize" in command and len(started) == 2 else 0

    with pytest.raises(study.StepFailed, match="tokenize ended with status 3.+tokenize.txt"):
        study.study(size, run, jobs=1)
    assert len(started) == 2
    study.study(size, run, jobs=2)
    assert len(started) == 2 + 15 and started[1] == started[2]


@pytest.mark.manual
def test_the_short_study_ends_in_a_page_of_every_task(checkout, monkeypatch):
    study, _ = load_study(), run("python examples/study/study.py --short", checkout)
    monkeypatch.chdir(checkout)
    check_study(study.SHORT.folder, list(study.PATTERNS))


@pytest.mark.manual
def test_a_run_in_stages_is_the_same_when_it_is_interrupted(checkout):
    """Run 2026-11-29: passed in 4 min 45 s."""
    printed = run("".join(commands(EXAMPLES / "stages" / "README.md")), checkout)
    assert "the losses of 180 steps are equal" in printed
    tables = list((checkout / "runs/stages/run/tasks").glob("*/step_00000180/out/perplexity.json"))
    assert {path.parents[2].name for path in tables} == {"lengths", "lengths_ema"}
    assert (checkout / "runs/stages/hf/model.safetensors").is_file()


def test_every_example_is_listed_and_its_page_names_its_files():
    pages = {page.parent.name: page.read_text(encoding="utf-8") for page in EXAMPLES.glob("*/README.md")}
    listed = set(re.findall(r"\]\((\w+)/README\.md\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert listed == pages.keys() == {path.name for path in EXAMPLES.iterdir() if path.is_dir()}
    for name, page in pages.items():
        files = [path.name for path in (EXAMPLES / name).iterdir() if path.suffix in (".py", ".yaml", ".sh")]
        assert all(file in page for file in files), name


@pytest.mark.parametrize("page", sorted(EXAMPLES.rglob("README.md")), ids=lambda page: page.parent.name)
def test_links_of_the_examples_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link
