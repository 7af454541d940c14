"""An export under the oldest transformers that it accepts, the pinned one, and the newest that there is.

Each release is installed with what it needs, torch excepted, into a folder of the test's own; a process that finds it
there first, and cannot import our package, loads the export. All together take about a minute, most of it for pip.
"""

import importlib.metadata
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from checkpoints.export_hf import export
from megatron_taipan.inference.loading import build_with_weights
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.versions import TRANSFORMERS_OLDEST, is_untested
from tests.checkpoints.made import memory_state

PATTERNS = ("M S W M A", "M M")  # transformers' own caches count no tokens where all layers are recurrent
COUNT = 12  # tokens written in each call

STRANGER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "megatron_taipan":
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
out, site, *folders = sys.argv[1:]
if site:
    sys.path.insert(0, site)
import torch, transformers
prompt = torch.arange(1, 41).view(2, 20)
mask = torch.ones_like(prompt)
mask[0, :4] = 0
answers = {"version": transformers.__version__}
for folder in folders:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).double().eval()
    def generate(text, **options):
        options |= {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True}
        return model.generate(text, **options)
    with torch.no_grad():
        logits = model(prompt).logits
    first = generate(prompt)
    cache = first["cache"] if "cache" in first else first["past_key_values"]
    answers[folder] = {
        "logits": logits,
        "cached": first.sequences,
        "uncached": generate(prompt, use_cache=False).sequences,
        "chunked": generate(prompt, prefill_chunk_size=7).sequences,
        "beams": generate(prompt, num_beams=3).sequences,
        "beams, uncached": generate(prompt, num_beams=3, use_cache=False).sequences,
        "continued": generate(first.sequences, past_key_values=cache).sequences,
        "padded": generate(prompt, attention_mask=mask).sequences,
    }
torch.save(answers, out)
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[Path, Taipan]:
    """Exported folders, and the trainer's models, float64, that they must equal."""
    place, made = tmp_path_factory.mktemp("exports"), {}
    for number, pattern in enumerate(PATTERNS):
        state, folder = memory_state(pattern), place / f"hf{number}"
        export(state, folder)
        made[folder] = build_with_weights(state.config.model, state.load, torch.float32).double()
    return made


def install(requirement: str, site: Path) -> str:
    """Installs it, without what is known of this environment; returns the version of transformers."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    command += ["--retries", "1", "--target", str(site), requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        pytest.skip(f"pip gets no {requirement}: {done.stderr.strip().splitlines()[-1:]}")
    (found,) = importlib.metadata.distributions(name="transformers", path=[str(site)])
    return found.version


def compare(exports: dict[Path, Taipan], scratch: Path, site: Path | None, version: str) -> None:
    """Fails, naming the release, where what transformers computes and writes is not the trainer's."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    (scratch / "stranger.py").write_text(STRANGER)
    command = [sys.executable, "-I", str(scratch / "stranger.py"), str(scratch / "out.pt"), str(site or "")]
    done = subprocess.run([*command, *map(str, exports)], cwd=scratch, env=env, capture_output=True, text=True)
    assert not done.returncode, f"transformers {version}: {done.stderr.strip().splitlines()[-1:]}"
    answers = torch.load(scratch / "out.pt", weights_only=True)
    assert answers["version"] == version
    prompt = torch.arange(1, 41).view(2, 20)
    for folder, model in exports.items():
        answer, pattern = answers[str(folder)], model.config.pattern
        with torch.no_grad():
            difference = (answer["logits"] - model(prompt).logits).abs().max().item()
        assert difference < 1e-9, f"transformers {version}, {pattern}: logits differ by {difference}"
        greedy = naive_greedy(model, prompt, 2 * COUNT)
        expected = dict.fromkeys(("cached", "uncached", "chunked"), greedy[:, : 20 + COUNT])
        expected |= {"continued": greedy, "beams": answer["beams, uncached"]}
        expected["padded"] = torch.stack([naive_greedy(model, prompt[:1, 4:], COUNT)[0], greedy[1, 4 : 20 + COUNT]])
        answer["padded"] = answer["padded"][:, 4:]
        wrong = [how for how, tokens in expected.items() if not torch.equal(answer[how], tokens)]
        assert not wrong, f"transformers {version}, {pattern}: other tokens where generate() is {wrong}"


def naive_greedy(model: Taipan, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """argmax over full forwards of the trainer's model, no cache, no generate()."""
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.slow
def test_the_oldest_release_gives_the_trainers_text(exports, tmp_path):
    version = install(f"transformers=={TRANSFORMERS_OLDEST}.0", tmp_path / "site")
    compare(exports, tmp_path, tmp_path / "site", version)


@pytest.mark.slow
def test_the_pinned_release_gives_the_trainers_text(exports, tmp_path):
    compare(exports, tmp_path, None, importlib.metadata.version("transformers"))


@pytest.mark.slow
def test_the_newest_release_gives_the_trainers_text(exports, tmp_path):
    """One that the export does not accept yet may fail: that is told, and stops nobody."""
    version = install("transformers", tmp_path / "site")
    try:
        compare(exports, tmp_path, tmp_path / "site", version)
    except AssertionError as error:
        if not is_untested(version):
            raise
        pytest.xfail(str(error))
    if is_untested(version):
        warnings.warn(f"transformers {version} works: TRANSFORMERS_NEWEST may follow it", stacklevel=1)
