"""Fine-tunes an exported folder on plain text with transformers' Trainer. This project's package is not imported.

    python examples/finetune/finetune.py EXPORT OUT --text FILE [FILE ...]

Paragraphs (separated by empty lines) are the documents.
"""

import argparse
import re
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", help="folder that checkpoints.export_hf wrote")
    parser.add_argument("out", help="folder for the tuned model")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="documents a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--longest", type=int, default=256, help="tokens of a document; the rest is dropped")
    options = parser.parse_args()

    # the network's code comes with the folder
    tokenizer = AutoTokenizer.from_pretrained(options.export, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(options.export, trust_remote_code=True)
    documents = [text for path in options.text for text in re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))]
    # every document ends as in pretraining; the export declares that token
    ids = [
        tokenizer(text, truncation=True, max_length=options.longest - 1)["input_ids"]
        for text in documents
        if text.strip()
    ]
    rows = [{"input_ids": document + [tokenizer.eos_token_id]} for document in ids]
    trainer = Trainer(
        model,
        TrainingArguments(
            options.out,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.lr,
            lr_scheduler_type="cosine",
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows,
        # Several documents in one row, without padding: position_ids start again with each, and by them the model keeps
        # documents apart. Padding with the end token instead would take it out of the labels, and texts would not end.
        data_collator=DataCollatorWithFlattening(),
    )
    trainer.train()
    trainer.save_model(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
