"""Peak speeds of GPUs by their makers' data sheets: the one table that MFU and the benchmarks are computed from."""

import torch

# Dense TFLOP/s in bf16 (V100: fp16, it has no bf16) by the full name that the driver reports: variants of one chip
# differ by a third, so a name that only resembles one of these has no known peak. From the makers' data sheets.
PEAK_TFLOPS = {
    "NVIDIA B200": 2250.0,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H800": 989.4,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A800-SXM4-80GB": 312.0,
    "NVIDIA A800 80GB PCIe": 312.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA L4": 121.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
    "Tesla V100-SXM2-16GB": 125.0,
    "Tesla V100-SXM2-32GB": 125.0,
}


def device_name() -> str | None:
    """The name of this process's GPU, None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def known_peak(name: str | None, precision: str = "bf16") -> float | None:
    """Peak TFLOP/s of the GPU of that name; None without a GPU, for one that is not in the table, and for float32."""
    return PEAK_TFLOPS.get(name) if name is not None and precision != "fp32" else None
