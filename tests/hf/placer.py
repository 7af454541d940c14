"""What accelerate's `device_map` makes of an exported folder. Run by path in a process of its own.

    python -I placer.py FOLDER SITE OUT

FOLDER: an export; SITE: folders with packages, written as in PYTHONPATH, or ""; OUT: the file for the answers, by name
of the map. Two GPUs are taken where there are any, else a pretended device beside the CPU. Our package is made
impossible to import first.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from second_device import DEVICE, SecondDevice
from tuner import Blocker, load


def maps(layers: int, first: str, second: str) -> dict[str, dict[str, str]]:
    """By name: which module lies where. What lies on disk is fetched for each call, to where accelerate says."""
    halves = {"model.embedding": first, "model.final_norm": second, "lm_head": first}
    halves |= {f"model.layers.{n}": first if n < layers // 2 else second for n in range(layers)}
    turned = {name: first if place == second else second for name, place in halves.items()}
    return {"halves": halves, "disk between": turned | {"model.layers.1": "disk", "model.layers.3": "disk"}}


def placed(folder: str, places: Any, work: str) -> Any:
    """The model with its modules on these devices."""
    from accelerate import dispatch_model

    if torch.cuda.device_count() > 1:
        return load(folder, device_map=places, offload_folder=work, offload_buffers=True)
    return dispatch_model(load(folder), places, main_device="cpu", offload_dir=work, offload_buffers=True)


def answer(model: Any, prompt: Any) -> dict[str, Any]:
    """Logits, texts; the loss of a training step and its gradients where no weight is fetched from elsewhere."""
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    with torch.no_grad():
        found = {"logits": model(prompt).logits, "padded": model(prompt, attention_mask=mask).logits[:, 4:]}
    for name, options in (("cached", {}), ("uncached", {"use_cache": False}), ("beams", {"num_beams": 2})):
        found[name] = model.generate(prompt, max_new_tokens=6, do_sample=False, **options)
    devices = {str(p.device) for p in model.parameters()}
    if "meta" not in devices:
        model.train()
        output = model(prompt, labels=prompt)
        assert output.loss.device == output.logits.device
        output.loss.backward()
        found["loss"] = output.loss.detach()
        found |= {name: p.grad for name, p in model.named_parameters()}
    return {name: value.to("cpu") for name, value in found.items()} | {"devices": devices}


def main(folder: str, site: str, out: str) -> None:
    sys.meta_path.insert(0, Blocker())  # type: ignore[arg-type]
    sys.path[:0] = site.split(os.pathsep) if site else []
    gpus = torch.cuda.device_count() > 1
    devices = ("cuda:0", "cuda:1") if gpus else ("cpu", str(DEVICE))
    prompt = torch.arange(1, 41, device=devices[0]).view(2, 20)
    whole = load(folder)
    wanted = maps(whole.config.num_hidden_layers, *devices) | ({"balanced": "balanced", "auto": "auto"} if gpus else {})
    answers = {"one": answer(whole.to(devices[0]), prompt)}
    with nullcontext() if gpus else SecondDevice():
        for name, places in wanted.items():
            answers[name] = answer(placed(folder, places, f"{out} {name}"), prompt)
    torch.save(answers, out)


if __name__ == "__main__":
    main(*sys.argv[1:4])
