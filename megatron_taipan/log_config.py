"""Options of the logs."""

from megatron_taipan.section import Section, option


class LogConfig(Section):
    """What is logged during a run."""

    every: int = option(10, "steps between log lines", ge=1)
    tensorboard: bool = option(True, "write TensorBoard events to checkpoint.dir/tensorboard")
    wandb: bool = option(False, "send the same curves to Weights & Biases (package wandb; WANDB_MODE=offline works)")
    wandb_project: str = option("megatron-taipan", "project of log.wandb")
    text_mb: float = option(
        10.0,
        "size at which a rank's text file, checkpoint.dir/logs/rank_00000.log and so on, is rotated; 0: none",
        ge=0,
    )
    text_files: int = option(3, "old text files that each rank keeps", ge=1)
    progress: bool = option(True, "progress bar on rank 0 when stderr is a terminal, plain lines elsewhere")
    peak_tflops: float | None = option(
        None, "peak TFLOP/s of one device in the precision used, for MFU; null looks up 16 bits of known GPUs", gt=0
    )
