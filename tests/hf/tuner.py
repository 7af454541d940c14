"""What a user of PEFT, TRL and accelerate does with an exported folder. Run by path in a process of its own.

    python -I tuner.py FOLDER SITE WORK

FOLDER: an export with its tokenizer; SITE: where the libraries are installed; WORK: an empty folder for what they
write, `answers.pt` among it. Our package is made impossible to import first.
"""

import sys
from pathlib import Path
from typing import Any


class Blocker:
    """Makes every import of our package fail."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == "megatron_taipan":
            raise ImportError(name)


def load(folder: str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def lora(folder: str, work: Path, prompt: Any) -> dict[str, Any]:
    """Adapters of every matrix, with values that matter: what they add, and how the model then answers."""
    import peft

    options = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(load(folder).double(), options).double()
    model.train()
    model(input_ids=prompt, labels=prompt).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None or not p.grad.abs().max() > 0]
    added = {}
    for name, a in trained.items():
        if ".lora_A." in name:
            b = trained[name.replace(".lora_A.", ".lora_B.")]
            matrix = name.removeprefix("base_model.model.model.").partition(".lora_A.")[0]
            added[matrix] = (b @ a).detach() * options.lora_alpha / options.r
    model.eval()
    answer = {"added": added, "without gradient": without, "logits": model(prompt).logits.detach()}
    answer["text"] = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)
    model.save_pretrained(work / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder).double(), work / "adapter").double().eval()
    answer["read again"] = again(prompt).logits.detach()
    merged = model.merge_and_unload()
    answer["merged"] = merged(prompt).logits.detach()
    merged.float().save_pretrained(work / "merged")
    answer["merged, read again"] = load(str(work / "merged")).double()(prompt).logits.detach()
    by_name = peft.LoraConfig(target_modules=["q_proj", "in_proj_x"], modules_to_save=["gate"])
    named = peft.get_peft_model(load(folder), by_name)
    answer["by name"] = [name for name, p in named.named_parameters() if p.requires_grad]
    return answer


def soft_prompt(folder: str, prompt: Any) -> dict[str, Any]:
    """Prompt tuning: the vectors that are learned, whether a gradient reaches them, the text behind them."""
    import peft

    options = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(load(folder).double(), options).double()
    model.train()
    model(input_ids=prompt, labels=prompt).loss.backward()
    (vectors,) = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    text = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
    return {"vectors": vectors.detach(), "gradient": float(vectors.grad.abs().max()), "text": text}


def tuned(folder: str, work: Path) -> dict[str, list[dict[str, float]]]:
    """The log of ten steps of each of TRL's trainers."""
    import peft
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    common: dict[str, Any] = {
        "output_dir": str(work / "runs"), "use_cpu": True, "report_to": [], "save_strategy": "no", "max_steps": 10,
        "logging_steps": 1, "per_device_train_batch_size": 4, "disable_tqdm": True, "bf16": False,
    }  # fmt: skip
    texts = Dataset.from_dict({"text": [f"import os  # the quick brown fox {n % 7}" for n in range(40)]})
    pairs = Dataset.from_dict({"prompt": ["def "] * 40, "chosen": ["yes(self)"] * 40, "rejected": ["no(x, y)"] * 40})
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    adapters = {"peft_config": peft.LoraConfig(target_modules="all-linear")}

    def log(trainer: Any) -> list[dict[str, float]]:
        trainer.train()
        return [line for line in trainer.state.log_history if "loss" in line]

    def supervised(**options: Any) -> list[dict[str, float]]:
        more = {name: options.pop(name) for name in ("peft_config",) if name in options}
        settings = SFTConfig(**common | {"learning_rate": 1e-2, "max_length": 48} | options)
        return log(SFTTrainer(load(folder), settings, train_dataset=texts, processing_class=tokenizer, **more))

    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    preferring = DPOConfig(**common | {"learning_rate": 3e-3, "trust_remote_code": True})
    prompts = pairs.select_columns("prompt")
    sampling = GRPOConfig(**common | {"max_steps": 2, "num_generations": 4, "max_completion_length": 8, "beta": 0.1})
    return {
        "sft": supervised(),
        "sft dft": supervised(loss_type="dft"),
        "sft packed": supervised(packing=True),
        "sft lora": supervised(**adapters, learning_rate=3e-2),
        "dpo": log(DPOTrainer(load(folder), args=preferring, train_dataset=pairs, processing_class=tokenizer)),
        "grpo lora": log(
            GRPOTrainer(load(folder), length, sampling, prompts, processing_class=tokenizer, **adapters)
        ),
    }  # fmt: skip


def offloaded(folder: str, work: Path, prompt: Any) -> dict[str, Any]:
    """Logits and text where weights lie on the disk, and where some lie there, some in memory."""
    layers = load(folder).config.num_hidden_layers
    mixed = {f"model.layers.{n}": "disk" if n % 2 else "cpu" for n in range(layers)}
    mixed |= {"model.embedding": "cpu", "model.final_norm": "cpu", "lm_head": "cpu"}
    answer = {}
    for name, places in (("disk", {"": "disk"}), ("mixed", mixed)):
        options = {"device_map": places, "offload_folder": str(work / name), "offload_buffers": True}
        model = load(folder, **options)
        meta = sum(p.is_meta for p in model.parameters())
        text = model.generate(prompt, max_new_tokens=6, do_sample=False)
        answer[name] = {"logits": model(prompt).logits.detach(), "text": text, "offloaded": meta}
    return answer


def main(folder: str, site: str, work: str) -> None:
    sys.meta_path.insert(0, Blocker())  # type: ignore[arg-type]
    sys.path.insert(0, site)
    import torch

    torch.manual_seed(0)
    prompt, place = torch.arange(3, 43).view(2, 20), Path(work)
    answers = {
        "lora": lora(folder, place, prompt), "soft prompt": soft_prompt(folder, prompt),
        "offloaded": offloaded(folder, place, prompt), "tuned": tuned(folder, place),
    }  # fmt: skip
    torch.save(answers, place / "answers.pt")


if __name__ == "__main__":
    main(*sys.argv[1:4])
