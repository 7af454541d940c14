#!/usr/bin/env bash
# From raw text to a small trained Taipan that writes a sentence: what `make quickstart` runs.
#
# Everything it makes is under runs/quickstart. Each step prints the command it runs: they are the ones to use for a
# corpus and a model of your own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=runs/quickstart
config=launch/configs/quickstart.yaml
text=data_prep/sample/state_of_the_union.jsonl.gz
tokenizer=$run/data/tokenizer.model
prompt="My fellow Americans, the state of our Union is"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

# Two processes: on two GPUs where they are, else two on the CPU; a single GPU takes one process.
gpus=$(python -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
case $gpus in
    0) processes=2 device="2 CPU processes"; export DS_ACCELERATOR=cpu ;;
    1) processes=1 device="1 GPU" ;;
    *) processes=2 device="2 GPUs" ;;
esac
steps=$(python -c "from megatron_taipan.config_loading import load_config; print(load_config('$config').train.steps)")
half=$((steps / 2))

heading() { printf '\n== %s\n' "$*"; }
command_line() { printf '$ %s\n' "$*"; }
done_in() { printf '   (%d s)\n' "$((SECONDS - began))"; }
# Runs one command: shows it, runs it, says how long it took.
show() { command_line "$*"; began=$SECONDS; "$@"; done_in; }
free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
pretrain() {
    # --quiet hides what the launcher prints about itself; a separate port lets two of these run side by side.
    show deepspeed --quiet --num_gpus "$processes" --master_port "$(free_port)" launch/pretrain.py --config "$config" "$@"
}

SECONDS=0
if [ -e "$run" ]; then
    echo "An earlier quickstart is in $run; it is removed, and this one starts from the text again."
    rm -rf "$run"
fi
mkdir -p "$run/data"

heading "1. A tokenizer is trained on the text, and the text becomes token ids"
show python -m data_prep train-tokenizer --input "$text" --vocab-size 2048 --output "$tokenizer"
show python -m data_prep tokenize --input "$text" --tokenizer "$tokenizer" --append-eod --output "$run/data/sotu"
show python -m data_prep inspect "$run/data/sotu" --tokenizer "$tokenizer" --documents 1

heading "2. Pretraining on $device, stopped half-way after step $half"
pretrain "train.stop_at=$half"

heading "3. The same command again resumes from the checkpoint and finishes"
pretrain

heading "4. The gate's threshold is set, so that the share of training is selected in use as well"
show python -m megatron_taipan.evaluation calibrate "$run/checkpoints"

heading "5. Export to a Hugging Face folder"
show python -m checkpoints.export_hf "$run/checkpoints" "$run/hf"

heading "6. transformers loads the folder, from elsewhere and without this package, and continues a prompt"
began=$SECONDS
elsewhere=$(mktemp -d)
trap 'rm -rf "$elsewhere"' EXIT
root=$PWD
(cd "$elsewhere" && HF_HUB_OFFLINE=1 HF_MODULES_CACHE="$elsewhere/modules" \
    python "$root/launch/continue_prompt.py" "$root/$run/hf" "$prompt")
done_in

heading "7. Perplexity on held-out addresses, before and after training"
show python -m megatron_taipan.evaluation.perplexity "$run/checkpoints" --untrained

heading "8. The course of the training, from its log, as pictures"
show python -m megatron_taipan.evaluation curves "$run/checkpoints" --out "$run/results"

heading "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. What is where:"
where() { printf '%-38s%s\n' "$1" "$2"; }
where "$tokenizer" "the sentencepiece tokenizer"
where "$run/data/sotu.bin, .idx" "the text as token ids, in the format of Megatron's indexed datasets"
where "$run/checkpoints" "checkpoints, each with its configuration, versions, git commit and data fingerprint"
where "" "log.jsonl: every step; tensorboard/: the same as curves (tensorboard --logdir $run/checkpoints)"
where "$run/results/curves.svg" "loss in training and validation by step; curves_selected.svg: the share of tokens that attend"
where "$run/hf" "the Hugging Face folder: weights, code, tokenizer, model card"
